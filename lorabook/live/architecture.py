"""What sort of model an adapter is for, or a pipeline is, and why they do not fit."""

import re
from collections.abc import Sequence
from pathlib import Path

from diffusers import DiffusionPipeline

from lorabook.live.layers import models_of, walk
from lorabook.lora.adapter import Adapter
from lorabook.lora.formats.keys import COMPONENTS, bare
from lorabook.lora.shapes import has_stacked_transformers, is_large, text_width

_BY_TEXT_WIDTH = {768: "Stable Diffusion 1.x", 1024: "Stable Diffusion 2.x"}
# layers of Stable Diffusion 1 and 2 where SDXL has none
_NOT_SDXL = re.compile(r"down_blocks\.(0\.attentions|3)|up_blocks\.(2\.attentions|3)")
# Names of transformers' layers and the models that have them, the likeliest first; the first row
# that fits counts.
_BY_LAYER = {
    r"double_stream_blocks|single_stream_blocks": ("HiDream",),
    r"joint_transformer_blocks|(double|single)_layers": ("AuraFlow",),
    r"joint_blocks": ("Stable Diffusion 3",),
    r"distilled_guidance_layer": ("Chroma",),
    r"(double|single)_blocks\.\d+\.(img|txt)_attn_": ("HunyuanVideo",),
    r"(double|single)_blocks[._]\d|single_transformer_blocks": ("Flux", "Chroma", "HunyuanVideo"),
    r"(img|txt)_(mlp|mod)": ("Qwen-Image",),
    r"^blocks[._]\d+[._]": ("Wan", "Cosmos", "Mochi", "Hunyuan-DiT"),
    r"^(layers[._]\d+|(noise|context)_refiner[._]\d+)[._]attention": ("Z-Image", "Lumina 2"),
    r"^(layers[._]\d+|(noise|context)_refiner[._]\d+)[._]attn": ("Lumina 2",),
    r"add_[qkv]_proj|to_add_out|ff_context|^transformer_blocks[._]\d+[._]attn[._]": (
        *("Stable Diffusion 3", "Qwen-Image", "Flux", "HunyuanVideo", "Mochi"),
    ),
    r"^transformer_blocks[._]\d+[._]attn\d": ("LTX-Video", "PixArt", "Sana", "CogVideoX", "Mochi"),
    r"^transformer_blocks[._]\d+[._]": (
        *("LTX-Video", "PixArt", "Sana", "CogVideoX", "Mochi"),
        *("Stable Diffusion 3", "Qwen-Image", "Flux", "HunyuanVideo"),
    ),
}
_BY_ATTENTION_WIDTH = {1152: "PixArt", 2240: "Sana", 2048: "LTX-Video", 1920: "CogVideoX"}
# starts of pipelines' class names
_OWN_NAMES = (
    *("Flux", "Wan", "PixArt", "HunyuanVideo", "HiDream", "Sana", "AuraFlow", "Chroma"),
    *("CogVideoX", "Mochi", "Cosmos"),
)
_BY_PIPELINE = {
    "StableDiffusion3": "Stable Diffusion 3",
    "LTX": "LTX-Video",
    "ZImage": "Z-Image",
    "QwenImage": "Qwen-Image",
    "HunyuanDiT": "Hunyuan-DiT",
    "Lumina2": "Lumina 2",
    **{name: name for name in _OWN_NAMES},
}
# layers as diffusers and transformers name them; other names are of a form that is not read
_KNOWN_NAMES = re.compile(
    r"(down_blocks|up_blocks)\.\d+\.(attentions|resnets|(down|up)samplers|motion_modules)\.\d+\..+"
    r"|mid_block\.(attentions|resnets)\.\d+\..+|(time|add)_embedding\.linear_\d|conv_(in|out)"
    r"|text_model\.encoder\.layers\.\d+\.(self_attn\.\w+_proj|mlp\.fc\d)|text_projection"
)
_LONGEST, _SHORTEST = 400, 24  # characters of a sentence, and of a layer's name in it


def family(model: Adapter | DiffusionPipeline) -> str:
    """The sort of model, with the width of its text: "Stable Diffusion 1.x (text width 768)"."""
    if names := _transformers_of(model):
        return " or ".join(names[:2])
    width = _text_width(model)
    name = "Stable Diffusion XL" if _is_sdxl(model) else _BY_TEXT_WIDTH.get(width)
    name = name or "Stable Diffusion"
    return f"{name} (text width {width})" if width else name


def misfit(
    pipe: DiffusionPipeline, adapter: Adapter, missing: Sequence[tuple[str, str]], where: str
) -> str:
    """Why an adapter does not fit a pipeline that lacks some of its layers: one sentence.

    Args:
        missing: component and module of these layers.
        where: what to call the adapter.
    """
    models = models_of(pipe)
    absent = [component for component in adapter.layers if component not in models]
    rest = [component for component in adapter.layers if component in models]
    only_absent = {component for component, _ in missing} <= set(absent)
    if rest and only_absent and all(hasattr(pipe, component) for component in absent):
        cannot = any(component not in COMPONENTS for component in absent)
        return (
            f"{where} has layers for {' and '.join(absent)}, which this pipeline lacks"
            f"{' or adapters cannot be put on' * cannot}; load the rest of it with "
            f"components={rest}"
        )
    total = sum(map(len, adapter.layers.values()))
    there = total - len(missing)
    count = f"none of its {total} layers is there, for example "
    if there:
        count = f"only {there} of its {total} layers are there, not for example "
    examples = (missing[0], missing[len(missing) // 2], missing[-1])
    names = [adapter.stems.get(place, ".".join(place)) for place in examples]
    cause = likely_cause(adapter, pipe, [module for _, module in missing], components=rest)
    head = f" does not fit {type(pipe).__name__}: {count}"
    return _fitting(where, head, list(dict.fromkeys(names)), f"; {cause}")


def likely_cause(
    adapter: Adapter,
    pipe: DiffusionPipeline,
    missing: Sequence[str] = (),
    components: Sequence[str] = ("unet",),
) -> str:
    """The likeliest cause of a misfit, and its remedy.

    Args:
        missing: modules that the pipeline lacks; none where shapes differ.
        components: the adapter's components that the pipeline has.
    """
    base = f" ({adapter.base_model:.40})" if adapter.base_model else ""
    if _is_another(adapter, pipe):
        return (
            f"it was made for {family(adapter)}{base}, this is {family(pipe)}; load it onto its "
            "own base model"
        )
    if not components:
        return f"this pipeline has no {' and no '.join(adapter.layers)}; load one that has"
    if all(_KNOWN_NAMES.fullmatch(module) for module in missing):
        return (
            f"both are {family(pipe)}, but this one is smaller or otherwise built; load it onto "
            f"the model that it was made for{base}"
        )
    return (
        f"it seems to be for {family(pipe)}, as this is, so its keys are of a form that is not "
        "read, perhaps a newer one; get it in diffusers' own form"
    )


def _is_another(adapter: Adapter, pipe: DiffusionPipeline) -> bool:
    """Whether an adapter is surely for another sort of model than a pipeline is."""
    theirs, ours = _transformers_of(adapter), _transformers_of(pipe)
    if theirs or ours:
        return not set(theirs) & set(ours) and bool(theirs or "unet" in adapter.layers)
    widths = {_text_width(adapter), _text_width(pipe)} - {None}
    is_sdxl = _is_sdxl(adapter)
    return len(widths) == 2 or (is_sdxl is not None and is_sdxl != _is_sdxl(pipe))


def _transformers_of(model: Adapter | DiffusionPipeline) -> tuple[str, ...]:
    """The models with a transformer that an adapter may be for, or a pipeline is."""
    if isinstance(model, Adapter):
        stems = [bare(stem) for (part, _), stem in model.stems.items() if part == "transformer"]
        names: tuple[str, ...] = ()
        for pattern, models in _BY_LAYER.items():
            if any(re.search(pattern, stem) for stem in stems):
                names = models
                break
        layers = model.layers.get("transformer", {})
        for module, layer in layers.items():
            if module.endswith("attn1.to_q") and layer.is_plain:
                name = _BY_ATTENTION_WIDTH.get(layer.tensors["down"].shape[1])
                names = (name,) if name in names else names
                break
        unknown = ("a model with a transformer",) if "transformer" in model.layers else ()
        return names or unknown
    if "transformer" not in models_of(model):
        return ()
    title = type(model).__name__
    names = [name for start, name in _BY_PIPELINE.items() if title.startswith(start)]
    return (*names, title.split("Pipeline")[0])[:1]


def _is_sdxl(model: Adapter | DiffusionPipeline) -> bool | None:
    """Whether it is SDXL; None for an adapter whose layers do not tell."""
    if isinstance(model, Adapter):
        modules = model.layers.get("unet", ())
        is_older = any(_NOT_SDXL.match(module) for module in modules)
        if is_large(model):
            return True
        return False if is_older or text_width(model) in _BY_TEXT_WIDTH else None
    unet = getattr(model, "unet", None)
    if unet is None:
        return hasattr(model, "text_encoder_2")
    return (
        getattr(getattr(unet, "config", None), "addition_embed_type", None) == "text_time"
        or hasattr(model, "text_encoder_2")
        or has_stacked_transformers(name for name, _ in walk(unet))
    )


def _text_width(model: Adapter | DiffusionPipeline) -> int | None:
    if isinstance(model, Adapter):
        return text_width(model)
    config = getattr(getattr(model, "unet", None), "config", None)
    return getattr(config, "cross_attention_dim", None)


def _fitting(where: str, head: str, names: list[str], tail: str) -> str:
    """The sentence with as many names as it has room for, two at least, cut where it must be."""
    for start in (where, Path(where).name[-60:]):
        for count in range(len(names), min(len(names), 2) - 1, -1):
            text = start + head + ", ".join(names[:count]) + tail
            if len(text) <= _LONGEST:
                return text
    room = max((_LONGEST - len(start + head + tail) - 2) // min(len(names), 2), _SHORTEST)
    cut = [name if len(name) <= room else f"{name[: room - 1]}…" for name in names[:2]]
    return start + head + ", ".join(cut) + tail
