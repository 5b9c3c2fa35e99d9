"""Another adapter's weights written into the layers that are there, so that a compiled model need not compile again."""

from collections.abc import Mapping

import torch

from lorabook.live.inject import describe
from lorabook.live.layers import factor_of, layers_of, models_of, put_factor
from lorabook.live.match import Ready, padded
from lorabook.lora.adapter import Adapter


def can_swap(pipe, name: str, ready: Mapping[str, Mapping[str, Ready]]) -> str | None:
    """Why weights cannot be written into an adapter's layers, or None where they can.

    Args:
        ready: the new adapter's weights, from `fit`.
    """
    there = layers_of(pipe, name)
    if any(layer.use_dora.get(name) for layers in there.values() for layer in layers.values()):
        return "takes the place of a DoRA"
    extra = [
        f"{part}.{module}"
        for part, layers in ready.items()
        for module in layers
        if module not in there.get(part, {})
    ]
    if extra:
        return f"has {len(extra)} layers that the one in its place lacks, for example {extra[0]}"
    for part, layers in ready.items():
        for module, made in layers.items():
            room = there[part][module].lora_A[name].weight.shape[0]
            if made.rank > room:
                return f"has rank {made.rank} where there is room for {room}"
    return None


@torch.no_grad()
def swap_in(pipe, name: str, ready: Mapping[str, Mapping[str, Ready]], adapter: Adapter) -> None:
    """Write the weights in place; layers that the new adapter lacks are zeroed. Scales stay as they are."""
    for part, layers in layers_of(pipe, name).items():
        made_here = ready.get(part, {})
        for module, layer in layers.items():
            factor = factor_of(layer, name)
            down, up = layer.lora_A[name].weight, layer.lora_B[name].weight
            if module not in made_here:
                up.zero_()
                continue
            made = padded(made_here[module], down.shape[0])
            layer.use_rslora[name] = False
            down.copy_(made.down)
            up.copy_(made.up)
            layer.r[name] = made.rank
            layer.lora_alpha[name] = made.alpha
            put_factor(layer, name, factor)
        config = models_of(pipe)[part].peft_config[name]
        if made_here:
            describe(config, made_here, adapter.only([part]))
        else:
            config.origin = adapter.only([])
