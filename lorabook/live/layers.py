"""The adapters on a pipeline as PEFT keeps them: which layers carry which, and which of them take part."""

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence

import torch
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from lorabook.live.originals import fused_names
from lorabook.lora.formats.keys import COMPONENTS

BEFORE = "_scales_before"  # on a layer: its scales while a call multiplies them, see steady.py


Carrying = Mapping[str, Mapping[str, BaseTunerLayer]]


def models_of(pipe) -> dict[str, nn.Module]:
    """The models of a pipeline that can carry adapters, those beneath a `torch.compile` too."""
    found = {part: getattr(pipe, part, None) for part in COMPONENTS}
    return {
        part: getattr(model, "_orig_mod", model)
        for part, model in found.items()
        if model is not None
    }


def walk(model: nn.Module, inside: str = "") -> Iterator[tuple[str, nn.Module]]:
    """The layers of a model that hold a weight or an adapter, by name; adapters' own modules are passed over.

    As `named_modules`, but without a generator for each level, which takes ten times as long.
    """
    waiting = [(inside, model)]
    while waiting:
        name, module = waiting.pop()
        if isinstance(module, (BaseTunerLayer, nn.Linear, nn.Conv2d)):
            yield name, module
            continue
        waiting.extend(
            (f"{name}.{child}" if name else child, part)
            for child, part in reversed(module._modules.items())
            if part is not None
        )


def lora_layers(pipe) -> dict[str, dict[str, BaseTunerLayer]]:
    """All layers of a pipeline that carry LoRA adapters, by component and module name."""
    return {
        part: {name: layer for name, layer in walk(model) if isinstance(layer, LoraLayer)}
        for part, model in models_of(pipe).items()
    }


def layers_of(pipe, name: str) -> dict[str, dict[str, BaseTunerLayer]]:
    """The layers that one adapter touches, by component and module name."""
    return {
        part: touched
        for part, layers in lora_layers(pipe).items()
        if (touched := {module: layer for module, layer in layers.items() if name in layer.scaling})
    }


def adapter_names(pipe, layers: Carrying | None = None) -> list[str]:
    """The adapters on a pipeline, in the order they came; `layers` spares looking for its `lora_layers`."""
    return list(dict.fromkeys(name for layer in _flat(pipe, layers) for name in layer.scaling))


def check_known(pipe, names: Iterable[str], layers: Carrying | None = None) -> None:
    """Raise ValueError for an adapter that the pipeline does not have, or that is fused; `layers` as in `adapter_names`."""
    known, fused = adapter_names(pipe, layers), fused_names(models_of(pipe))
    for name in names:
        if name in fused:
            raise ValueError(
                f"adapter {name!r} is fused, so it stays as it is; call unfuse(pipe, {name!r}) first"
            )
        if name not in known:
            raise ValueError(f"the pipeline has no adapter {name!r:.80}; it has: {listed(known)}")
    if any(layer.merged for layer in _flat(pipe, layers)):
        raise ValueError("adapters were fused by diffusers itself; call pipe.unfuse_lora() first")


def listed(names: Iterable[str]) -> str:
    """Names for an error message: the first eight, "none" where there are none."""
    names = [f"{name:.60}" for name in names]
    return ", ".join(names[:8]) + f" and {len(names) - 8} more" * (len(names) > 8) or "none"


def active_adapters(pipe, layers: Carrying | None = None) -> list[str]:
    """The adapters that take part, in the order they came; `layers` as in `adapter_names`."""
    layers = lora_layers(pipe) if layers is None else layers
    active = {
        name
        for layer in _flat(pipe, layers)
        if not layer.disable_adapters
        for name in layer.active_adapters
    }
    return [name for name in adapter_names(pipe, layers) if name in active]


def activate(pipe, names: list[str], layers: Carrying | None = None) -> None:
    """Let exactly these adapters take part; their scales stay as they are and nothing becomes trainable.

    One that waits on another device (`move_adapter`) comes back to its model.

    Args:
        layers: as in `adapter_names`.
    """
    for layer in _flat(pipe, layers):
        if layer.disable_adapters:
            layer.enable_adapters(True)
        if list(layer.active_adapters) != names:
            for name in names:
                if name in layer.lora_A and home_of(layer) not in (
                    layer.lora_A[name].weight.device,
                    torch.device("meta"),
                ):
                    move(layer, name, home_of(layer))
            layer.set_adapter(names, inference_mode=True)


def put_in_order(pipe, names: Sequence[str]) -> None:
    """Let these adapters come first, in this order: sums of several differ in their last bits by it."""
    places = {name: place for place, name in enumerate(names)}
    for layer in _flat(pipe, None):
        layer.scaling = dict(
            sorted(layer.scaling.items(), key=lambda item: places.get(item[0], len(places)))
        )
    activate(pipe, active_adapters(pipe))


def factor_of(layer: BaseTunerLayer, name: str) -> float:
    """The scale that multiplies an adapter's ΔW in a layer; 1 as it was trained."""
    present = layer.__dict__.get(BEFORE, {}).get(name, layer.scaling[name])
    present = (
        float(present.float().mean()) if isinstance(present, Tensor) else present
    )  # one for each sample of a batch
    return present / trained if (trained := trained_scaling(layer, name)) else 0.0


def put_factor(layer: BaseTunerLayer, name: str, factor: float) -> None:
    """Let a scale multiply an adapter's ΔW in a layer."""
    value, present = factor * trained_scaling(layer, name), layer.scaling[name]
    layer.__dict__.get(BEFORE, {}).pop(name, None)
    if (
        isinstance(present, Tensor) and present.dim() == 0
    ):  # prepared for swapping under torch.compile
        present.fill_(value)
    else:
        layer.scaling[name] = value


def base_weight(layer: nn.Module) -> Tensor:
    """The weight of a layer beneath its adapters."""
    return (layer.get_base_layer() if isinstance(layer, BaseTunerLayer) else layer).weight


def shape_of(layer: nn.Module) -> tuple[int, ...]:
    """The shape of a layer's weight, also where that is packed, as bitsandbytes does in 4 bits."""
    base = layer.get_base_layer() if isinstance(layer, BaseTunerLayer) else layer
    return (
        (base.out_features, base.in_features)
        if isinstance(base, nn.Linear)
        else tuple(base.weight.shape)
    )


def home_of(layer: nn.Module) -> torch.device:
    """The device of a layer's own weight; "meta" where that is offloaded."""
    return base_weight(layer).device


def move(layer: BaseTunerLayer, name: str, device: torch.device) -> None:
    """Move all that an adapter has in a layer to a device: both halves, their biases, a DoRA's magnitude."""
    for kept in layer.children():
        if isinstance(kept, nn.ModuleDict) and name in kept:
            kept[name].to(device)


def module_name(text: str) -> str:
    """A name that torch takes for a module: no dots or blanks, and none of ModuleDict's own attributes.

    «train», «half» and the like get «_lora» behind them.
    """
    name = re.sub(r"\W", "_", text) or "adapter"
    return f"{name}_lora" if hasattr(torch.nn.ModuleDict(), name) else name


def _flat(pipe, layers: Carrying | None) -> list[BaseTunerLayer]:
    return [
        layer
        for part in (lora_layers(pipe) if layers is None else layers).values()
        for layer in part.values()
    ]


def trained_scaling(layer: LoraLayer, name: str) -> float:
    """alpha / rank, or alpha over its root where PEFT was told so."""
    rank = layer.r[name]
    return layer.lora_alpha[name] / (rank**0.5 if layer.use_rslora.get(name) else rank)
