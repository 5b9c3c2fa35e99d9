"""How strongly each adapter takes part."""
import math
from collections.abc import Mapping
from contextlib import contextmanager
from numbers import Real

from lorabook.adapters.load import activate, active_adapters, adapter_names, layers_of, lora_layers


def set_scales(pipe, scales: Mapping[str, float]) -> dict[str, float]:
    """Scale adapters: 0 is the base model, 1 the adapter as trained, below 0 its opposite.

    A scale multiplies the adapter's ΔW in every layer. Adapters that are not named keep their scale and state; those
    that are named take part from now on, unless at 0.

    Args:
        pipe: a pipeline with adapters.
        scales: a number for each adapter's name.
    Returns: the scales that were set.
    Raises: ValueError for an adapter the pipeline does not have, or a scale that is not a finite number. Then nothing
        is changed.
    """
    known = adapter_names(pipe)
    for name, scale in scales.items():
        if name not in known:
            raise ValueError(f"the pipeline has no adapter {name!r}; it has: {', '.join(known) or 'none'}")
        if isinstance(scale, bool) or not isinstance(scale, Real) or not math.isfinite(scale):
            raise ValueError(f"the scale of {name!r} must be a finite number, not {scale!r}")
    taking_part = active_adapters(pipe)
    activate(pipe, [name for name in known if scales.get(name, name in taking_part)])  # at 0 there is nothing to compute
    for name, scale in scales.items():
        for layers in layers_of(pipe, name).values():
            for layer in layers.values():
                layer.set_scale(name, float(scale))
    return {name: float(scale) for name, scale in scales.items()}


@contextmanager
def kept_scales(pipe):
    """Put every adapter's scale and state back at the end of the block."""
    layers = [layer for part in lora_layers(pipe).values() for layer in part.values()]
    before, taking_part = [dict(layer.scaling) for layer in layers], active_adapters(pipe)
    try:
        yield
    finally:
        for layer, scaling in zip(layers, before, strict=True):
            layer.scaling.update(scaling)
        if layers:
            activate(pipe, taking_part)
