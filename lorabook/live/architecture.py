"""What sort of model an adapter is for, or a pipeline is, and why they do not fit."""

import re
from collections.abc import Sequence

from diffusers import DiffusionPipeline

from lorabook.live.layers import models_of
from lorabook.lora.adapter import Adapter
from lorabook.lora.files import brief
from lorabook.lora.formats.keys import bare
from lorabook.lora.shapes import is_large, text_width

_LONGEST = 400  # characters of a sentence
_BY_TEXT_WIDTH = {768: "Stable Diffusion 1.x", 1024: "Stable Diffusion 2.x"}
# layers of Stable Diffusion 1 and 2 where SDXL has none
_NOT_SDXL = re.compile(r"down_blocks\.(0\.attentions|3)|up_blocks\.(2\.attentions|3)")
# Names of transformers' layers and the models that have them, the likeliest first; the first row
# that fits counts.
_BY_LAYER = {
    r"double_stream_blocks|single_stream_blocks": "HiDream",
    r"joint_transformer_blocks|(double|single)_layers": "AuraFlow",
    r"joint_blocks": "Stable Diffusion 3",
    r"distilled_guidance_layer": "Chroma",
    r"(double|single)_blocks\.\d+\.(img|txt)_attn_": "HunyuanVideo",
    r"(double|single)_blocks[._]\d|single_transformer_blocks": "Flux, Chroma, HunyuanVideo",
    r"(img|txt)_(mlp|mod)": "Qwen-Image",
    r"^blocks[._]\d+[._]": "Wan, Cosmos, Mochi, Hunyuan-DiT",
    r"^(layers|(noise|context)_refiner)[._]\d+[._]attention": "Z-Image, Lumina 2",
    r"^(layers|(noise|context)_refiner)[._]\d+[._]attn": "Lumina 2",
    r"add_[qkv]_proj|to_add_out|ff_context|^transformer_blocks[._]\d+[._]attn[._]": (
        "Stable Diffusion 3, Qwen-Image, Flux, HunyuanVideo, Mochi"
    ),
    r"^transformer_blocks[._]\d+[._]attn\d": "LTX-Video, PixArt, Sana, CogVideoX, Mochi",
    r"^transformer_blocks[._]\d+[._]": (
        "LTX-Video, PixArt, Sana, CogVideoX, Mochi, Stable Diffusion 3, Qwen-Image, Flux, "
        "HunyuanVideo"
    ),
}
_BY_ATTENTION_WIDTH = {1152: "PixArt", 2240: "Sana", 2048: "LTX-Video", 1920: "CogVideoX"}
# by what their pipelines' classes begin with: "StableDiffusion3", "LTX"
_BY_PIPELINE = {
    re.sub(r"-Video|\W", "", name): name
    for names in _BY_LAYER.values()
    for name in names.split(", ")
}
# layers as diffusers and transformers name them; other names are of a form that is not read
_KNOWN_NAMES = re.compile(
    r"(down_blocks|up_blocks)\.\d+\.(attentions|resnets|(down|up)samplers|motion_modules)\.\d+\..+"
    r"|mid_block\.(attentions|resnets)\.\d+\..+|(time|add)_embedding\.linear_\d|conv_(in|out)"
    r"|text_model\.encoder\.layers\.\d+\.(self_attn\.\w+_proj|mlp\.fc\d)|text_projection"
)


def family(model: Adapter | DiffusionPipeline) -> str:
    """The sort of model, with the width of its text: "Stable Diffusion 1.x (text width 768)"."""
    if names := _transformers_of(model):
        return " or ".join(names[:2])
    width = _text_width(model)
    older = _BY_TEXT_WIDTH.get(width, "Stable Diffusion")
    name = "Stable Diffusion XL" if _is_sdxl(model) else older
    return f"{name} (text width {width})" if width else name


def misfit(
    pipe: DiffusionPipeline, adapter: Adapter, missing: Sequence[tuple[str, str]], where: str
) -> str:
    """Why an adapter does not fit a pipeline that lacks some of its layers: one sentence.

    `missing` are component and module of these layers, `where` is what to call the adapter.
    """
    models = models_of(pipe)
    absent = [component for component in adapter.layers if component not in models]
    rest = [component for component in adapter.layers if component in models]
    only_absent = {component for component, _ in missing} <= set(absent)
    if rest and only_absent and all(hasattr(pipe, component) for component in absent):
        return (
            f"{where} has layers for {' and '.join(absent)}, which this pipeline lacks or takes no "
            f"adapters on; load the rest of it with components={rest}"
        )
    total = len(adapter.flat)
    there = total - len(missing)
    count = f"only {there} of its {total} layers are there, not for example"
    if not there:
        count = f"none of its {total} layers is there, for example"
    cause = likely_cause(adapter, pipe, [module for _, module in missing], components=rest)
    head = f"{brief(where, 60)} does not fit {type(pipe).__name__}: {count} "
    names = [adapter.stems.get(place, ".".join(place)) for place in (missing[0], missing[-1])]
    room = max((_LONGEST - len(f"{head}, ; {cause}")) // 2, 24)  # of a long name its end
    return f"{head}{', '.join(brief(name, room) for name in dict.fromkeys(names))}; {cause}"


def likely_cause(
    adapter: Adapter,
    pipe: DiffusionPipeline,
    missing: Sequence[str] = (),
    components: Sequence[str] = ("unet",),
) -> str:
    """The likeliest cause of a misfit, and its remedy.

    `missing` are modules that the pipeline lacks (none where shapes differ), `components` those of
    the adapter that the pipeline has.
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


def _transformers_of(model: Adapter | DiffusionPipeline) -> list[str]:
    """The models with a transformer that an adapter may be for, or a pipeline is."""
    if not isinstance(model, Adapter):
        title = type(model).__name__
        names = [name for start, name in _BY_PIPELINE.items() if title.startswith(start)]
        has_transformer = "transformer" in models_of(model)
        return [*names, title.split("Pipeline")[0]][:1] if has_transformer else []
    layers = model.layers.get("transformer", {})
    if not layers:
        return []
    stems = [bare(model.stems.get(("transformer", module), module)) for module in layers]
    fitting = (
        models
        for pattern, models in _BY_LAYER.items()
        if any(re.search(pattern, stem) for stem in stems)
    )
    names = next(fitting, "a model with a transformer").split(", ")
    for module, layer in layers.items():
        if module.endswith("attn1.to_q") and layer.is_plain:
            name = _BY_ATTENTION_WIDTH.get(layer.tensors["down"].shape[1])
            return [name] if name in names else names
    return names


def _is_sdxl(model: Adapter | DiffusionPipeline) -> bool | None:
    """Whether it is SDXL; None for an adapter whose layers do not tell."""
    if isinstance(model, Adapter):
        is_older = any(_NOT_SDXL.match(module) for module in model.layers.get("unet", ()))
        is_older = is_older or text_width(model) in _BY_TEXT_WIDTH
        return True if is_large(model) else False if is_older else None
    config = getattr(getattr(model, "unet", None), "config", None)
    has_second = hasattr(model, "text_encoder_2")
    return has_second or getattr(config, "addition_embed_type", None) == "text_time"


def _text_width(model: Adapter | DiffusionPipeline) -> int | None:
    if isinstance(model, Adapter):
        return text_width(model)
    config = getattr(getattr(model, "unet", None), "config", None)
    return getattr(config, "cross_attention_dim", None)
