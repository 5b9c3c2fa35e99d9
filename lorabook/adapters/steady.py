"""One limit of diffusers, worked around: a call's own scale must leave the scales as they were.

`cross_attention_kwargs={"scale": s}` multiplies each layer's scale by s and divides by s afterwards, which rounds; after
s = 0 it sets every scale to 1.0. Upstream: `unscale_lora_layers` in
https://github.com/huggingface/diffusers/blob/main/src/diffusers/utils/peft_utils.py
"""
from types import MethodType

from peft.tuners.tuners_utils import BaseTunerLayer

from lorabook.adapters.layers import BEFORE, Carrying


def keep_steady(layers: Carrying) -> None:
    """Let every layer, of `lora_layers`, remember its scales while a call multiplies them."""
    for found in layers.values():
        for layer in found.values():
            if "unscale_layer" not in layer.__dict__:
                layer.scale_layer = MethodType(_scale, layer)
                layer.unscale_layer = MethodType(_unscale, layer)
                layer.set_scale = MethodType(_set, layer)


def _scale(layer: BaseTunerLayer, scale: float) -> None:
    _restore(layer)  # a call that failed on its way may have left its scale
    before = layer.__dict__.setdefault(BEFORE, {})
    for name in layer.active_adapters:
        if name in layer.scaling:
            before[name] = layer.scaling[name]
            layer.scaling[name] = before[name] * scale


def _unscale(layer: BaseTunerLayer, scale: float | None = None) -> None:
    if layer.__dict__.get(BEFORE):
        _restore(layer)
    else:
        type(layer).unscale_layer(layer, scale)


def _set(layer: BaseTunerLayer, name: str, scale: float) -> None:
    """After a call at 0 diffusers sets each active adapter's scale to 1 instead of dividing: put back what was there."""
    before = layer.__dict__.get(BEFORE) or {}
    if name in before:
        layer.scaling[name] = before.pop(name)
    else:
        type(layer).set_scale(layer, name, scale)


def _restore(layer: BaseTunerLayer) -> None:
    before = layer.__dict__.get(BEFORE) or {}
    layer.scaling.update(before)
    before.clear()
