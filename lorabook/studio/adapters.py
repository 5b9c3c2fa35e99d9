"""A pipeline's adapters as the studio sees them: what can be used, settings, parts, ranks."""

import copy
import inspect
from collections import Counter
from collections.abc import Mapping

from diffusers import DiffusionPipeline
from torch import Tensor

from lorabook.blocks import block_map, block_of, kind_of, place_of
from lorabook.live.inject import adapter_of, write_weights
from lorabook.live.layers import (
    active_adapters,
    adapter_names,
    denoiser,
    flat,
    layers_of,
    models_of,
    read_scale,
    walk,
)
from lorabook.live.match import base_weights, match_layers
from lorabook.live.state import check_known, lock_of
from lorabook.lora.adapter import Adapter
from lorabook.lora.resize import resize
from lorabook.studio.settings import BLOCK, AdapterSettings

BLEND = "studio_blend"  # the adapter that stands for those that are blended


def check_supported(pipe: DiffusionPipeline) -> None:
    """Raise ValueError for a pipeline that does not generate images from a prompt alone."""
    kind, call = type(pipe).__name__, inspect.signature(type(pipe).__call__).parameters
    parts = inspect.signature(type(pipe).__init__).parameters
    unet = models_of(pipe).get("unet")
    is_image_pipeline = "num_images_per_prompt" in call and hasattr(pipe, "vae_scale_factor")
    if denoiser(pipe) is None or not is_image_pipeline:
        raise ValueError(
            "the studio draws pictures from a prompt with Stable Diffusion and its kin, and "
            f"{kind} is none of them; move its scales with lb.set_scales and draw with pipe(...)"
        )
    if not any(getattr(pipe, n, None) for n in parts if n.startswith("text_encoder")):
        raise ValueError(
            f"this {kind} has no text encoder, so the studio cannot read a prompt; load the "
            "pipeline with its text encoders and tokenizers"
        )
    if getattr(getattr(unet, "config", None), "encoder_hid_dim_type", None) == "ip_image_proj":
        raise ValueError(
            "this pipeline has an IP-Adapter, which wants a picture besides the prompt, and the "
            "studio gives it none; call pipe.unload_ip_adapter() first, or draw with "
            "pipe(..., ip_adapter_image=...)"
        )


def present_settings(pipe: DiffusionPipeline) -> dict[str, AdapterSettings]:
    """The settings of a pipeline's adapters as they are now."""
    active, settings = active_adapters(pipe), {}
    for name in adapter_names(pipe):
        if name != BLEND:
            factors = {
                component: {module: read_scale(layer, name) for module, layer in layers.items()}
                for component, layers in layers_of(pipe, name).items()
            }
            at_zero = not any(any(layers.values()) for layers in factors.values())
            settings[name] = nearest_settings(factors, on=name in active or at_zero)
    return settings


def nearest_settings(factors: Mapping[str, Mapping[str, float]], **others) -> AdapterSettings:
    """The settings that come nearest to one number a layer; exact unless layers of a part differ.

    Args:
        factors: Numbers by component and module, for the layers that the adapter touches.
        **others: Further fields (on, rank).
    """
    values = [
        (c, module, value) for c, layers in factors.items() for module, value in layers.items()
    ]
    counts = Counter(round(value, 6) for *_, value in values)
    scale = counts.most_common(1)[0][0] if counts else 1.0
    if len(counts) < 2 or "transformer" in factors:  # whose blocks have no sliders
        return AdapterSettings(scale=scale, **others)
    scale = scale or 1.0
    for slider_of in (block_of, kind_of, part_of):
        sliders: dict[str, list[float]] = {}
        for component, module, value in values:
            slider = slider_of(module) if component == "unet" else component
            sliders.setdefault(slider, []).append(value / scale)
        if all(max(ratios) - min(ratios) < 1e-5 for ratios in sliders.values()):
            break
    means = {name: round(sum(ratios) / len(ratios), 6) for name, ratios in sliders.items()}
    blocks = {name: mean for name, mean in means.items() if BLOCK.fullmatch(name)}
    parts = {name: mean for name, mean in means.items() if name not in blocks}
    return AdapterSettings(scale=scale, blocks=blocks, parts=parts, **others)


def part_of(module: str) -> str:
    """The part of a block that a UNet's layer belongs to, as "up.1.attentions_0", or "outside"."""
    place = place_of(module)
    if place is None:
        return block_of(module)
    block, part, index = place
    return f"{block}.sampler" if part == "samplers" else f"{block}.{part}_{index}"


def touched_blocks(pipe: DiffusionPipeline, name: str) -> list[str]:
    """The blocks of a UNet that an adapter touches, "outside", and the text encoders."""
    layers = layers_of(pipe, name)
    texts = [component for component in layers if component.startswith("text_encoder")]
    return [*block_map(layers.get("unet", ())), *texts]


def blocks_of(pipe: DiffusionPipeline) -> list[str]:
    """All blocks of a pipeline's UNet, touched or not; none where it has no UNet."""
    unet = models_of(pipe).get("unet")
    names = [] if unet is None else [name for name, _ in walk(unet)]
    return [block for block in block_map(names) if block != "outside"]


def touched_parts(pipe: DiffusionPipeline, name: str) -> dict[str, list[str]]:
    """What has a finer slider: kinds of layers under "", parts by block in an image's order."""
    modules = [module for module in layers_of(pipe, name).get("unet", ()) if place_of(module)]

    def order(part: str) -> tuple:
        what, _, index = part.rpartition(".")[2].partition("_")
        return what == "sampler", index, what != "resnets"

    blocks = {
        block: sorted(set(map(part_of, inside)), key=order)
        for block, inside in block_map(modules).items()
    }
    return {"": list(dict.fromkeys(map(kind_of, modules)))} | blocks


class Ranks:
    """Adapters of a pipeline cut to smaller ranks, with the originals beside."""

    def __init__(self, pipe: DiffusionPipeline):
        self.pipe = pipe
        self._ranks: dict[str, int | None] = {}
        self._largest: dict[str, int] = {}
        self._originals: dict[str, Adapter] = {}
        self.energy: dict[str, float] = {}  # by adapter, the share of ‖ΔW‖² that is left

    def largest(self, name: str) -> int:
        """The largest rank among an adapter's layers as trained; known at once the second time."""
        if name not in self._largest:
            with lock_of(self.pipe):
                check_known(self.pipe, [name])
                layers = flat(layers_of(self.pipe, name))
                self._largest[name] = max(layer.r[name] for layer in layers)
        return self._largest[name]

    def cut(self, name: str, rank: int | None) -> None:
        """Cut an adapter, from what it was as trained; None puts that back. Its scales stay."""
        if rank is not None and rank >= self.largest(name):
            rank = None
        if rank == self._ranks.get(name):
            return
        if name not in self._originals:  # a copy, since cutting writes into what is there
            self._originals[name] = copy.deepcopy(adapter_of(self.pipe, name))
        adapter, self.energy[name] = self._originals[name], 1.0
        if rank is not None:
            adapter, report = resize(adapter, rank=rank, bases=base_weights(self.pipe, adapter))
            self.energy[name] = report.total.kept
        weights = match_layers(self.pipe, adapter, f"adapter {name!r}")
        scalings = [layer.scaling[name] for layer in flat(layers_of(self.pipe, name))]
        padded = isinstance(scalings[0], Tensor)  # prepared for swapping under torch.compile
        write_weights(self.pipe, name, weights, adapter, padded=padded)
        self._ranks[name] = rank

    def forget(self, name: str) -> None:
        """Another adapter has this name now."""
        for known in (self._ranks, self._largest, self._originals):
            known.pop(name, None)

    def close(self) -> None:
        """Put all adapters back as trained."""
        for name in self._ranks.keys() & set(adapter_names(self.pipe)):
            self.cut(name, None)
