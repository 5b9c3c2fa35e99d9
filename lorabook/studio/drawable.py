"""Which pipelines the studio can draw with."""

import inspect

from lorabook.live.layers import denoiser, models_of


def check_drawable(pipe) -> None:
    """Raise ValueError, in one sentence, for a pipeline that does not draw pictures from a prompt alone."""
    kind, takes = type(pipe).__name__, inspect.signature(type(pipe).__call__).parameters
    encoders = [
        name
        for name in inspect.signature(type(pipe).__init__).parameters
        if name.startswith("text_encoder")
    ]
    unet = models_of(pipe).get("unet")
    if (
        denoiser(pipe) is None
        or "num_images_per_prompt" not in takes
        or not hasattr(pipe, "vae_scale_factor")
    ):
        raise ValueError(
            f"the studio draws pictures from a prompt with Stable Diffusion and its kin, and {kind} is none of "
            "them; move its scales with lb.set_scales and draw with pipe(...)"
        )
    if not any(getattr(pipe, name, None) is not None for name in encoders):
        raise ValueError(
            f"this {kind} has no text encoder, so the studio cannot read a prompt; load the pipeline with its "
            "text encoders and tokenizers"
        )
    if (
        getattr(unet, "encoder_hid_proj", None) is not None
        and unet.config.encoder_hid_dim_type == "ip_image_proj"
    ):
        raise ValueError(
            "this pipeline has an IP-Adapter, which wants a picture besides the prompt, and the studio gives "
            "it none; call pipe.unload_ip_adapter() first, or draw with pipe(..., ip_adapter_image=...)"
        )
