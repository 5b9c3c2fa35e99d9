"""The adapters that take part in the weights themselves for the time of a block, so that the layers run plain."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import NamedTuple

import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from torch.nn import functional

from lorabook.live.layers import BEFORE, active_adapters, lora_layers, models_of
from lorabook.live.locks import lock_of
from lorabook.live.memory import is_memory
from lorabook.live.scale_schedule import steps_on

ROOM = (
    2**26
)  # bytes of sums that are kept from step to step: the bundled model's, and no larger one's
_FORWARD = "forward"
Room = dict[nn.Parameter, Tensor]


class _Place(NamedTuple):
    """A layer with adapters: PEFT's, the one beneath, its weight, and (up, down, scale) of each adapter."""

    layer: LoraLayer
    base: nn.Module
    weight: nn.Parameter
    deltas: list[tuple[Tensor, Tensor, float]]


@contextmanager
def folded(
    pipe, *, components: Iterable[str] | None = None, room: Room | None = None
) -> Iterator[bool]:
    """Let the layers run plain, with their weight and the scaled ΔW of the adapters that take part in one sum.

    Weights, scales and active adapters are never touched: a layer only gets another `forward`, in one stroke, so that a
    thread that does not wait for the pipeline's lock draws the same all the while. Of a small model the sums are computed
    once; a large one has no second copy of its weights, since each sum is computed when its layer runs and let go after.
    Where that cannot be done (scales that change over the denoising or by sample, DoRA, a compiled, quantised or offloaded
    model, adapters fused by diffusers, too little memory), nothing is folded and the adapters work as ever.

    Args:
        pipe: a pipeline with adapters; their scales must not be changed inside.
        components: "unet" …; None takes all.
        room: a dictionary to keep from call to call, for the sums to be written into again; new memory takes longer than
            the sums do. It grows to the size of the weights that the adapters touch, and to `ROOM` bytes at most.
    Yields: whether the adapters are folded.
    """
    with lock_of(pipe):
        places = _places(pipe, components) if _can_fold(pipe) else None
        forwards = _forwards(places, {} if room is None else room) if places else None
        if forwards is None:
            yield False
            return
        try:
            for place, forward in zip(places, forwards, strict=True):
                place.layer.__dict__[_FORWARD] = forward
            yield True
        finally:
            for place in places:
                place.layer.__dict__.pop(_FORWARD, None)


def _places(pipe, components: Iterable[str] | None) -> list[_Place] | None:
    """What the adapters that take part touch; None where one of the layers cannot be folded."""
    carrying, found = lora_layers(pipe), []
    names = active_adapters(pipe, carrying)
    for part, layers in carrying.items():
        for layer in layers.values() if components is None or part in components else ():
            if own := [name for name in names if name in layer.scaling]:
                base = layer.get_base_layer()
                weight = base.weight
                if not _is_plain(layer, base, weight):
                    return None
                deltas = [_delta(layer, name, weight) for name in own]
                if None in deltas:
                    return None
                found.append(_Place(layer, base, weight, deltas))
    return found


def _is_plain(layer: LoraLayer, base: nn.Module, weight: Tensor) -> bool:
    """Whether the layer is an ordinary one with an ordinary weight."""
    return (
        type(base) in (nn.Linear, nn.Conv2d)
        and getattr(base, "groups", 1) == 1
        and not (
            layer.merged
            or layer.disable_adapters
            or layer.__dict__.get(BEFORE)
            or _FORWARD in layer.__dict__
        )
        and not (base._forward_hooks or base._forward_pre_hooks or _FORWARD in base.__dict__)
        and weight.is_floating_point()
        and weight.element_size() > 1
        and not weight.is_meta
    )


def _delta(layer: LoraLayer, name: str, weight: Tensor) -> tuple[Tensor, Tensor, float] | None:
    """An adapter's up, down and scale as it adds them; None where it does more, or less plainly."""
    up, down, scale = layer.lora_B[name].weight, layer.lora_A[name].weight, layer.scaling[name]
    if (
        isinstance(scale, Tensor)
        and scale.dim()
        or name in layer.lora_variant
        or layer.lora_bias.get(name)
    ):
        return None
    return (
        (up, down, float(scale))
        if down.dtype == weight.dtype and down.device == weight.device
        else None
    )


def _forwards(places: list[_Place], room: Room) -> list[Callable[[Tensor], Tensor]] | None:
    """What each layer computes instead; None where there is no memory for it."""
    if sum(place.weight.nbytes for place in places) > ROOM:
        return [_forward(place.base, partial(_sum, place)) for place in places]
    try:
        return [
            _forward(place.base, partial(lambda total: total, _sum(place, room)))
            for place in places
        ]
    except (RuntimeError, MemoryError) as error:
        if not is_memory(error):
            raise
        room.clear()
        return None


def _forward(base: nn.Module, weight: Callable[[], Tensor]) -> Callable[[Tensor], Tensor]:
    if isinstance(base, nn.Linear):
        return lambda x: functional.linear(x, weight(), base.bias)
    return lambda x: base._conv_forward(x, weight(), base.bias)


@torch.no_grad()
def _sum(place: _Place, room: Room | None = None) -> Tensor:
    """A layer's weight with what the adapters add, in the room's memory, or in memory of its own."""
    own, total = place.weight.detach(), (room or {}).get(place.weight)
    if (
        total is None
        or total.shape != own.shape
        or total.dtype != own.dtype
        or total.device != own.device
    ):
        total = torch.empty_like(own, memory_format=torch.contiguous_format)
        if room is not None:
            room[place.weight] = total
    before, flat = own.flatten(1), total.view(len(own), -1)
    for up, down, scale in place.deltas:
        torch.addmm(before, up.flatten(1), down.flatten(1), alpha=scale, out=flat)
        before = flat
    return total


def _can_fold(pipe) -> bool:
    models = [getattr(pipe, part) for part in models_of(pipe)]
    compiled = any(
        hasattr(model, "_orig_mod") or getattr(model, "_compiled_call_impl", None)
        for model in models
    )
    offloaded = any(
        hasattr(model, "_hf_hook") or hasattr(model, "_diffusers_hook") for model in models
    )
    return not (compiled or offloaded or steps_on(pipe))
