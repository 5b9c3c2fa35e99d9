"""Adapters put on a pipeline as PEFT's LoRA layers, taken off again, and read back from there."""

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

import torch
from diffusers import DiffusionPipeline
from peft import LoraConfig, inject_adapter_in_model
from torch import Tensor, nn

from lorabook.live.layers import (
    LoraLayers,
    activate,
    active_adapters,
    adapter_names,
    base_weight,
    flat,
    layers_of,
    lora_layers,
    models_of,
    move_weights,
    read_scale,
    trained_scaling,
    walk,
    write_scale,
)
from lorabook.live.match import Weights, match_layers
from lorabook.live.state import FusedAdapter, LoadedAdapter, keep_over_calls, state_of
from lorabook.live.upstream import (
    BaseTunerLayer,
    LoraLayer,
    check_weights_available,
    mark_adapted,
    renew_group_offloading,
    unmark_adapted,
)
from lorabook.lora.adapter import Adapter, Layer, lora
from lorabook.lora.formats.keys import COMPONENTS, text_name
from lorabook.lora.formats.write import rank_settings
from lorabook.upstream import quiet


def add_adapter(
    pipe: DiffusionPipeline, name: str, weights: Weights, adapter: Adapter, rank: int | None = None
) -> None:
    """Add an adapter from `match_layers`, at scale 1 and active, beside those that are there.

    With a rank every layer is padded to it and its scale kept in a tensor, so that a compiled model
    can have another adapter swapped in without compiling again.
    """
    active = active_adapters(pipe)
    for component, model in models_of(pipe).items():
        if not weights.get(component):
            continue
        config = LoraConfig(r=1, target_modules=list(weights[component]))
        with quiet():
            inject_adapter_in_model(config, model, name, low_cpu_mem_usage=True)
        mark_adapted(model)
        modules = dict(walk(model))
        for module, own in weights[component].items():
            layer = modules[module]
            _write_layer(layer, name, own, rank or own.rank)
            write_scale(layer, name, 1.0)
            if rank:
                layer.scaling[name] = torch.tensor(float(layer.scaling[name]))
        _remember(model, name, weights[component], adapter.only([component]))
        renew_group_offloading(model)
    activate(pipe, list(dict.fromkeys([*active, name])))
    keep_over_calls(pipe)


def delete_adapter(
    pipe: DiffusionPipeline, name: str, components: Iterable[str] = COMPONENTS
) -> None:
    """Take an adapter off; layers that carry none are plain again, others keep their scales."""
    active = active_adapters(pipe)
    activate(pipe, [other for other in active if other != name])
    models = models_of(pipe)
    for model in (models[component] for component in components if component in models):
        for module, layer in list(walk(model)):
            if isinstance(layer, BaseTunerLayer) and name in layer.scaling:
                layer.delete_adapter(name)
                if not layer.scaling:
                    model.set_submodule(module, layer.get_base_layer())
        state_of(model).loaded.pop(name, None)
        configs = _configs(model)
        if configs.pop(name, None):
            renew_group_offloading(model)
        if not configs:
            unmark_adapted(model)
    present = adapter_names(pipe)
    activate(pipe, [other for other in active if other in present])
    keep_over_calls(pipe)


def attach_adapter(
    pipe: DiffusionPipeline, component: str, name: str, adapter: FusedAdapter
) -> None:
    """Put an adapter back as it was when it was fused: the very tensors, on the model's device."""
    model = models_of(pipe)[component]
    for module, fused in adapter.layers.items():
        layer = model.get_submodule(module)
        if not isinstance(layer, LoraLayer):
            layer = fused.layer
            model.set_submodule(module, layer)
        for attribute, value in fused.entries.items():
            getattr(layer, attribute)[name] = value
        weight = base_weight(layer)  # the model may have moved meanwhile
        move_weights(layer, name, weight.device)
        if weight.element_size() > 1:  # no adapter computes in 8 bits
            layer.lora_A[name].to(weight.dtype)
            layer.lora_B[name].to(weight.dtype)
    model.peft_config = _configs(model) | {name: adapter.config}
    if adapter.loaded:
        state_of(model).loaded[name] = adapter.loaded
    mark_adapted(model)
    renew_group_offloading(model)


def entries_of(layer: LoraLayer, name: str) -> dict[str, Any]:
    """What an adapter has in a layer, by PEFT's attribute."""
    attributes = (*layer.adapter_layer_names, *layer.other_param_names)
    return {key: getattr(layer, key)[name] for key in attributes if name in getattr(layer, key)}


@torch.no_grad()
def write_weights(
    pipe: DiffusionPipeline, name: str, weights: Weights, adapter: Adapter, *, padded: bool = False
) -> None:
    """Give an adapter's layers other weights; scales stay, layers without weights are zeroed.

    Padded to the rank that each layer has, a compiled model need not be compiled again.
    """
    for component, layers in layers_of(pipe, name).items():
        own = weights.get(component, {})
        for module, layer in layers.items():
            if module not in own:
                layer.lora_B[name].weight.zero_()
                continue
            rank = layer.lora_A[name].weight.shape[0] if padded else own[module].rank
            _write_layer(layer, name, own[module], rank)
        _remember(models_of(pipe)[component], name, own, adapter.only([component]))
    keep_over_calls(pipe)


def convert_doras(
    pipe: DiffusionPipeline, names: Iterable[str], layers: LoraLayers | None = None
) -> None:
    """Let a scale multiply the whole ΔW of adapters: a DoRA becomes the LoRA with its ΔW.

    PEFT puts a DoRA's scale inside the norm, and its magnitude acts at scale 0, so that 0 is not
    the base model; `load_adapter` never leaves one, other code does. `DoraLinearVariant`, PEFT
    0.21.2: https://github.com/huggingface/peft/blob/main/src/peft/tuners/lora/variants.py
    """
    layers = lora_layers(pipe) if layers is None else layers
    for name in names:
        if any(is_dora(layer, name) for layer in flat(layers)):
            adapter = adapter_of(pipe, name)
            weights = match_layers(pipe, adapter, f"adapter {name!r}")
            write_weights(pipe, name, weights, adapter)


def is_dora(layer: LoraLayer, name: str) -> bool:
    """Whether an adapter is a DoRA in a layer."""
    return name in layer.lora_magnitude_vector


def adapter_of(pipe: DiffusionPipeline, name: str) -> Adapter:
    """An adapter read back from a pipeline, as trained: scales are not part of it."""
    check_weights_available(models_of(pipe))
    layers: dict[str, dict[str, Layer]] = {}
    first = None
    for component, modules in layers_of(pipe, name).items():
        original = original_adapter(pipe, component, name)
        first = first or original
        for module, layer in modules.items():
            full_name = text_name(module) if component.startswith("text_encoder") else module
            own = original.layers.get(component, {}).get(full_name) if original else None
            if own is None and original and not layer.lora_B[name].weight.any():
                continue  # zeroed by a swap
            layers.setdefault(component, {})[full_name] = own or _read_layer(layer, name)
    return replace(first or Adapter({}), layers=layers)


def original_adapter(pipe: DiffusionPipeline, component: str, name: str) -> Adapter | None:
    """An adapter as it was loaded, with the tensors of layers that are no plain LoRA, or None."""
    loaded = loaded_adapter(models_of(pipe)[component], name)
    return loaded.adapter if loaded else None


def source_of(pipe: DiffusionPipeline, name: str) -> str | None:
    """Where an adapter came from, as `load_adapter` was given it; None where nothing is known."""
    loaded = [loaded_adapter(model, name) for model in models_of(pipe).values()]
    return next((each.adapter.source for each in loaded if each and each.adapter.source), None)


def _write_layer(layer: LoraLayer, name: str, weights: Layer, rank: int) -> None:
    """A plain LoRA into a layer with the adapter, with zeros up to the rank; its scale stays."""
    scale = read_scale(layer, name)
    up, down = weights.tensors["up"], weights.tensors["down"]
    if more := rank - weights.rank:
        down = torch.cat([down, down.new_zeros(more, *down.shape[1:])])
        up = torch.cat([up, up.new_zeros(len(up), more, *up.shape[2:])], dim=1)
    halves = ((layer.lora_A[name], down), (layer.lora_B[name], up))
    for half, value in halves:
        if half.weight.shape == value.shape and not half.weight.is_meta:
            half.weight.data.copy_(value)
        else:  # a copy: what is written later must not change the caller's
            value = value.clone(memory_format=torch.contiguous_format)
            half.weight = nn.Parameter(value, requires_grad=False)
    width = "channels" if isinstance(halves[0][0], nn.Conv2d) else "features"
    setattr(layer.lora_A[name], f"out_{width}", rank)
    setattr(layer.lora_B[name], f"in_{width}", rank)
    layer.r[name], layer.lora_alpha[name] = rank, weights.scaling * rank
    layer.use_rslora[name] = layer.use_dora[name] = False
    layer.lora_variant.pop(name, None)
    if name in layer.lora_magnitude_vector:
        del layer.lora_magnitude_vector[name]
    write_scale(layer, name, scale)


def _read_layer(layer: LoraLayer, name: str) -> Layer:
    down, up = layer.lora_A[name].weight.detach(), layer.lora_B[name].weight.detach()
    scaling = trained_scaling(layer, name)
    if isinstance(layer.scaling[name], Tensor):  # prepared for swapping: zeros that no file needs
        used = (down.flatten(1) != 0).any(1) | (up.flatten(1) != 0).any(0)
        rank = int(used.nonzero().max()) + 1 if used.any() else 1
        down, up = down[:rank], up[:, :rank]
    plain = lora(up, down, scaling)
    if not is_dora(layer, name):
        return plain
    return replace(plain, magnitude=layer.lora_magnitude_vector[name].weight.detach().flatten())


def _configs(model: nn.Module) -> dict[str, LoraConfig]:
    return getattr(model, "peft_config", None) or {}


def loaded_adapter(model: nn.Module, name: str) -> LoadedAdapter | None:
    """What is remembered of an adapter, unless other code has put another one in its place."""
    loaded = state_of(model).loaded.get(name)
    return loaded if loaded and loaded.config is _configs(model).get(name) else None


def _remember(model: nn.Module, name: str, weights: Mapping[str, Layer], adapter: Adapter) -> None:
    """Ranks and alphas in PEFT's config, as its files have them, and where the adapter is from."""
    config = _configs(model)[name]
    if weights:
        ranks = {module: own.rank for module, own in weights.items()}
        alphas = {module: own.alpha for module, own in weights.items()}
        vars(config).update(rank_settings(ranks, alphas))
    unlike = {
        component: {module: layer for module, layer in layers.items() if not layer.is_plain}
        for component, layers in adapter.layers.items()
    }
    state_of(model).loaded[name] = LoadedAdapter(config, replace(adapter, layers=unlike))
