"""Many images in few denoising passes."""
