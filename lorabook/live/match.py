"""An adapter's weights for the layers of a pipeline, checked before anything on it is changed."""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
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
from lorabook.lora.shapes import matrix_shape
from lorabook.upstream import quiet


@dataclass(frozen=True)
class LoraWeights:
    """A layer's weights as PEFT wants them: down (rank, in, …), up (out, rank, …), alpha."""

    down: Tensor
    up: Tensor
    alpha: float

    @property
    def rank(self) -> int:
        """Rows of down, columns of up."""
        return self.down.shape[0]

    def padded(self, rank: int) -> "LoraWeights":
        """The same ΔW with zeros up to a rank; alpha grows with the rank, so that ΔW stays."""
        more = rank - self.rank
        if more < 0:
            raise ValueError(
                f"an adapter of rank {self.rank} does not fit where rank {rank} was prepared; load "
                f"the first with hotswap_rank={self.rank} or more"
            )
        down, up = self.down, self.up
        down = torch.cat([down, down.new_zeros(more, *down.shape[1:])])
        up = torch.cat([up, up.new_zeros(up.shape[0], more, *up.shape[2:])], dim=1)
        return LoraWeights(down, up, self.alpha * rank / self.rank)


Weights: TypeAlias = Mapping[str, Mapping[str, LoraWeights]]  # by component and module name


def match_layers(
    pipe: DiffusionPipeline, adapter: Adapter, where: str
) -> dict[str, dict[str, LoraWeights]]:
    """An adapter's weights for the pipeline's layers, by component and the pipeline's module names.

    Args:
        pipe: nothing on it is changed.
        adapter: of any kind; what is no plain LoRA becomes one, exactly, at the rank that needs.
        where: what to call the adapter in errors.
    Raises: ValueError where a layer is not the pipeline's, has another shape, or is not finite once
        computed.
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
    weights: dict[str, dict[str, LoraWeights]] = {}
    for component, name, layer in matched:
        module = modules[component][name]
        weight, shape = (
            original_weight(models[component], name, base_weight(module)),
            shape_of(module),
        )
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
                f"numbers, not one for each of {shape[0]} outputs or {shape[1]} inputs; fetch it "
                "anew"
            )
        own = _lora_weights(layer, weight, shape)
        if not (own.up.isfinite().all() and own.down.isfinite().all()):
            raise ValueError(
                f"{where}: layer {name} is beyond what {str(weight.dtype)[6:]} holds; load the "
                "pipeline with dtype=torch.float32"
            )
        weights.setdefault(component, {})[name] = own
    return weights


def why_not_swapped(pipe: DiffusionPipeline, name: str, weights: Weights) -> str | None:
    """Why weights cannot be written into an adapter's layers, or None where they can.

    Args:
        weights: the new adapter's, from `match_layers`.
    """
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
    """The base model's own weights of the layers that an adapter has, whatever is fused.

    Quantised ones are left out.
    """
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


def _lora_weights(layer: Layer, weight: Tensor, shape: tuple[int, ...]) -> LoraWeights:
    out, *rest = shape
    if layer.is_plain:
        up, down, alpha = layer.tensors["up"], layer.tensors["down"], layer.alpha
    else:
        up, down = layer.factors(weight)
        alpha = down.shape[0]
    rank = down.shape[0]
    # weights that a model only keeps in 8 bits (layerwise casting) are computed with in more
    dtype = weight.dtype if weight.element_size() > 1 else torch.float32
    return LoraWeights(
        down.reshape(rank, *rest).to(weight.device, dtype),
        up.reshape(out, rank, *[1] * (len(rest) - 1)).to(weight.device, dtype),
        alpha,
    )


def by_diffusers_names(pipe: DiffusionPipeline, adapter: Adapter) -> Adapter:
    """An adapter whose transformer's layers have the names that they have on a pipeline.

    Args:
        pipe: its class converts the names of its model's original code (`lora_state_dict`).
        adapter: of any kind; returned as it is where the names are diffusers' already, or no
            conversion keeps all of its ΔW.
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
        if (
            renamed
            and renamed.keys() <= known
            and abs(_energy(renamed) / (_energy(layers) or 1) - 1) < 1e-3
        ):
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
    total = 0.0
    for layer in layers.values():
        up, down = layer.tensors["up"].float().flatten(1), layer.tensors["down"].float().flatten(1)
        total += float(((up.T @ up) * (down @ down.T)).sum()) * layer.scaling**2
    return total
