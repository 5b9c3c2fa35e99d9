"""Adapters computed into the base weights, and exactly out of them again."""

import hashlib
import html
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from diffusers import DiffusionPipeline
from torch import Tensor, nn

from lorabook.live.expand import steps_of
from lorabook.live.inject import (
    adapter_of,
    add_adapter,
    convert_doras,
    delete_adapter,
    source_of,
)
from lorabook.live.layers import (
    activate,
    active_adapters,
    adapter_names,
    base_weight,
    layers_of,
    models_of,
    read_scale,
    reorder,
    trained_scaling,
    walk,
    write_scale,
)
from lorabook.live.match import LoraWeights
from lorabook.live.scale_schedule import steps_on
from lorabook.live.scales import layer_scales, resolve_scales
from lorabook.live.state import (
    FusedAdapter,
    check_known,
    fused_names,
    keep_over_calls,
    lock_of,
    locked,
    original_weight,
    state_of,
)
from lorabook.live.upstream import check_not_quantized, check_weights_available
from lorabook.types import Scales

Fused = Mapping[str, Mapping[str, FusedAdapter]]  # by component and adapter's name


@dataclass(frozen=True, repr=False)
class FuseReport:
    """What `fuse` or `unfuse` did.

    Attributes:
        fused: the adapters that are in the weights now.
        layers: how many weights were changed.
        rounded: the 8-bit formats that the fused weights are kept in, as after
            `enable_layerwise_casting`; small ΔW are lost in them.
    """

    fused: tuple[str, ...]
    layers: int
    rounded: tuple[str, ...] = ()

    def __str__(self):
        inside = f"fused: {', '.join(self.fused)}" if self.fused else "nothing is fused"
        formats = " and ".join(self.rounded)
        rounded = f", rounded to {formats}, in which the model is kept" if formats else ""
        return f"{inside}; {self.layers} weights changed{rounded}"

    __repr__ = __str__

    def _repr_html_(self):
        return f"<p>{html.escape(str(self))}</p>"


@locked
def fuse(
    pipe: DiffusionPipeline,
    scales: Mapping[str, Scales] | None = None,
    *,
    components: Iterable[str] | None = None,
) -> FuseReport:
    """Compute adapters into the base weights, so that they cost no time; `unfuse` gives the base back bit for bit.

    The originals are kept on the CPU until `unload_adapters` lets them go; what is fused then stays
    for good. Fused adapters cannot be scaled, swapped or removed, nor by a call's
    `cross_attention_kwargs={"scale": …}`, which warns once; others can be loaded, scaled and removed
    meanwhile. After an error or an interruption everything is as before.

    Args:
        pipe: a pipeline with adapters.
        scales: as in `set_scales`, in place of the present ones; None fuses the active adapters at
            their present scales.
        components: "unet", "text_encoder" …; None takes all. What is not fused of an adapter stays
            on as it is.
    Returns: a FuseReport.
    Raises: ValueError for an unknown adapter or component, one that is fused already, scales that
        change over the denoising, weights that are not finite, or a model that is offloaded or
        quantised. Then nothing is changed.
    Warns: where the model keeps its weights in 8 bits, to which the sums are rounded.
    """
    if scales is not None and not isinstance(scales, Mapping):
        raise ValueError(
            "scales must be a dictionary by adapter's name, as {'ink': 0.8}, or None; "
            f"not {scales!r:.80}"
        )
    models = _chosen_models(pipe, components)
    if scales is None:
        fused_already = fused_names(pipe)
        names = [name for name in active_adapters(pipe) if name not in fused_already]
    else:
        names = list(scales)
        scales = {name: resolve_scales(pipe, value, name) for name, value in scales.items()}
    _check_fusible(pipe, names, scales, models)
    convert_doras(pipe, names)
    change: dict[str, dict[str, FusedAdapter]] = {component: {} for component in models}
    for name in names:
        factors = None if scales is None else layer_scales(pipe, name, scales[name])
        for component, adapter in _to_fuse(pipe, name, factors).items():
            if component in models:
                change[component][name] = adapter
    report = _exchange(pipe, change, into_weights=True)
    if report.rounded:
        warnings.warn(
            f"the model keeps weights in {' and '.join(report.rounded)}, and the fused ones are rounded "
            "to it too: the picture differs from that with the adapter beside them; unfuse is exact",
            stacklevel=3,
        )
    return report


@locked
def unfuse(pipe: DiffusionPipeline, names: str | Iterable[str] | None = None) -> FuseReport:
    """Take fused adapters out of the weights and put them on the pipeline as they were before.

    Args:
        names: one name or several, in any order; None takes all.
    Returns: a FuseReport. When nothing is fused any more, `base_checksum` is what it was before.
    Raises: ValueError where nothing, or not that adapter, is fused, where the originals were let go,
        or where the model is offloaded. Nothing is changed then, nor by an error or an interruption
        on the way.
    """
    models = models_of(pipe)
    known = fused_names(pipe)
    if names is not None and not isinstance(names, (str, Iterable)):
        raise ValueError(f"names must be an adapter's name, or several, not {names!r:.80}")
    names = known if names is None else [names] if isinstance(names, str) else list(names)
    for_good = [name for model in models.values() for name in state_of(model).fused_for_good]
    lost = [name for name in (names or for_good) if name in for_good and name not in known]
    if lost:
        raise ValueError(
            f"adapter {lost[0]!r} is fused for good: unload_adapters let the originals go; load the "
            "model anew"
        )
    if not known:
        raise ValueError(
            "nothing is fused, so there is nothing to unfuse; fuse(pipe) fuses the active adapters"
        )
    for name in names:
        if name not in known:
            raise ValueError(f"adapter {name!r} is not fused; fused are: {', '.join(known)}")
    check_weights_available(models)
    change = {
        component: {n: state_of(model).fused[n] for n in names if n in state_of(model).fused}
        for component, model in models.items()
    }
    return _exchange(pipe, change, into_weights=False)


@contextmanager
def fused(
    pipe: DiffusionPipeline,
    scales: Mapping[str, Scales] | None = None,
    *,
    components: Iterable[str] | None = None,
) -> Iterator[FuseReport]:
    """Fuse within a block, and undo it on the way out, after an error too; arguments as in `fuse`."""
    with lock_of(pipe):
        before = fused_names(pipe)
        report = fuse(pipe, scales, components=components)
        try:
            yield report
        finally:
            if ours := [name for name in fused_names(pipe) if name not in before]:
                unfuse(pipe, ours)


@locked
def base_checksum(pipe: DiffusionPipeline) -> str:
    """SHA-256 of a pipeline's weights without those of adapters: equal before fusing and after unfusing.

    Raises: ValueError where weights are offloaded.
    """
    check_weights_available(models_of(pipe))
    checksum = hashlib.sha256()
    for component, model in models_of(pipe).items():
        weights = {
            name.replace(".base_layer.", "."): value
            for name, value in model.state_dict().items()
            if ".lora_" not in name
        }
        for name, value in sorted(weights.items()):
            checksum.update(f"{component}.{name}".encode())
            checksum.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return checksum.hexdigest()


def keep_fused(pipe: DiffusionPipeline) -> None:
    """Keep what is fused for good, and free the originals and the adapters' own weights."""
    for model in models_of(pipe).values():
        state = state_of(model)
        state.fused_for_good = tuple(dict.fromkeys((*state.fused_for_good, *state.fused)))
        state.base_weights, state.fused = {}, {}


def merged_weight(
    weight: Tensor, deltas: Iterable[tuple[Tensor, Tensor, float]], out: Tensor | None = None
) -> Tensor:
    """W + Σ s · up · down, in the weight's precision.

    Args:
        weight: (out, in) or (out, in, height, width).
        deltas: up (out, rank, …), down (rank, in, …) and s of each adapter.
        out: of the weight's shape, contiguous, to be written into; None makes a new tensor.
    """
    total = torch.empty_like(weight, memory_format=torch.contiguous_format) if out is None else out
    sum_so_far, flat = weight.flatten(1), total.view(len(weight), -1)
    for up, down, scale in deltas:
        torch.addmm(sum_so_far, up.flatten(1), down.flatten(1), alpha=scale, out=flat)
        sum_so_far = flat
    return total


def _chosen_models(
    pipe: DiffusionPipeline, components: Iterable[str] | None
) -> dict[str, nn.Module]:
    models = models_of(pipe)
    if components is None:
        return models
    chosen = [components] if isinstance(components, str) else list(components)
    for component in chosen:
        if component not in models:
            raise ValueError(
                f"{component!r} is no component of this pipeline that carries adapters; it has: "
                f"{', '.join(models)}"
            )
    return {component: models[component] for component in chosen}


def _check_fusible(
    pipe: DiffusionPipeline,
    names: list[str],
    scales: Mapping[str, Scales] | None,
    models: Mapping[str, nn.Module],
) -> None:
    for name in names:
        if name in fused_names(pipe):
            raise ValueError(
                f"adapter {name!r} is fused already; call unfuse(pipe, {name!r}) first"
            )
    check_known(pipe, names)
    check_weights_available(models_of(pipe))
    if not names:
        raise ValueError(
            "no adapter is active, so there is nothing to fuse; load one, or name it with its scale"
        )
    for name in names:
        components = layers_of(pipe, name)
        if not components.keys() & models.keys():
            raise ValueError(
                f"adapter {name!r} has nothing in {', '.join(models) or 'no component'}; it is for "
                f"{', '.join(components)}"
            )
        if scales is not None:
            layer_scales(pipe, name, scales[name])
        if name in steps_on(pipe) if scales is None else steps_of(scales[name], name):
            raise ValueError(
                f"the scales of {name!r} change over the denoising, and fused weights cannot; set "
                "them without steps"
            )


def _to_fuse(
    pipe: DiffusionPipeline, name: str, factors: Mapping[str, Mapping[str, float]] | None
) -> dict[str, FusedAdapter]:
    """An adapter as it is on the pipeline, by component.

    Args:
        factors: the scales to fuse it at; None for the present ones.
    """
    adapter, source = adapter_of(pipe, name), source_of(pipe, name)
    fused_before = [
        other
        for model in models_of(pipe).values()
        for fused_adapter in state_of(model).fused.values()
        for other in fused_adapter.order
    ]
    order = list(dict.fromkeys([*fused_before, *adapter_names(pipe)]))
    active = name in active_adapters(pipe)
    result = {}
    for component, layers in layers_of(pipe, name).items():
        weights = {
            module: LoraWeights(
                layer.lora_A[name].weight.detach(),
                layer.lora_B[name].weight.detach(),
                trained_scaling(layer, name) * layer.r[name],
            )
            for module, layer in layers.items()
        }
        for module, own in weights.items():
            if not (own.up.float().isfinite().all() and own.down.float().isfinite().all()):
                raise ValueError(
                    f"adapter {name!r} has weights that are not finite in layer {module}; load it anew"
                )
        scales = {module: read_scale(layer, name) for module, layer in layers.items()}
        padded = any(isinstance(layer.scaling[name], Tensor) for layer in layers.values())
        result[component] = FusedAdapter(
            weights=weights,
            fused_at=scales if factors is None else factors[component],
            scales=scales,
            active=active,
            rank=max(own.rank for own in weights.values()) if padded else None,
            adapter=adapter,
            order=order,
            source=source,
        )
    return result


def _exchange(pipe: DiffusionPipeline, change: Fused, *, into_weights: bool) -> FuseReport:
    """Bring adapters from beside the weights into them, or out of them again.

    Everything that can fail for its numbers is computed first. A later error or interruption is
    undone: weights, state and adapters are then as before.
    """
    models = {component: models_of(pipe)[component] for component in change}
    before = {component: dict(state_of(model).fused) for component, model in models.items()}
    after, modules = {}, {}
    for component, adapters in change.items():
        others = {n: one for n, one in before[component].items() if n not in adapters}
        after[component] = others | adapters if into_weights else others
        modules[component] = {module for one in adapters.values() for module in one.weights}
    weights = _merged(models, after, modules)
    try:
        _settle(pipe, change, after, weights, into_weights)
    except BaseException:
        weights = _merged(models, before, modules)
        _settle(pipe, change, before, weights, not into_weights)
        raise
    if into_weights:
        state_of(next(iter(models_of(pipe).values()))).has_warned = False
    kept = [w for model in models_of(pipe).values() for w in state_of(model).base_weights.values()]
    rounded = {str(weight.dtype)[6:] for weight in kept if weight.element_size() == 1}
    changed = sum(map(len, modules.values()))
    return FuseReport(tuple(fused_names(pipe)), changed, tuple(sorted(rounded)))


def _merged(
    models: Mapping[str, nn.Module], fused: Fused, modules: Mapping[str, Iterable[str]]
) -> dict[str, dict[str, Tensor]]:
    """The weights of these modules with all that is fused, from the originals."""
    merged: dict[str, dict[str, Tensor]] = {component: {} for component in models}
    for component, model in models.items():
        layers = dict(walk(model))
        for module in modules[component]:
            weight = base_weight(layers[module])
            check_not_quantized(component, weight)
            weight = original_weight(model, module, weight)
            deltas = [
                (
                    own.up.to(weight.device, torch.float32),
                    own.down.to(weight.device, torch.float32),
                    one.fused_at[module] * own.alpha / own.rank,
                )
                for one in fused[component].values()
                if (own := one.weights.get(module)) is not None
            ]
            if deltas:
                total = merged_weight(weight.float(), deltas)
                # 8 bits know no infinity, and cut off in silence
                if not total.abs().max() <= torch.finfo(weight.dtype).max:
                    raise ValueError(
                        f"fusing makes layer {module} infinite in {str(weight.dtype)[6:]}; give a "
                        "smaller scale"
                    )
                weight = total.to(weight.dtype)
            merged[component][module] = weight
    return merged


def _settle(
    pipe: DiffusionPipeline,
    change: Fused,
    fused: Fused,
    weights: Mapping[str, Mapping[str, Tensor]],
    into_weights: bool,
) -> None:
    """Adapters, weights and state as they are to be, whatever of them is so already."""
    for component, adapters in change.items():
        for name, one in adapters.items():
            delete_adapter(pipe, name, [component])
            if not into_weights:
                _put_back(pipe, component, name, one)
    for component, model in models_of(pipe).items():
        if component in change:
            _write(model, weights[component])
            state = state_of(model)
            state.fused = dict(fused[component])
            needed = {module for one in state.fused.values() for module in one.weights}
            state.base_weights = {m: w for m, w in state.base_weights.items() if m in needed}
    keep_over_calls(pipe)


@torch.no_grad()
def _write(model: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Write weights in place, after keeping the originals."""
    layers, originals = dict(walk(model)), state_of(model).base_weights
    for module, value in weights.items():
        weight = base_weight(layers[module])
        if module not in originals:
            originals[module] = weight.detach().to("cpu", copy=True)
        weight.copy_(value)


def _put_back(pipe: DiffusionPipeline, component: str, name: str, one: FusedAdapter) -> None:
    active = active_adapters(pipe)
    layers = dict(walk(models_of(pipe)[component]))
    weights = {}
    for module, own in one.weights.items():
        weight = base_weight(layers[module])  # the model may have moved meanwhile
        dtype = weight.dtype if weight.element_size() > 1 else own.down.dtype
        weights[module] = replace(
            own, down=own.down.to(weight.device, dtype), up=own.up.to(weight.device, dtype)
        )
    add_adapter(pipe, name, {component: weights}, one.adapter, rank=one.rank, source=one.source)
    for module, layer in layers_of(pipe, name)[component].items():
        write_scale(layer, name, one.scales[module])
    activate(pipe, [*active, name] if one.active and name not in active else active)
    reorder(pipe, one.order)
