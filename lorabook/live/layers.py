"""The adapters on a pipeline as PEFT keeps them: which layers carry which, how strongly."""

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import TypeAlias

import torch
from diffusers import DiffusionPipeline
from torch import Tensor, nn

from lorabook.live.upstream import BaseTunerLayer, LoraLayer
from lorabook.lora.formats.keys import COMPONENTS
from lorabook.upstream import uncompiled

LoraLayers: TypeAlias = Mapping[str, Mapping[str, LoraLayer]]  # by component and module name


def models_of(pipe: DiffusionPipeline) -> dict[str, nn.Module]:
    """The models of a pipeline that can carry adapters, by component, without `torch.compile`."""
    models = {component: getattr(pipe, component, None) for component in COMPONENTS}
    return {name: uncompiled(model) for name, model in models.items() if model is not None}


def denoiser(pipe: DiffusionPipeline) -> nn.Module | None:
    """The pipeline's UNet or transformer."""
    models = models_of(pipe)
    return models.get("unet", models.get("transformer"))


def walk(model: nn.Module, inside: str = "") -> Iterator[tuple[str, nn.Module]]:
    """The layers of a model that hold a weight or an adapter, by name; not adapters' own modules.

    As `named_modules`, but without a generator for each level, which takes ten times as long.
    """
    waiting = [(inside, model)]
    while waiting:
        name, module = waiting.pop()
        if isinstance(module, (BaseTunerLayer, nn.Linear, nn.Conv2d)):
            yield name, module
            continue
        children = list(module.named_children())
        waiting.extend(
            (f"{name}.{child}" if name else child, part) for child, part in reversed(children)
        )


def lora_layers(pipe: DiffusionPipeline) -> dict[str, dict[str, LoraLayer]]:
    """All layers of a pipeline that carry LoRA adapters, by component and module name."""
    return {
        component: {name: layer for name, layer in walk(model) if isinstance(layer, LoraLayer)}
        for component, model in models_of(pipe).items()
    }


def layers_of(pipe: DiffusionPipeline, name: str) -> dict[str, dict[str, LoraLayer]]:
    """The layers that one adapter touches, by component and module name."""
    layers = {
        component: {module: layer for module, layer in modules.items() if name in layer.scaling}
        for component, modules in lora_layers(pipe).items()
    }
    return {component: modules for component, modules in layers.items() if modules}


def flat(layers: LoraLayers) -> list[LoraLayer]:
    """The layers of all components."""
    return [layer for modules in layers.values() for layer in modules.values()]


def adapter_names(pipe: DiffusionPipeline, layers: LoraLayers | None = None) -> list[str]:
    """The adapters on a pipeline, in the order they came; `layers` spares a search for them."""
    layers = lora_layers(pipe) if layers is None else layers
    return list(dict.fromkeys(name for layer in flat(layers) for name in layer.scaling))


def active_adapters(pipe: DiffusionPipeline, layers: LoraLayers | None = None) -> list[str]:
    """The adapters that act, in the order they came; `layers` as in `adapter_names`."""
    layers = lora_layers(pipe) if layers is None else layers
    enabled = [layer for layer in flat(layers) if not layer.disable_adapters]
    active = {name for layer in enabled for name in layer.active_adapters}
    return [name for name in adapter_names(pipe, layers) if name in active]


def activate(
    pipe: DiffusionPipeline, names: Sequence[str], layers: LoraLayers | None = None
) -> None:
    """Let exactly these adapters be active, at the scales they have; nothing becomes trainable.

    One that waits on another device (`move_adapter`) comes back to its model.
    """
    names = list(names)
    for layer in flat(lora_layers(pipe) if layers is None else layers):
        if layer.disable_adapters:
            layer.enable_adapters(True)
        if list(layer.active_adapters) != names:
            home = device_of(layer)
            for name in names if home.type != "meta" else ():
                if name in layer.lora_A and layer.lora_A[name].weight.device != home:
                    move_weights(layer, name, home)
            layer.set_adapter(names, inference_mode=True)


def reorder(pipe: DiffusionPipeline, names: Sequence[str]) -> None:
    """Let these adapters come first, in this order: it decides the last bits of a sum."""
    places = {name: place for place, name in enumerate(names)}
    for layer in flat(lora_layers(pipe)):
        ordered = sorted(layer.scaling.items(), key=lambda item: places.get(item[0], len(places)))
        layer.scaling = dict(ordered)
    activate(pipe, active_adapters(pipe))


def read_scale(layer: LoraLayer, name: str) -> float:
    """The scale that multiplies an adapter's ΔW in a layer; 1 as it was trained."""
    scaling, trained = layer.scaling[name], trained_scaling(layer, name)
    if isinstance(scaling, Tensor):
        scaling = float(scaling.float().mean())  # of the samples of a batch, or of one number
    return scaling / trained if trained else 0.0


def write_scale(layer: LoraLayer, name: str, scale: float) -> None:
    """Let a scale multiply an adapter's ΔW in a layer."""
    scaling, value = layer.scaling[name], scale * trained_scaling(layer, name)
    if isinstance(scaling, Tensor) and scaling.dim() == 0:  # a compiled model holds on to it
        scaling.fill_(value)
    else:
        layer.scaling[name] = value


def trained_scaling(layer: LoraLayer, name: str) -> float:
    """PEFT's scaling at scale 1: alpha / rank, or alpha / √rank with rsLoRA."""
    rank = layer.r[name]
    return layer.lora_alpha[name] / (rank**0.5 if layer.use_rslora.get(name) else rank)


def base_layer(layer: nn.Module) -> nn.Module:
    """The layer beneath its adapters."""
    return layer.get_base_layer() if isinstance(layer, BaseTunerLayer) else layer


def base_weight(layer: nn.Module) -> Tensor:
    """The weight of a layer beneath its adapters."""
    return base_layer(layer).weight


def shape_of(layer: nn.Module) -> tuple[int, ...]:
    """The shape of a layer's weight, also where that is packed, as bitsandbytes does in 4 bits."""
    base = base_layer(layer)
    if isinstance(base, nn.Linear):
        return base.out_features, base.in_features
    return tuple(base.weight.shape)


def device_of(layer: nn.Module) -> torch.device:
    """The device of a layer's own weight; "meta" where that is offloaded."""
    return base_weight(layer).device


def move_weights(layer: LoraLayer, name: str, device: torch.device) -> None:
    """Move all that an adapter has in a layer: both halves, their biases, a DoRA's magnitude."""
    for children in layer.children():
        if isinstance(children, nn.ModuleDict) and name in children:
            children[name].to(device)


def module_name(text: str) -> str:
    """A name that torch takes for a module: no dots, no attribute of ModuleDict («train»)."""
    name = re.sub(r"\W", "_", text) or "adapter"
    return f"{name}_lora" if hasattr(nn.ModuleDict(), name) else name
