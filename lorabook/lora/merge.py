"""Blending as arithmetic on adapters as plain data, by PEFT's methods."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from numbers import Real

import torch
from peft.utils.merge_utils import (
    calculate_majority_sign_mask,
    disjoint_merge,
    magnitude_based_pruning,
    reshape_weight_task_tensors,
)
from torch import Tensor
from torch.nn.functional import pad

from lorabook.lora.adapter import Adapter, Factors, Layer, lora
from lorabook.lora.compare import check_same_shape
from lorabook.lowrank import svd_of_product, truncated

METHODS = (
    "cat",
    "linear",
    "svd",
    "ties",
    "ties_svd",
    "dare_linear",
    "dare_linear_svd",
    "dare_ties",
    "dare_ties_svd",
    "magnitude_prune",
    "magnitude_prune_svd",
)
DENSITY = 0.5  # what the pruning methods keep where nothing is said

Weights = Mapping[str, float | Mapping[str, Mapping[str, float]]]
Bases = Mapping[str, Mapping[str, Tensor]]


def merge(
    adapters: Mapping[str, Adapter],
    weights: Weights,
    *,
    method: str,
    density: float | None = None,
    rank: int | None = None,
    seed: int = 0,
    bases: Bases | None = None,
) -> Adapter:
    """Blend adapters into one.

    The methods mean what they mean in PEFT. "cat" is the weighted sum of ΔW, exactly, at the sum of the ranks. "svd" is
    the best approximation of that sum by a rank, and the names that end in "_svd" combine ΔW and cut it to a rank.
    The others combine up and down each by itself, padded with zeros to the largest rank; the product of the results
    holds cross terms of one adapter's up with another's down. What is not a plain LoRA has no up and down of its own:
    there the exact factors of its ΔW serve, the singular values shared evenly. In a layer that an adapter lacks it does
    not take part. A single adapter goes the way of the method too, where PEFT would take "linear".

    Args:
        adapters: by name, for the same model.
        weights: by the same names, a number, or numbers by component and module, 1 where absent.
        method: one of `METHODS`.
        density: share of the values that the ties, dare and magnitude_prune methods keep, 0 to 1, 0.5 where None; the
            others take no notice of it.
        rank: what "svd" and the "_svd" methods cut to; None is the largest rank among the adapters.
        seed: of the dare methods' random choice; the global generator is left alone.
        bases: the model's own weights by component and module: needed for DoRA, and for the kernels' shapes of LoHa and
            LoKr on convolutions, whose files need not tell them.
    Returns: an Adapter of plain LoRA layers in float32, scaling 1, in the weights' shapes.
    Raises: ValueError for unknown names, weights that are not finite numbers, density or rank out of range, layers
        whose shapes differ, or a DoRA without its base weight.
    """
    check_weights(adapters, weights)
    _check_settings(method, density, rank)
    bases = {
        place: _on_a_full_device(bases[place[0]][place[1]])
        for place in places(adapters.values())
        if bases and place[1] in bases.get(place[0], ())
    }
    shapes = {
        place: _shape(place, adapters, bases.get(place)) for place in places(adapters.values())
    }
    rank = rank or max(
        (
            layer.rank
            for adapter in adapters.values()
            for part in adapter.layers.values()
            for layer in part.values()
        ),
        default=0,
    )
    generator = torch.Generator().manual_seed(seed)
    layers = {part: {} for part, _ in shapes}
    for place, shape in sorted(
        shapes.items()
    ):  # sorted, so that chance falls alike whatever the order of a file
        layers[place[0]][place[1]] = merge_layer(
            taking_part(adapters, weights, place),
            method,
            shape=shape,
            base=bases.get(place),
            density=density,
            rank=rank,
            generator=generator,
        )
    models = {adapter.base_model for adapter in adapters.values()}
    return Adapter(
        layers,
        base_model=models.pop() if len(models) == 1 else None,
        trigger_words=tuple(
            dict.fromkeys(w for adapter in adapters.values() for w in adapter.trigger_words)
        ),
    )


def merge_layer(
    parts: Sequence[tuple[Layer, float]],
    method: str,
    *,
    shape: Sequence[int],
    base: Tensor | None = None,
    density: float | None = None,
    rank: int | None = None,
    generator: torch.Generator | None = None,
) -> Layer:
    """Blend what several adapters add to one layer; methods and arguments as in `merge`.

    Args:
        parts: the adapters' layers with their weights.
        shape: the model's weight's, (out, in) or (out, in, height, width).
        base: the model's weight; needed for DoRA only.
        generator: on the CPU, for the dare methods; None is the global one.
    Returns: a plain LoRA layer in float32, scaling 1.
    """
    density = DENSITY if density is None else density
    rank = (
        rank
        or max(layer.rank for layer, _ in parts)
        or min(shape[0], torch.Size(shape[1:]).numel())
    )
    recipe = method.removesuffix("_svd")
    if method == "cat":
        up, down = lora(*_sum(parts, base)).factors()  # which keeps to full rank
    elif method == "svd":
        up, down = _reduced(*_sum(parts, base), rank)
    elif recipe != method:
        deltas, weights = [layer.delta(base) for layer, _ in parts], [weight for _, weight in parts]
        delta = _combined(deltas, weights, recipe, density, generator)
        up, down = _reduced(delta, torch.eye(delta.shape[1], device=delta.device), rank)
    else:
        ups, downs, weights = zip(
            *(_balanced(layer, weight, base) for layer, weight in parts), strict=True
        )
        roots = [math.sqrt(abs(weight)) for weight in weights]
        down = _combined(
            downs, list(map(math.copysign, roots, weights)), recipe, density, generator
        )
        up = _combined(ups, roots, recipe, density, generator)
    return lora(up.reshape(*up.shape, *[1] * len(shape[2:])), down.reshape(-1, *shape[1:]))


def check_weights(adapters: Mapping[str, Adapter], weights: Weights) -> None:
    """Refuse weights that do not fit the adapters.

    Raises: ValueError if there are no adapters, a weight is missing or too many, or one is not a finite number.
    """
    if not adapters:
        raise ValueError("there is nothing to blend: no adapters were given")
    if set(weights) != set(adapters):
        raise ValueError(
            f"the weights are for {', '.join(map(repr, weights)) or 'nothing'}, but the adapters are "
            f"{', '.join(map(repr, adapters))}; give each adapter one weight"
        )
    for name, weight in weights.items():
        for value in _numbers(weight):
            if isinstance(value, bool) or not isinstance(value, Real) or not math.isfinite(value):
                raise ValueError(f"the weight of {name!r} must be a finite number, not {value!r}")


def places(adapters: Iterable[Adapter]) -> list[tuple[str, str]]:
    """Every (component, module) that one of the adapters has."""
    return list(
        dict.fromkeys(
            (part, module)
            for adapter in adapters
            for part, inside in adapter.layers.items()
            for module in inside
        )
    )


def taking_part(
    adapters: Mapping[str, Adapter], weights: Weights, place: tuple[str, str]
) -> list[tuple[Layer, float]]:
    """The layers that the adapters have at a (component, module), each with its weight."""
    part, module = place
    return [
        (adapter.layers[part][module], _weight(weights[name], place))
        for name, adapter in adapters.items()
        if module in adapter.layers.get(part, ())
    ]


def _sum(parts: Sequence[tuple[Layer, float]], base: Tensor | None) -> Factors:
    """The weighted sum of ΔW as factors, exactly."""
    ups, downs, weights = zip(
        *(_factors(layer, weight, base) for layer, weight in parts), strict=True
    )
    return torch.cat(ups, 1), torch.cat(
        [weight * down for weight, down in zip(weights, downs, strict=True)]
    )


def _factors(layer: Layer, weight: float, base: Tensor | None) -> tuple[Tensor, Tensor, float]:
    """(up, down, weight) with weight · up @ down what the layer adds: of a plain LoRA its own, its scaling apart."""
    if not layer.is_plain:
        return *layer.factors(base), weight
    place = base.device if base is not None else None
    up, down = (layer.tensors[role].to(place, torch.float32).flatten(1) for role in ("up", "down"))
    return up, down, weight * layer.scaling


def _balanced(layer: Layer, weight: float, base: Tensor | None) -> tuple[Tensor, Tensor, float]:
    """As `_factors`, but no factor is the identity: what is pruned and crossed has to carry the values of ΔW."""
    up, down, weight = _factors(layer, weight, base)
    return (up, down, weight) if layer.is_plain else (*_reduced(up, down, up.shape[1]), weight)


def _reduced(up: Tensor, down: Tensor, rank: int) -> Factors:
    """The best factors of a rank of up @ down, by the eigenvectors of its Gram matrix where it may have full rank.

    For a large convolution that is six times as fast as an SVD; in double precision it loses nothing.
    """
    if up.shape[1] >= min(len(up), down.shape[1]):
        delta = (up @ down).double()
        if len(delta) <= delta.shape[1]:
            vectors = torch.linalg.eigh(delta @ delta.T)[1][:, -rank:]
            up, down = vectors.float(), (vectors.T @ delta).float()
        else:
            vectors = torch.linalg.eigh(delta.T @ delta)[1][:, -rank:]
            up, down = (delta @ vectors).float(), vectors.T.float()
    return truncated(*svd_of_product(up, down), rank)


def _combined(
    tensors: Sequence[Tensor],
    weights: Sequence[float],
    recipe: str,
    density: float,
    generator: torch.Generator | None,
) -> Tensor:
    """PEFT's task arithmetic; smaller matrices are padded with zeros, after pruning, which is a share of their own."""
    if recipe in ("ties", "magnitude_prune") and density < 1:
        tensors = [magnitude_based_pruning(tensor, density) for tensor in tensors]
    elif recipe.startswith("dare") and density < 1:
        tensors = [_dropped_out(tensor, density, generator) for tensor in tensors]
    height, width = (max(tensor.shape[i] for tensor in tensors) for i in (0, 1))
    stack = torch.stack([pad(t, (0, width - t.shape[1], 0, height - t.shape[0])) for t in tensors])
    weighted = stack * reshape_weight_task_tensors(
        stack, torch.tensor(weights, device=stack.device, dtype=stack.dtype)
    )
    if recipe.endswith("ties"):
        return disjoint_merge(weighted, calculate_majority_sign_mask(stack))
    return weighted.sum(0)


def _dropped_out(tensor: Tensor, density: float, generator: torch.Generator | None) -> Tensor:
    """Values kept by chance and enlarged so that their mean stays; drawn on the CPU, so alike on every device."""
    kept = torch.bernoulli(torch.full(tensor.shape, float(density)), generator=generator).to(
        tensor.device
    )
    return (
        tensor * kept / max(density, torch.finfo(torch.float32).tiny)
    )  # at density 0 nothing is left to enlarge


def _on_a_full_device(base: Tensor) -> Tensor:
    """The tensor where there is double precision, which Apple's GPU lacks."""
    return base.cpu() if base.device.type == "mps" else base


def _weight(weight: float | Mapping, place: tuple[str, str]) -> float:
    for key in place:
        weight = weight.get(key, 1.0) if isinstance(weight, Mapping) else weight
    return float(weight)


def _numbers(weight) -> list:
    return (
        [n for inside in weight.values() for n in _numbers(inside)]
        if isinstance(weight, Mapping)
        else [weight]
    )


def _check_settings(method: str, density: float | None, rank: int | None) -> None:
    if method not in METHODS:
        raise ValueError(f"unknown method {method!r}; the methods are: {', '.join(METHODS)}")
    if density is not None and (
        isinstance(density, bool) or not isinstance(density, Real) or not 0 <= density <= 1
    ):
        raise ValueError(
            f"density must be a number from 0 to 1, the share of values to keep, not {density!r}"
        )
    if rank is not None and (isinstance(rank, bool) or not isinstance(rank, int) or rank < 1):
        raise ValueError(f"rank must be a whole number of at least 1, not {rank!r}")


def _shape(
    place: tuple[str, str], adapters: Mapping[str, Adapter], base: Tensor | None
) -> Sequence[int]:
    """The shape of the model's weight, from itself or from the layers' tensors."""
    part, module = place
    shapes = {
        f"adapter {name!r}": _shape_of(adapter.layers[part][module])
        for name, adapter in adapters.items()
        if module in adapter.layers.get(part, ())
    }
    if base is not None:
        shapes["the model"] = tuple(base.shape)
    check_same_shape(
        place, {name: (shape[0], math.prod(shape[1:])) for name, shape in shapes.items()}
    )
    return max(shapes.values(), key=len) if base is None else shapes["the model"]


def _shape_of(layer: Layer) -> tuple[int, ...]:
    """The shape of the weight that a layer is for; (out, all the rest) where its tensors do not tell a kernel."""
    up, down = replace(layer, magnitude=None, start=None).factors()
    kernel = next(
        (
            layer.tensors[role].shape[2:]
            for role in ("mid", "t1", "t2", "w2", "diff", "down")
            if role in layer.tensors and layer.tensors[role].dim() > 2
        ),
        (),
    )
    return len(up), down.shape[1] // math.prod(kernel), *kernel
