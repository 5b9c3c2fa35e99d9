"""Blending as arithmetic on adapters as plain data, by PEFT's methods."""

import math
from collections.abc import Iterator, Mapping, Sequence

import torch
from peft.utils.merge_utils import (
    calculate_majority_sign_mask,
    disjoint_merge,
    magnitude_based_pruning,
    reshape_weight_task_tensors,
)
from torch import Tensor
from torch.nn.functional import pad

from lorabook.checks import is_number
from lorabook.lora.adapter import Adapter, Bases, Factors, Layer, lora
from lorabook.lora.shapes import Shape, as_lora, matrix_shape, shapes_of
from lorabook.lowrank import svd, truncated

_PRUNING = ("ties", "dare_linear", "dare_ties", "magnitude_prune")
METHODS = (
    *("cat", "linear", "svd"),
    *(name for method in _PRUNING for name in (method, f"{method}_svd")),
)
DENSITY = 0.5

Place = tuple[str, str]  # component and module
Weights = Mapping[str, float | Mapping[str, Mapping[str, float]]]
WeightedLayers = Sequence[tuple[Layer, float]]


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
    """Blend adapters into one of plain LoRA layers in float32, scaling 1, in the weights' shapes.

    The methods mean what they mean in PEFT. "cat" is the weighted sum of ΔW, exactly, at the sum of
    the ranks. "svd" is the best approximation of that sum by a rank. The names that end in "_svd"
    combine ΔW and cut it to a rank. The others combine up and down each by itself, padded with
    zeros to the largest rank; their product has cross terms of one adapter's up with another's
    down. What is not a plain LoRA has no up and down of its own: there the factors of its ΔW serve,
    with the singular values shared evenly. An adapter without a layer has no say in that layer. A
    single adapter goes the way of the method too, where PEFT would take "linear".

    Weights are numbers, or numbers by component and module, 1 where absent. Density is the share of
    the values that the pruning methods keep. `bases` are needed for DoRA, and for the kernels of
    LoHa and LoKr, which files need not tell.
    """
    check_weights(adapters, weights)
    _check_settings(method, density, rank)
    density = DENSITY if density is None else density
    rank = rank or max(adapter.rank for adapter in adapters.values())
    generator = torch.Generator().manual_seed(seed)
    layers = {component: {} for adapter in adapters.values() for component in adapter.layers}
    shapes = _shapes(adapters, bases or {})
    for place in sorted(shapes):  # so that chance falls alike whatever the order of a file
        component, module = place
        factors = _merge_layer(
            weighted_layers(adapters, weights, place),
            method,
            base=(bases or {}).get(component, {}).get(module),
            density=density,
            rank=rank,
            generator=generator,
        )
        layers[component][module] = as_lora(*factors, shapes[place])
    base_models = {adapter.base_model for adapter in adapters.values()}
    words = [word for adapter in adapters.values() for word in adapter.trigger_words]
    return Adapter(
        layers,
        base_model=base_models.pop() if len(base_models) == 1 else None,
        trigger_words=tuple(dict.fromkeys(words)),
    )


def check_weights(adapters: Mapping[str, Adapter], weights: Weights) -> None:
    """Raise ValueError where weights are missing, too many or not finite, or adapters are."""
    if not adapters:
        raise ValueError("there is nothing to blend: no adapters were given")
    if set(weights) != set(adapters):
        raise ValueError(
            f"the weights are for {', '.join(map(repr, weights)) or 'nothing'}, but the adapters "
            f"are {', '.join(map(repr, adapters))}; give each adapter one weight"
        )
    for name, weight in weights.items():
        for value in _numbers(weight):
            if not is_number(value):
                raise ValueError(f"the weight of {name!r} must be a finite number, not {value!r}")


def weighted_layers(
    adapters: Mapping[str, Adapter], weights: Weights, place: Place
) -> list[tuple[Layer, float]]:
    """The layers that the adapters have at a (component, module), each with its weight."""
    component, module = place
    pairs = []
    for name, adapter in adapters.items():
        if module in adapter.layers.get(component, ()):
            weight = weights[name]
            if isinstance(weight, Mapping):
                weight = weight.get(component, {}).get(module, 1.0)
            pairs.append((adapter.layers[component][module], float(weight)))
    return pairs


def check_same_shape(place: Place, shapes: Mapping[str, Sequence[int]]) -> None:
    """Raise ValueError where shapes, by whose they are, differ in one layer."""
    sizes = {name: " x ".join(map(str, shape)) for name, shape in shapes.items()}
    first, size = next(iter(sizes.items()))
    for name, other in sizes.items():
        if other != size:
            raise ValueError(
                f"{first} is {size} in layer {place[1]} of {place[0]}, but {name} is {other}; "
                "use adapters made for one and the same model"
            )


def _shapes(adapters: Mapping[str, Adapter], bases: Bases) -> dict[Place, Shape]:
    """The weights' shapes by place, of the model itself or as the adapters' tensors tell."""
    sizes: dict[Place, dict[str, tuple[int, int]]] = {}
    shapes: dict[Place, Shape] = {}
    for name, adapter in adapters.items():
        own = shapes_of(adapter, bases)
        for place, layer in adapter.flat.items():
            component, module = place
            sizes.setdefault(place, {})[f"adapter {name!r}"] = matrix_shape(layer)
            shape = own[component][module]
            shapes[place] = max(shapes.get(place, ()), shape, key=len)
            if (base := bases.get(component, {}).get(module)) is not None:
                sizes[place]["the model"] = (base.shape[0], base.shape[1:].numel())
    for place, by_name in sizes.items():
        check_same_shape(place, by_name)
    return shapes


def _merge_layer(
    layers: WeightedLayers,
    method: str,
    *,
    base: Tensor | None,
    density: float,
    rank: int,
    generator: torch.Generator,
) -> Factors:
    recipe = method.removesuffix("_svd")
    if method in ("cat", "svd"):
        ups, downs, weights = zip(*(_halves(*layer, base) for layer in layers), strict=True)
        downs = [weight * down for weight, down in zip(weights, downs, strict=True)]
        up, down = lora(torch.cat(ups, 1), torch.cat(downs)).factors()  # at most of full rank
        return (up, down) if method == "cat" else _best(rank, up, down)
    if recipe != method:
        deltas = [layer.delta(base) for layer, _ in layers]
        weights = [weight for _, weight in layers]
        return _best(rank, _combined(deltas, weights, recipe, density, generator))
    halves = [_halves(*layer, base) for layer in layers]
    for number, (layer, _) in enumerate(layers):
        if not layer.is_plain:  # pruning and crossing want no identity among the halves
            up, down, weight = halves[number]
            halves[number] = *_best(up.shape[1], up, down), weight
    ups, downs, weights = zip(*halves, strict=True)
    roots = [math.sqrt(abs(weight)) for weight in weights]
    signed = [math.copysign(root, weight) for root, weight in zip(roots, weights, strict=True)]
    down = _combined(downs, signed, recipe, density, generator)
    return _combined(ups, roots, recipe, density, generator), down


def _halves(layer: Layer, weight: float, base: Tensor | None) -> tuple[Tensor, Tensor, float]:
    """(up, down, weight): weight · up @ down is what the layer adds; a plain LoRA's own halves."""
    if not layer.is_plain:
        return *layer.factors(base), weight
    tensors = layer.to_float32(base).tensors
    return tensors["up"].flatten(1), tensors["down"].flatten(1), weight * layer.scaling


def _best(rank: int, up: Tensor, down: Tensor | None = None) -> Factors:
    """The best factors of a rank, of a matrix or a product; rank 0 stands for all of it."""
    U, S, Vh = (half.float() for half in svd(up, down))
    return truncated(U, S, Vh, rank or len(S))


def _combined(
    tensors: Sequence[Tensor],
    weights: Sequence[float],
    recipe: str,
    density: float,
    generator: torch.Generator,
) -> Tensor:
    """PEFT's task arithmetic; smaller matrices are padded after pruning, a share of their own."""
    if density < 1 and recipe.startswith("dare"):
        tensors = [_drop_out(tensor, density, generator) for tensor in tensors]
    elif density < 1 and recipe != "linear":
        tensors = [magnitude_based_pruning(tensor, density) for tensor in tensors]
    height, width = (max(tensor.shape[i] for tensor in tensors) for i in (0, 1))
    stack = torch.stack([pad(t, (0, width - t.shape[1], 0, height - t.shape[0])) for t in tensors])
    column = torch.tensor(weights, device=stack.device, dtype=stack.dtype)
    weighted = stack * reshape_weight_task_tensors(stack, column)
    if recipe.endswith("ties"):
        return disjoint_merge(weighted, calculate_majority_sign_mask(stack))
    return weighted.sum(0)


def _drop_out(tensor: Tensor, density: float, generator: torch.Generator) -> Tensor:
    """Values that chance leaves, enlarged so that the mean stays; by the CPU, alike everywhere."""
    mask = torch.bernoulli(torch.full(tensor.shape, float(density)), generator=generator)
    enlarged = tensor * mask.to(tensor.device)
    return enlarged / max(density, torch.finfo(torch.float32).tiny)  # at 0 nothing is left


def _numbers(weight) -> Iterator:
    if isinstance(weight, Mapping):
        for inner in weight.values():
            yield from _numbers(inner)
    else:
        yield weight


def _check_settings(method: str, density: float | None, rank: int | None) -> None:
    if method not in METHODS:
        raise ValueError(f"unknown method {method!r}; the methods are: {', '.join(METHODS)}")
    if density is not None and not (is_number(density) and 0 <= density <= 1):
        raise ValueError(f"density must be a number from 0 to 1, not {density!r}")
    if rank is not None and (isinstance(rank, bool) or not isinstance(rank, int) or rank < 1):
        raise ValueError(f"rank must be a whole number of at least 1, not {rank!r}")
