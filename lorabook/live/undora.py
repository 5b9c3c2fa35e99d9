"""One limit of PEFT, worked around: DoRA's scale must multiply its whole ΔW.

PEFT puts the scale inside the norm, and leaves the learned magnitude at work at scale 0, so that 0 is not the base model.
Such an adapter, loaded or trained by other code, is put on again as the LoRA that has its ΔW. Upstream: `DoraLinearVariant`
in https://github.com/huggingface/peft/blob/main/src/peft/tuners/lora/variants.py
"""

from collections.abc import Iterable

from lorabook.live.inject import adapter_of, put_on, remember_source, source_of, take_off
from lorabook.live.layers import (
    activate,
    active_adapters,
    adapter_names,
    factor_of,
    layers_of,
    put_factor,
    put_in_order,
)
from lorabook.live.match import fit


def make_scalable(pipe, names: Iterable[str]) -> None:
    """Let a scale multiply ΔW for each of these adapters, whatever its kind; scales, states and order stay."""
    for name in names:
        parts = layers_of(pipe, name)
        if any(layer.use_dora.get(name) for layers in parts.values() for layer in layers.values()):
            factors = {
                part: {module: factor_of(layer, name) for module, layer in layers.items()}
                for part, layers in parts.items()
            }
            active, order, adapter = (
                active_adapters(pipe),
                adapter_names(pipe),
                adapter_of(pipe, name),
            )
            came_from = source_of(pipe, name)
            ready = fit(pipe, adapter, f"adapter {name!r}")
            take_off(pipe, name)
            put_on(pipe, name, ready, adapter)
            remember_source(pipe, name, came_from)
            for part, layers in layers_of(pipe, name).items():
                for module, layer in layers.items():
                    put_factor(layer, name, factors[part][module])
            put_in_order(pipe, order)
            activate(pipe, active)
