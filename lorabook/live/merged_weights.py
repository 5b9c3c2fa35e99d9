"""The base model's weights with adapters in the sum: for good, and for the time of a block.

`exchange` writes the sum into the weights, and the originals back; `folded` lets layers compute
with it and touches no weight.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import TypeAlias

import torch
from diffusers import DiffusionPipeline
from torch import Tensor, nn
from torch.nn import functional

from lorabook.live.inject import attach_adapter, delete_adapter
from lorabook.live.layers import (
    activate,
    active_adapters,
    base_weight,
    denoiser,
    lora_layers,
    models_of,
    reorder,
)
from lorabook.live.state import (
    AdapterState,
    FusedAdapter,
    keep_over_calls,
    lock_of,
    original_weight,
    state_of,
)
from lorabook.live.upstream import (
    LoraLayer,
    check_not_quantized,
    is_compiled,
    is_offloaded,
    is_out_of_memory,
)

# bytes of sums that are kept from step to step: the bundled model's, and no larger one's
ROOM = 2**26
Fused: TypeAlias = Mapping[str, Mapping[str, FusedAdapter]]  # by component and name
Room: TypeAlias = dict[nn.Parameter, Tensor]
Deltas: TypeAlias = list[tuple[Tensor, Tensor, float]]


def merged_weight(
    weight: Tensor, deltas: Iterable[tuple[Tensor, Tensor, float]], out: Tensor | None = None
) -> Tensor:
    """W + Σ s · up · down, in the weight's precision, written to `out` where that is given."""
    total = torch.empty_like(weight, memory_format=torch.contiguous_format) if out is None else out
    sum_so_far, flat = weight.flatten(1), total.view(len(weight), -1)
    for up, down, scale in deltas:
        torch.addmm(sum_so_far, up.flatten(1), down.flatten(1), alpha=scale, out=flat)
        sum_so_far = flat
    return total


def exchange(pipe: DiffusionPipeline, change: Fused, *, into_weights: bool) -> int:
    """Bring adapters from beside the weights into them, or out again; how many weights changed.

    Everything that can fail for its numbers is computed first. A later error or interruption is
    undone: weights, state and adapters are then as before.
    """
    models = {component: models_of(pipe)[component] for component in change}
    before = {component: dict(state_of(model).fused) for component, model in models.items()}
    after, modules = {}, {}
    for component, adapters in change.items():
        others = {n: one for n, one in before[component].items() if n not in adapters}
        after[component] = others | adapters if into_weights else others
        modules[component] = {module for one in adapters.values() for module in one.layers}
    weights = _merged(models, after, modules)
    try:
        _settle(pipe, change, after, weights, into_weights)
    except BaseException:
        _settle(pipe, change, before, _merged(models, before, modules), not into_weights)
        raise
    return sum(map(len, modules.values()))


def _merged(
    models: Mapping[str, nn.Module], fused: Fused, modules: Mapping[str, Iterable[str]]
) -> dict[str, dict[str, Tensor]]:
    """The weights of these modules with all that is fused, from the originals."""
    merged: dict[str, dict[str, Tensor]] = {component: {} for component in models}
    for component, model in models.items():
        for module in modules[component]:
            weight = base_weight(model.get_submodule(module))
            check_not_quantized(component, weight)
            weight = original_weight(model, module, weight)
            layers = [one.layers.get(module) for one in fused[component].values()]
            place = (weight.device, torch.float32)
            deltas = [
                (one.up.to(*place), one.down.to(*place), one.scaling) for one in layers if one
            ]
            if deltas:
                total = merged_weight(weight.float(), deltas)
                # 8 bits know no infinity, and cut off in silence
                if not total.abs().max() <= torch.finfo(weight.dtype).max:
                    raise ValueError(
                        f"layer {module} would be infinite in {str(weight.dtype)[6:]}; give a "
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
                active = active_adapters(pipe)
                attach_adapter(pipe, component, name, one)
                activate(pipe, [*active, name] if one.active and name not in active else active)
                reorder(pipe, one.order)
    for component, model in models_of(pipe).items():
        if component in change:
            _write(model, weights[component])
            state = state_of(model)
            state.fused = dict(fused[component])
            needed = {module for one in state.fused.values() for module in one.layers}
            state.base_weights = {m: w for m, w in state.base_weights.items() if m in needed}
    keep_over_calls(pipe)


@torch.no_grad()
def _write(model: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Write weights in place, after keeping the originals."""
    originals = state_of(model).base_weights
    for module, value in weights.items():
        weight = base_weight(model.get_submodule(module))
        if module not in originals:
            originals[module] = weight.detach().to("cpu", copy=True)
        weight.copy_(value)


@contextmanager
def folded(
    pipe: DiffusionPipeline,
    *,
    components: Iterable[str] | None = None,
    room: Room | None = None,
) -> Iterator[bool]:
    """Let layers run plain, with their weight and the scaled ΔW of active adapters in one sum.

    Weights, scales and active adapters are never touched: a layer only gets another `forward`
    within the block, in one stroke, so that a thread that does not wait for the pipeline's lock
    generates the same all the while. Of a small model the sums are computed once; a large one has
    no second copy of its weights, since each sum is computed when its layer runs, and let go after.
    Where that cannot be done, the adapters work as ever, and False is given.

    Args:
        pipe: A pipeline with adapters; their scales must not be changed inside.
        components: "unet" …; None takes all.
        room: A dictionary to keep from call to call, for the sums to be written into again, which
            is faster than new memory; it grows to `ROOM` bytes at most.
    """
    with lock_of(pipe):
        forwards = _forwards(_foldable(pipe, components), {} if room is None else room)
        try:
            for layer, forward in forwards:
                layer.forward = forward
            yield bool(forwards)
        finally:
            for layer, _ in forwards:
                vars(layer).pop("forward", None)


def _foldable(
    pipe: DiffusionPipeline, components: Iterable[str] | None
) -> list[tuple[LoraLayer, Deltas]]:
    """Layers of active adapters, with up, down and scaling; none where one cannot be folded."""
    models = [getattr(pipe, component) for component in models_of(pipe)]
    state = state_of(denoiser(pipe)) if denoiser(pipe) is not None else AdapterState()
    is_special = any(is_compiled(model) or is_offloaded(model) for model in models)
    if is_special or state.schedule or state.scalings_before_call:
        return []
    carrying, foldable = lora_layers(pipe), []
    names = active_adapters(pipe, carrying)
    for component, layers in carrying.items():
        for layer in layers.values() if components is None or component in components else ():
            own = [name for name in names if name in layer.scaling]
            if own and not (_is_plain(layer) and all(_is_plain_in(layer, name) for name in own)):
                return []
            deltas = [
                (layer.lora_B[name].weight, layer.lora_A[name].weight, float(layer.scaling[name]))
                for name in own
            ]
            if own:
                foldable.append((layer, deltas))
    return foldable


def _is_plain(layer: LoraLayer) -> bool:
    """Whether a layer is an ordinary one with an ordinary weight."""
    base = layer.get_base_layer()
    weight = base.weight
    return (
        type(base) in (nn.Linear, nn.Conv2d)
        and getattr(base, "groups", 1) == 1
        and getattr(base, "padding_mode", "zeros") == "zeros"
        and not (layer.merged or layer.disable_adapters or "forward" in vars(layer))
        and not (base._forward_hooks or base._forward_pre_hooks or "forward" in vars(base))
        and weight.is_floating_point()
        and weight.element_size() > 1
        and not weight.is_meta
    )


def _is_plain_in(layer: LoraLayer, name: str) -> bool:
    """Whether an adapter adds s · up · down in a layer, in its precision, and nothing else."""
    scaling, down, weight = layer.scaling[name], layer.lora_A[name].weight, layer.weight
    by_sample = isinstance(scaling, Tensor) and scaling.dim() > 0
    special = name in layer.lora_variant or layer.lora_bias.get(name)
    return not (by_sample or special) and (down.dtype, down.device) == (weight.dtype, weight.device)


def _forwards(
    layers: list[tuple[LoraLayer, Deltas]], room: Room
) -> list[tuple[LoraLayer, Callable[[Tensor], Tensor]]]:
    """What each layer computes instead; none where there is no memory for it."""
    is_large = sum(layer.weight.nbytes for layer, _ in layers) > ROOM
    try:
        return [
            (layer, _forward(layer.get_base_layer(), deltas, None if is_large else room))
            for layer, deltas in layers
        ]
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        room.clear()
        return []


@torch.no_grad()
def _forward(base: nn.Module, deltas: Deltas, room: Room | None) -> Callable[[Tensor], Tensor]:
    """A layer with the sum for its weight: computed now and kept in the room, or in each call."""
    merged = torch.no_grad()(partial(merged_weight, base.weight.detach(), deltas))
    if room is not None:
        total = room.get(base.weight)
        if total is None or (total.dtype, total.device) != (base.weight.dtype, base.weight.device):
            total = torch.empty_like(base.weight, memory_format=torch.contiguous_format)
            room[base.weight] = total
        merged(out=total)
    if isinstance(base, nn.Linear):
        return lambda x: functional.linear(x, merged() if room is None else total, base.bias)
    return lambda x: functional.conv2d(
        x,
        merged() if room is None else total,
        base.bias,
        base.stride,
        base.padding,
        base.dilation,
    )
