"""Narrow LoRA layers on a CPU, computed by one product instead of three.

PEFT computes W x + s B (A x): five passes over activations forward, and more backward. On a CPU
and in a narrow layer (W + s B A) x costs less: one pass, and the sum of two small matrices. Both
are the same up to rounding.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

NARROW = 256  # wider than this, the gradient of a whole weight costs more than PEFT's passes


@contextmanager
def merged_products(models: Iterable[nn.Module]) -> Iterator[None]:
    """Compute the narrow LoRA layers of models on a CPU by one product inside the block."""
    layers = [layer for model in models for layer in model.modules() if _is_narrow(layer)]
    for layer in layers:
        layer.forward = partial(_forward, layer)
    try:
        yield
    finally:
        for layer in layers:
            del layer.forward


def _is_narrow(layer: nn.Module) -> bool:
    """Whether it is a plain LoRA on one narrow layer in float32 on the CPU: no dropout, no DoRA."""
    base = getattr(layer, "base_layer", None)
    if type(base) not in (nn.Linear, nn.Conv2d) or len(layer.active_adapters) != 1:
        return False
    name, weight = layer.active_adapters[0], base.weight
    return (
        isinstance(layer.lora_dropout[name], nn.Identity)
        and name not in layer.lora_variant
        and weight.device.type == "cpu"
        and weight.dtype == torch.float32
        and min(weight.shape[:2]) <= NARROW
        and getattr(base, "groups", 1) == 1
    )


def _forward(layer: nn.Module, x: Tensor, *args, **kwargs) -> Tensor:
    name, base = layer.active_adapters[0], layer.base_layer
    down, up = (half[name].weight.flatten(1) for half in (layer.lora_A, layer.lora_B))
    total = torch.addmm(base.weight.flatten(1), up, down, alpha=layer.scaling[name])
    weight = total.view_as(base.weight)
    if isinstance(base, nn.Linear):
        return F.linear(x, weight, base.bias)
    return F.conv2d(x, weight, base.bias, base.stride, base.padding, base.dilation)
