"""What sort of model an adapter is for, or a pipeline is, as far as their layers tell."""

import re
from collections.abc import Sequence
from pathlib import Path

from lorabook.live.layers import models_of, walk
from lorabook.lora.adapter import Adapter
from lorabook.lora.formats.keys import COMPONENTS, bare
from lorabook.lora.shapes import has_stacked_transformers, is_large, text_width

_BY_WIDTH = {768: "Stable Diffusion 1.x", 1024: "Stable Diffusion 2.x"}
_SMALL = re.compile(
    r"down_blocks\.(0\.attentions|3)|up_blocks\.(2\.attentions|3)"
)  # where SDXL has none
# how the layers of transformers are called, and who calls them so, the likeliest first; the first row that fits counts
_LAYERS = [
    (re.compile(pattern), names)
    for pattern, names in (
        (r"double_stream_blocks|single_stream_blocks", ("HiDream",)),
        (r"joint_transformer_blocks|(double|single)_layers", ("AuraFlow",)),
        (r"joint_blocks", ("Stable Diffusion 3",)),
        (r"distilled_guidance_layer", ("Chroma",)),
        (r"(double|single)_blocks\.\d+\.(img|txt)_attn_", ("HunyuanVideo",)),
        (
            r"(double|single)_blocks[._]\d|single_transformer_blocks",
            ("Flux", "Chroma", "HunyuanVideo"),
        ),
        (r"(img|txt)_(mlp|mod)", ("Qwen-Image",)),
        (r"^blocks[._]\d+[._]", ("Wan", "Cosmos", "Mochi", "Hunyuan-DiT")),
        (r"^(layers[._]\d+|(noise|context)_refiner[._]\d+)[._]attention", ("Z-Image", "Lumina 2")),
        (r"^(layers[._]\d+|(noise|context)_refiner[._]\d+)[._]attn", ("Lumina 2",)),
        (
            r"add_[qkv]_proj|to_add_out|ff_context|^transformer_blocks[._]\d+[._]attn[._]",
            ("Stable Diffusion 3", "Qwen-Image", "Flux", "HunyuanVideo", "Mochi"),
        ),
        (
            r"^transformer_blocks[._]\d+[._]attn\d",
            ("LTX-Video", "PixArt", "Sana", "CogVideoX", "Mochi"),
        ),
        (
            r"^transformer_blocks[._]\d+[._]",
            (
                "LTX-Video",
                "PixArt",
                "Sana",
                "CogVideoX",
                "Mochi",
                "Stable Diffusion 3",
                "Qwen-Image",
                "Flux",
                "HunyuanVideo",
            ),
        ),
    )
]
_INSIDE = {
    1152: "PixArt",
    2240: "Sana",
    2048: "LTX-Video",
    1920: "CogVideoX",
}  # by the width of a transformer's attention
_PIPELINES = {
    "StableDiffusion3": "Stable Diffusion 3",
    "Flux": "Flux",
    "LTX": "LTX-Video",
    "Wan": "Wan",
    "PixArt": "PixArt",
    "ZImage": "Z-Image",
    "QwenImage": "Qwen-Image",
    "HunyuanDiT": "Hunyuan-DiT",
    "HunyuanVideo": "HunyuanVideo",
    "HiDream": "HiDream",
    "Sana": "Sana",
    "AuraFlow": "AuraFlow",
    "Chroma": "Chroma",
    "CogVideoX": "CogVideoX",
    "Lumina2": "Lumina 2",
    "Mochi": "Mochi",
    "Cosmos": "Cosmos",
}


def family(thing) -> str:
    """The sort of model, with the width of the text it reads: "Stable Diffusion 1.x (text width 768)".

    Args:
        thing: an Adapter or a diffusers pipeline.
    """
    if names := transformers_of(thing):
        return " or ".join(names[:2])
    width = _width(thing)
    sort = "Stable Diffusion XL" if _large(thing) else _BY_WIDTH.get(width, "Stable Diffusion")
    return f"{sort} (text width {width})" if width else sort


def is_another(adapter: Adapter, pipe) -> bool:
    """Whether an adapter is surely for another sort of model than a pipeline is; False where that cannot be told."""
    theirs, ours = transformers_of(adapter), transformers_of(pipe)
    if theirs or ours:
        return not set(theirs) & set(ours) and bool(theirs or "unet" in adapter.layers)
    large, widths = _large(adapter), {_width(adapter), _width(pipe)} - {None}
    return (large is not None and large != _large(pipe)) or len(widths) == 2


def transformers_of(thing) -> tuple[str, ...]:
    """The models with a transformer in place of a UNet that an adapter may be for, or a pipeline is; none for a UNet's."""
    if isinstance(thing, Adapter):
        layers = [bare(stem) for (part, _), stem in thing.stems.items() if part == "transformer"]
        found = next(
            (names for pattern, names in _LAYERS if any(pattern.search(name) for name in layers)),
            (),
        )
        width = next(
            (
                layer.tensors["down"].shape[1]
                for module, layer in thing.layers.get("transformer", {}).items()
                if module.endswith("attn1.to_q") and layer.is_plain
            ),
            None,
        )
        told = (_INSIDE[width],) if _INSIDE.get(width) in found else found
        return told or ("a model with a transformer",) * ("transformer" in thing.layers)
    if "transformer" not in models_of(thing):
        return ()
    title = type(thing).__name__
    return (
        next(
            (name for start, name in _PIPELINES.items() if title.startswith(start)),
            title.split("Pipeline")[0],
        ),
    )


def _large(thing) -> bool | None:
    """Whether it is SDXL; None for an adapter that does not tell."""
    if isinstance(thing, Adapter):
        told = (
            any(_SMALL.match(name) for name in thing.layers.get("unet", ()))
            or text_width(thing) in _BY_WIDTH
        )
        return True if is_large(thing) else False if told else None
    unet = getattr(thing, "unet", None)
    asks = getattr(getattr(unet, "config", None), "addition_embed_type", None) == "text_time"
    return (
        asks
        or hasattr(thing, "text_encoder_2")
        or bool(unet and has_stacked_transformers(name for name, _ in walk(unet)))
    )


def _width(thing) -> int | None:
    if isinstance(thing, Adapter):
        return text_width(thing)
    return getattr(
        getattr(getattr(thing, "unet", None), "config", None), "cross_attention_dim", None
    )


_LONGEST, _SHORTEST = 400, 24  # letters of a sentence, and of a layer's name in it
# layers as diffusers and transformers name them; any other name is of a form that is not read
_USUAL = re.compile(
    r"(down_blocks|up_blocks)\.\d+\.(attentions|resnets|(down|up)samplers|motion_modules)\.\d+\..+"
    r"|mid_block\.(attentions|resnets)\.\d+\..+|(time|add)_embedding\.linear_\d|conv_(in|out)"
    r"|text_model\.encoder\.layers\.\d+\.(self_attn\.\w+_proj|mlp\.fc\d)|text_projection"
)


def misfit(pipe, adapter: Adapter, lost: Sequence[tuple[str, str]], where: str) -> str:
    """The sentence for an adapter some of whose layers a pipeline lacks.

    Args:
        lost: component and module of these layers.
        where: what to call the adapter.
    """
    models = models_of(pipe)
    absent = [part for part in adapter.layers if part not in models]
    rest = [part for part in adapter.layers if part in models]
    if (
        rest
        and {part for part, _ in lost} <= set(absent)
        and all(hasattr(pipe, part) for part in absent)
    ):
        cannot = any(part not in COMPONENTS for part in absent)
        return (
            f"{where} has layers for {' and '.join(absent)}, which this pipeline lacks"
            f"{' or adapters cannot be put on' * cannot}; load the rest of it with components={rest}"
        )
    total = sum(map(len, adapter.layers.values()))
    there = total - len(lost)
    count = (
        f"only {there} of its {total} layers are there"
        if there
        else f"none of its {total} layers is there"
    )
    names = [
        adapter.stems.get(place, ".".join(place))
        for place in (lost[0], lost[len(lost) // 2], lost[-1])
    ]
    cause = likely_cause(adapter, pipe, [module for _, module in lost], rest=rest)
    head = f" does not fit {type(pipe).__name__}: {count}, {'not ' * bool(there)}for example "
    return _short(where, head, list(dict.fromkeys(names)), f"; {cause}")


def likely_cause(
    adapter: Adapter, pipe, lost: Sequence[str] = (), rest: Sequence[str] = ("unet",)
) -> str:
    """The likeliest cause of a misfit, and its remedy.

    Args:
        lost: modules that the pipeline lacks; none where shapes differ.
        rest: the adapter's components that the pipeline has.
    """
    base = f" ({adapter.base_model:.40})" if adapter.base_model else ""
    if is_another(adapter, pipe):
        return f"it was made for {family(adapter)}{base}, this is {family(pipe)}; load it onto its own base model"
    if not rest:
        return f"this pipeline has no {' and no '.join(adapter.layers)}; load one that has"
    if all(_USUAL.fullmatch(module) for module in lost):
        return (
            f"both are {family(pipe)}, but this one is smaller or otherwise built; load it onto the model that it was "
            f"made for{base}"
        )
    return (
        f"it seems to be for {family(pipe)}, as this is, so its keys are of a form that is not read, perhaps a newer "
        "one; get it in diffusers' own form"
    )


def _short(where: str, head: str, names: list[str], tail: str) -> str:
    """The sentence with as many of the names, as they stand in the file, as it has room for, two at least."""
    for start in (where, Path(where).name[-60:]):
        for count in range(len(names), min(len(names), 2) - 1, -1):
            text = start + head + ", ".join(names[:count]) + tail
            if len(text) <= _LONGEST:
                return text
    room = max((_LONGEST - len(start + head + tail) - 2) // min(len(names), 2), _SHORTEST)
    return (
        start
        + head
        + ", ".join(name if len(name) <= room else f"{name[: room - 1]}…" for name in names[:2])
        + tail
    )
