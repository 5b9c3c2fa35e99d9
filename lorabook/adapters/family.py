"""What sort of model an adapter is for, or a pipeline is, as far as their layers tell."""
from lorabook.adapters.adapter import Adapter
from lorabook.adapters.layers import models_of, walk

_BY_WIDTH = {768: "Stable Diffusion 1.x", 1024: "Stable Diffusion 2.x"}


def family(thing) -> str:
    """The sort of model, with the width of the text it reads: "Stable Diffusion 1.x (text width 768)".

    Args:
        thing: an Adapter or a diffusers pipeline.
    """
    if isinstance(thing, Adapter):
        width, large = text_width(thing), is_large(thing)
    else:
        width = getattr(getattr(getattr(thing, "unet", None), "config", None), "cross_attention_dim", None)
        models = models_of(thing)
        large = "text_encoder_2" in models or _stacks(name for name, _ in walk(models.get("unet")))
    sort = "Stable Diffusion XL" if large else _BY_WIDTH.get(width, "Stable Diffusion")
    return f"{sort} (text width {width})" if width else sort


def is_large(adapter: Adapter) -> bool:
    """Whether an adapter is one for SDXL: it has a second text encoder, stacked transformers, or SDXL's text width."""
    return "text_encoder_2" in adapter.layers or _stacks(adapter.layers.get("unet", ())) or text_width(adapter) == 2048


def text_width(adapter: Adapter) -> int | None:
    """How many numbers stand for a word where the UNet reads it; None where no such layer is a plain one."""
    return next((layer.tensors["down"].shape[1] for module, layer in adapter.layers.get("unet", {}).items()
                 if module.endswith("attn2.to_k") and layer.is_plain), None)


def _stacks(names) -> bool:
    """Only SDXL has several transformers in one attention."""
    return any(".transformer_blocks.1." in name for name in names)
