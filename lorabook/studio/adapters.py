"""A pipeline's adapters as the studio sees them: what can be used, settings, blocks."""

import inspect
from collections.abc import Mapping
from statistics import fmean

from diffusers import DiffusionPipeline

from lorabook.blocks import block_map, group_by_block
from lorabook.live.expand import LayerScales
from lorabook.live.layers import (
    active_adapters,
    adapter_names,
    denoiser,
    layers_of,
    models_of,
    read_scale,
    walk,
)
from lorabook.studio.settings import AdapterSettings
from lorabook.types import Scales


def check_supported(pipe: DiffusionPipeline) -> None:
    """Raise ValueError for a pipeline that does not generate images from a prompt alone."""
    kind, call = type(pipe).__name__, inspect.signature(type(pipe).__call__).parameters
    is_image_pipeline = "num_images_per_prompt" in call and hasattr(pipe, "vae_scale_factor")
    if denoiser(pipe) is None or not is_image_pipeline:
        raise ValueError(
            "the studio draws pictures from a prompt with Stable Diffusion and its kin, and "
            f"{kind} is none of them; move its scales with lb.set_scales and draw with pipe(...)"
        )
    parts = inspect.signature(type(pipe).__init__).parameters
    if not any(getattr(pipe, name, None) for name in parts if name.startswith("text_encoder")):
        raise ValueError(
            f"this {kind} has no text encoder, so the studio cannot read a prompt; load the "
            "pipeline with its text encoders and tokenizers"
        )
    config = getattr(denoiser(pipe), "config", None)
    if getattr(config, "encoder_hid_dim_type", None) == "ip_image_proj":
        raise ValueError(
            "this pipeline has an IP-Adapter, which wants a picture besides the prompt, and the "
            "studio gives it none; call pipe.unload_ip_adapter() first, or draw with "
            "pipe(..., ip_adapter_image=...)"
        )


def present_settings(pipe: DiffusionPipeline) -> dict[str, AdapterSettings]:
    """The settings of a pipeline's adapters as they are now."""
    active, settings = active_adapters(pipe), {}
    for name in adapter_names(pipe):
        numbers = {
            component: {module: read_scale(layer, name) for module, layer in layers.items()}
            for component, layers in layers_of(pipe, name).items()
        }
        at_zero = not any(any(layers.values()) for layers in numbers.values())
        settings[name] = settings_for(numbers, numbers, on=name in active or at_zero)
    return settings


def settings_for(numbers: LayerScales, scales: Mapping[str, Scales], on: bool) -> AdapterSettings:
    """The settings that give each layer its number.

    Where layers of one block differ, they hold the blocks' means, and the scales that say it all.
    """
    blocks = {
        block: [round(numbers[component][module], 6) for component, module in layers]
        for block, layers in _by_block(numbers).items()
    }
    values = {value for inside in blocks.values() for value in inside}
    if len(values) < 2:
        return AdapterSettings(on, scale=min(values, default=1.0))
    # a transformer's blocks have no sliders
    is_exact = "transformer" not in blocks and all(
        len({*inside}) == 1 for inside in blocks.values()
    )
    means = {block: round(fmean(inside), 6) for block, inside in blocks.items()}
    means.pop("transformer", None)
    return AdapterSettings(on, blocks=means, layers=None if is_exact else scales)


def touched_blocks(pipe: DiffusionPipeline, name: str) -> list[str]:
    """The blocks of a UNet that an adapter touches, "outside", and the text encoders."""
    layers = layers_of(pipe, name)
    return [block for block in _by_block(layers) if block != "transformer"]


def blocks_of(pipe: DiffusionPipeline) -> list[str]:
    """All blocks of a pipeline's UNet, touched or not; none where it has no UNet."""
    unet = models_of(pipe).get("unet")
    names = [] if unet is None else [name for name, _ in walk(unet)]
    return [block for block in block_map(names) if block != "outside"]


def _by_block(layers: Mapping[str, Mapping]) -> dict[str, list[tuple[str, str]]]:
    return group_by_block(
        (component, module) for component, modules in layers.items() for module in modules
    )
