"""One limit of PEFT, worked around: DoRA's scale must multiply its whole ΔW.

PEFT puts the scale inside the norm, and leaves the learned magnitude at work at scale 0, so that 0 is not the base model.
Such an adapter, loaded or trained by other code, is put on again as the LoRA that has its ΔW. Upstream: `DoraLinearVariant`
in https://github.com/huggingface/peft/blob/main/src/peft/tuners/lora/variants.py
"""
from collections.abc import Iterable

from lorabook.adapters.attach import adapter_of, fit, put_on, take_off
from lorabook.adapters.layers import activate, active_adapters, layers_of


def make_scalable(pipe, names: Iterable[str]) -> None:
    """Let a scale multiply ΔW for each of these adapters, whatever its kind."""
    for name in names:
        if any(layer.use_dora.get(name) for part in layers_of(pipe, name).values() for layer in part.values()):
            active, adapter = active_adapters(pipe), adapter_of(pipe, name)
            ready = fit(pipe, adapter, f"adapter {name!r}")
            take_off(pipe, name)
            put_on(pipe, name, ready, adapter)
            activate(pipe, active)
