"""Many pictures in few denoising passes."""

from lorabook.sweeps.drawing import draw, world_of  # noqa: F401
