"""One limit of diffusers, worked around: a call's own scale must leave the scales as they were.

`cross_attention_kwargs={"scale": s}` multiplies each layer's scale by s and divides by s afterwards, which rounds; after
s = 0 it sets every scale to 1.0. Upstream: `unscale_lora_layers` in
https://github.com/huggingface/diffusers/blob/main/src/diffusers/utils/peft_utils.py
"""

from functools import partial

import torch
from peft.tuners.lora import LoraLayer

from lorabook.live.layers import BEFORE, Carrying


def keep_steady(layers: Carrying) -> None:
    """Let every layer, of `lora_layers`, remember its scales while a call multiplies them."""
    for found in layers.values():
        for layer in found.values():
            if "unscale_layer" not in layer.__dict__:
                # partials of functions with a name, so that the model can be copied and pickled
                layer.scale_layer = partial(_scale, layer)
                layer.unscale_layer = partial(_unscale, layer)
                layer.set_scale = partial(_set, layer)
            _restore(layer)  # a call that was interrupted may have left its scale


def _scale(layer: LoraLayer, scale: float) -> None:
    _restore(layer)
    before = layer.__dict__.setdefault(BEFORE, {})
    for name in layer.active_adapters:
        if name in layer.scaling:
            before[name] = layer.scaling[name]
            layer.scaling[name] = before[name] * scale


def _unscale(layer: LoraLayer, scale: float | None = None) -> None:
    if layer.__dict__.get(BEFORE):
        _restore(layer)
    else:
        type(layer).unscale_layer(layer, scale)


def _set(layer: LoraLayer, name: str, scale: float) -> None:
    """After a call at 0 diffusers sets each active adapter's scale to 1 instead of dividing: put back what was there."""
    before = layer.__dict__.get(BEFORE) or {}
    value = before.pop(name, None)
    if value is not None and scale == 1 and not torch.as_tensor(layer.scaling[name]).any():
        layer.scaling[name] = value
    else:
        type(layer).set_scale(layer, name, scale)


def _restore(layer: LoraLayer) -> None:
    before = layer.__dict__.get(BEFORE) or {}
    layer.scaling.update({name: value for name, value in before.items() if name in layer.lora_A})
    before.clear()
