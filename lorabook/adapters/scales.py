"""How strongly each adapter takes part: in all, by component, block, kind and layer, and over the denoising."""
from collections.abc import Mapping, Sequence
from contextlib import contextmanager

from peft.tuners.tuners_utils import BaseTunerLayer

from lorabook.adapters.block_weights import from_block_weights
from lorabook.adapters.expand import expand, number, steps_of
from lorabook.adapters.layers import (
    Carrying,
    activate,
    active_adapters,
    adapter_names,
    check_known,
    components,
    factor_of,
    lora_layers,
    put_factor,
    walk,
)
from lorabook.adapters.originals import fused_names
from lorabook.adapters.presets import preset
from lorabook.adapters.scale_table import ScaleTable
from lorabook.adapters.schedule import set_steps, steps_on
from lorabook.adapters.steady import keep_steady
from lorabook.adapters.undora import make_scalable


def set_scales(pipe, scales: Mapping[str, object], *, only: bool = False) -> ScaleTable:
    """Scale adapters: 0 is the base model, 1 the adapter as trained, below 0 its opposite.

    A scale multiplies the adapter's ΔW, whatever its kind. Every layer obeys; what the scales do not say is 1. Adapters
    that are not named keep their scale and state; those that are named take part from now on, unless all is at 0.

    Args:
        pipe: a pipeline with adapters.
        scales: for each adapter's name a number; a dictionary as in diffusers, and finer (see `expand`), with
            "steps": [[0, 0.4, 1.0], [0.4, 1, 0.3]] for shares of the denoising; a preset's name (see `PRESETS`); or the
            17, 12, 20 or 26 numbers of the A1111 block-weight extension.
        only: switch the adapters off that are not named.
    Returns: a ScaleTable with the number of each layer, which shows itself.
    Raises: ValueError for an adapter, component, block or layer that is not there, a scale that is not a finite number,
        or an adapter that is fused. Then nothing is changed.
    """
    if locked := [name for name in scales if name in fused_names(components(pipe))]:
        raise ValueError(f"adapter {locked[0]!r} is fused, so its scale cannot move; call unfuse(pipe, {locked[0]!r}) first")
    make_scalable(pipe, scales)
    modules = {part: dict(walk(model)) for part, model in components(pipe).items()}
    layers = {part: {name: layer for name, layer in found.items() if isinstance(layer, BaseTunerLayer)}
              for part, found in modules.items()}
    check_known(pipe, scales, layers)
    said = {name: plain_scales(pipe, value, name) for name, value in scales.items()}
    factors = {name: expand(value, modules, name, _touched(layers, name)) for name, value in said.items()}
    steps = {name: steps_of(value, name) for name, value in said.items()}
    keep_steady(layers)
    for name, parts in factors.items():
        for part, found in parts.items():
            for module, factor in found.items():
                put_factor(layers[part][module], name, factor)
    set_steps(pipe, steps)
    before = active_adapters(pipe, layers)
    working = {name: any(factor for part in parts.values() for factor in part.values()) for name, parts in factors.items()}
    activate(pipe, [name for name in adapter_names(pipe, layers)
                    if working.get(name, name in before and not only)], layers)  # at 0 there is nothing to compute
    return ScaleTable(factors, {name: shares for name, shares in steps.items() if shares})


def scales_of(pipe) -> ScaleTable:
    """The scales that a pipeline's adapters have now, layer by layer; 0 throughout for those that are switched off."""
    active = set(active_adapters(pipe))
    table: dict[str, dict[str, dict[str, float]]] = {name: {} for name in adapter_names(pipe)}
    for part, layers in lora_layers(pipe).items():
        for module, layer in layers.items():
            for name in layer.scaling:
                table[name].setdefault(part, {})[module] = factor_of(layer, name) if name in active else 0.0
    return ScaleTable(table, steps_on(pipe))


def plain_scales(pipe, value, name: str):
    """A number or a dictionary for what was said: presets and block-weight vectors are looked up."""
    family = "sdxl" if "text_encoder_2" in components(pipe) else "sd"
    if isinstance(value, str):
        try:
            return preset(value, family)
        except ValueError as error:
            raise ValueError(f"the scale of {name!r} must be a finite number, scales or a preset's name; {error}") from None
    if isinstance(value, Sequence):
        return from_block_weights([number(entry, name) for entry in value], family=family)
    return value


def factors_for(pipe, name: str, scales) -> dict[str, dict[str, float]]:
    """One number for each layer that an adapter touches, by component and module."""
    modules = {part: dict(walk(model)) for part, model in components(pipe).items()}
    return expand(scales, modules, name, _touched(lora_layers(pipe), name))


def _touched(layers: Carrying, name: str) -> dict[str, list[str]]:
    return {part: touched for part, found in layers.items()
            if (touched := [module for module, layer in found.items() if name in layer.scaling])}


@contextmanager
def kept_scales(pipe):
    """Put every adapter's scale and state back at the end of the block."""
    layers = [layer for part in lora_layers(pipe).values() for layer in part.values()]
    before, taking_part, steps = [dict(layer.scaling) for layer in layers], active_adapters(pipe), steps_on(pipe)
    try:
        yield
    finally:
        for layer, scaling in zip(layers, before, strict=True):
            layer.scaling.update({name: value for name, value in scaling.items() if name in layer.scaling})
        set_steps(pipe, dict.fromkeys(steps_on(pipe), ()) | steps)
        if layers:
            activate(pipe, [name for name in taking_part if name in adapter_names(pipe)])
