"""LoRA layers computed by one product instead of three, where that is faster: narrow layers on a CPU.

PEFT computes W x + s B (A x), five passes over activations forward and more backward. On a CPU, and where a layer is
narrow, (W + s B A) x costs less: one pass, and a sum of two small matrices. Both are the same up to rounding.
"""

from collections.abc import Iterable
from contextlib import contextmanager
from types import MethodType

import torch
import torch.nn.functional as F
from peft.tuners.lora.layer import Conv2d, Linear
from torch import Tensor, nn

NARROW = 256  # wider than this, the gradient of a whole weight costs more than PEFT's passes


@contextmanager
def merged_products(models: Iterable[nn.Module]):
    """Compute the narrow LoRA layers of models on a CPU by one product inside the block."""
    layers = [layer for model in models for layer in model.modules() if _fits(layer)]
    for layer in layers:
        layer.forward = MethodType(_linear if isinstance(layer, Linear) else _convolution, layer)
    try:
        yield
    finally:
        for layer in layers:
            del layer.forward


def _fits(layer: nn.Module) -> bool:
    """Whether it is a plain LoRA on one narrow layer in float32 on the CPU: no dropout, no DoRA."""
    if type(layer) not in (Linear, Conv2d) or len(layer.active_adapters) != 1:
        return False
    name, weight = layer.active_adapter[0], layer.base_layer.weight
    plain = (
        isinstance(layer.lora_dropout[name], nn.Identity)
        and name not in layer.lora_magnitude_vector
    )
    return (
        plain
        and weight.device.type == "cpu"
        and weight.dtype == torch.float32
        and min(weight.shape[:2]) <= NARROW
        and getattr(layer.base_layer, "groups", 1) == 1
    )


def _weight(layer) -> Tensor:
    """W + s B A, in the shape of W."""
    name, weight = layer.active_adapter[0], layer.base_layer.weight
    down, up = (part[name].weight.flatten(1) for part in (layer.lora_A, layer.lora_B))
    return torch.addmm(weight.flatten(1), up, down, alpha=layer.scaling[name]).view_as(weight)


def _linear(self, x: Tensor, *args, **kwargs) -> Tensor:
    return F.linear(x, _weight(self), self.base_layer.bias)


def _convolution(self, x: Tensor, *args, **kwargs) -> Tensor:
    base = self.base_layer
    return F.conv2d(x, _weight(self), base.bias, base.stride, base.padding, base.dilation)
