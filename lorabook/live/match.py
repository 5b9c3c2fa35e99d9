"""An adapter's weights for the layers of a pipeline, checked before anything on it is changed."""

import math
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import TypeAlias

import torch
from diffusers import DiffusionPipeline
from torch import Tensor, nn

from lorabook.live.architecture import likely_cause, misfit
from lorabook.live.layers import base_weight, flat, layers_of, models_of, shape_of, walk
from lorabook.live.state import original_weight
from lorabook.live.upstream import check_not_quantized, check_weights_available, is_quantized
from lorabook.lora.adapter import Adapter, Layer
from lorabook.lora.formats.keys import bare, flat_name
from lorabook.lora.formats.read import parse
from lorabook.lora.shapes import as_lora, matrix_shape
from lorabook.lowrank import inner_product
from lorabook.upstream import quiet

# plain LoRA layers, shaped as PEFT wants them, by component and module name
Weights: TypeAlias = Mapping[str, Mapping[str, Layer]]


def match_layers(pipe: DiffusionPipeline, adapter: Adapter, where: str) -> Weights:
    """An adapter's weights for the pipeline's layers, by component and the pipeline's module names.

    What is no plain LoRA becomes one, exactly, at the rank that needs. ValueError where a layer is
    not the pipeline's, has another shape, or is not finite once computed.
    """
    models = models_of(pipe)
    modules = {component: dict(walk(model)) for component, model in models.items()}
    matched, missing = [], []
    for component, layers in adapter.layers.items():
        for module, layer in layers.items():
            own = _own_name(modules.get(component, {}), module)
            if own is None:
                missing.append((component, module))
            else:
                matched.append((component, own, layer))
    if missing:
        raise ValueError(misfit(pipe, adapter, missing, where))
    check_weights_available(models)
    weights: dict[str, dict[str, Layer]] = {}
    for component, name, layer in matched:
        module = modules[component][name]
        shape = shape_of(module)
        weight = original_weight(models[component], name, base_weight(module))
        if layer.needs_base:
            check_not_quantized(component, weight)
        if matrix_shape(layer) != (shape[0], math.prod(shape[1:])):
            raise ValueError(
                f"{where} does not fit {type(pipe).__name__}: layer {name} has the shape {shape} "
                f"and the adapter {matrix_shape(layer)}; {likely_cause(adapter, pipe)}"
            )
        if layer.magnitude is not None and layer.magnitude.numel() not in shape[:2]:
            raise ValueError(
                f"{where}: the DoRA's magnitude of layer {name} has {layer.magnitude.numel()} "
                f"numbers, not {shape[0]} or {shape[1]}; fetch it anew"
            )
        own = _plain(layer, weight, shape)
        if not all(tensor.isfinite().all() for tensor in own.tensors.values()):
            raise ValueError(
                f"{where}: layer {name} is beyond what {str(weight.dtype)[6:]} holds; load the "
                "pipeline with dtype=torch.float32"
            )
        weights.setdefault(component, {})[name] = own
    return weights


def why_not_swapped(pipe: DiffusionPipeline, name: str, weights: Weights) -> str | None:
    """Why weights cannot be written into an adapter's layers, or None where they can."""
    layers = layers_of(pipe, name)
    if any(name in layer.lora_magnitude_vector for layer in flat(layers)):
        return "takes the place of a DoRA"
    extra = [
        f"{component}.{module}"
        for component, modules in weights.items()
        for module in modules
        if module not in layers.get(component, {})
    ]
    if extra:
        return f"has {len(extra)} layers that the one in its place lacks, for example {extra[0]}"
    for component, modules in weights.items():
        for module, own in modules.items():
            room = layers[component][module].lora_A[name].weight.shape[0]
            if own.rank > room:
                return f"has rank {own.rank} where there is room for {room}"
    return None


def base_weights(pipe: DiffusionPipeline, adapter: Adapter) -> dict[str, dict[str, Tensor]]:
    """The base model's own weights of an adapter's layers, whatever is fused; no quantised ones."""
    weights: dict[str, dict[str, Tensor]] = {}
    for component, model in models_of(pipe).items():
        modules = dict(walk(model))
        for module in adapter.layers.get(component, {}):
            own = _own_name(modules, module)
            weight = None if own is None else base_weight(modules[own])
            if weight is not None and not is_quantized(weight):
                weights.setdefault(component, {})[module] = original_weight(model, own, weight)
    return weights


def _own_name(modules: Mapping[str, nn.Module], module: str) -> str | None:
    """A module's name on a model: transformers 5 has no `text_model.` before it."""
    names = (module, module.removeprefix("text_model."))
    return next((name for name in names if name in modules), None)


def _plain(layer: Layer, weight: Tensor, shape: tuple[int, ...]) -> Layer:
    """A layer as a plain LoRA of a weight, in its shape, on its device and in its precision."""
    # weights that a model only keeps in 8 bits (layerwise casting) are computed with in more
    dtype = weight.dtype if weight.element_size() > 1 else torch.float32
    up, down = layer.tensors.get("up"), layer.tensors.get("down")
    if not layer.is_plain:
        up, down = layer.factors(weight)
    plain = as_lora(up.flatten(1), down.flatten(1), shape)
    if layer.is_plain:
        plain = replace(plain, scaling=layer.scaling)
    return plain.map(lambda tensor: tensor.to(weight.device, dtype))


def by_diffusers_names(pipe: DiffusionPipeline, adapter: Adapter) -> Adapter:
    """An adapter whose transformer's layers have the names that they have on a pipeline.

    The pipeline's class converts the names of its model's original code (`lora_state_dict`). Where
    that does not keep all of ΔW, the adapter stays as it is.
    """
    model, layers = models_of(pipe).get("transformer"), adapter.layers.get("transformer", {})
    names = {flat_name(name): name for name, _ in walk(model)} if model is not None else {}
    if not names or all(names.get(flat_name(module)) == module for module in layers):
        return adapter
    if all(flat_name(module) in names for module in layers):  # underscores for dots
        renamed = {names[flat_name(module)]: layer for module, layer in layers.items()}
    else:
        renamed = _converted(pipe, adapter, set(names.values()))
    return replace(
        adapter,
        layers=dict(adapter.layers) | {"transformer": renamed},
        stems=adapter.stems if renamed is layers else {},
    )


def _converted(pipe: DiffusionPipeline, adapter: Adapter, known: set[str]) -> Mapping[str, Layer]:
    layers = adapter.layers["transformer"]
    if not hasattr(pipe, "lora_state_dict") or not all(layer.is_plain for layer in layers.values()):
        return layers
    stems = {module: bare(adapter.stems.get(("transformer", module), module)) for module in layers}
    for weights in _spellings(layers, stems):
        try:
            with quiet():
                converted = type(pipe).lora_state_dict(weights, return_alphas=True)
            weights, alphas = converted if isinstance(converted, tuple) else (converted, {})
            renamed = parse(weights | (alphas or {})).layers.get("transformer", {})
        except Exception:  # not a spelling that this pipeline's class knows
            continue
        # a conversion splits layers and leaves out what it does not know, with a line in a log
        is_whole = abs(_energy(renamed) / (_energy(layers) or 1) - 1) < 1e-3
        if renamed and renamed.keys() <= known and is_whole:
            return renamed
    return layers


def _spellings(
    layers: Mapping[str, Layer], stems: Mapping[str, str]
) -> Iterator[dict[str, Tensor]]:
    """The weights by ComfyUI's and by Kohya's keys, their scaling in up."""
    for start, end, change in (
        ("diffusion_model.", ("lora_A", "lora_B"), str),
        ("lora_unet_", ("lora_down", "lora_up"), flat_name),
    ):
        yield {
            f"{start}{change(stems[module])}.{name}.weight": value.contiguous()
            for module, layer in layers.items()
            for name, value in zip(
                end, (layer.tensors["down"], layer.tensors["up"] * layer.scaling), strict=True
            )
        }


def _energy(layers: Mapping[str, Layer]) -> float:
    """The sum of ‖ΔW‖² over plain layers."""
    factors = [layer.factors() for layer in layers.values()]
    return sum(inner_product(pair, pair) for pair in factors)
