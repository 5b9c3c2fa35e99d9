"""The weights with what is fused into them: computed from the originals, and exchanged wholly or not at all."""

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from lorabook.live.inject import put_on, remember_source, take_off
from lorabook.live.layers import (
    activate,
    active_adapters,
    base_weight,
    layers_of,
    models_of,
    put_factor,
    put_in_order,
    walk,
)
from lorabook.live.match import Ready
from lorabook.live.offloaded import check_plain
from lorabook.live.originals import FusedAdapter, fused_in, original

Shares = Mapping[str, Mapping[str, FusedAdapter]]
Weights = Mapping[str, Mapping[str, Tensor]]


def exchange(pipe, shares: Shares, *, fused: bool) -> int:
    """Bring adapters from beside the weights into them, or out of them again.

    Everything that can fail for its numbers is computed first. An error or an interruption later is undone: weights,
    record and adapters are then as before.

    Args:
        shares: by adapter's name and component.
        fused: whether they are in the weights afterwards.
    Returns: how many weights were changed.
    Raises: ValueError where a weight would not be finite, or is quantised.
    """
    models = models_of(pipe)
    before = {part: dict(fused_in(model).parts) for part, model in models.items()}
    more = {
        part: {name: parts[part] for name, parts in shares.items() if part in parts}
        for part in models
    }
    others = {
        part: {name: share for name, share in before[part].items() if name not in shares}
        for part in models
    }
    after = {part: others[part] | more[part] for part in models} if fused else others
    modules = {
        part: {module for share in more[part].values() for module in share.ready} for part in models
    }
    weights = {
        part: _sums(part, model, after[part], modules[part]) for part, model in models.items()
    }
    try:
        _settle(pipe, shares, after, weights, fused=fused)
    except BaseException:
        weights = {
            part: _sums(part, model, before[part], modules[part]) for part, model in models.items()
        }
        _settle(pipe, shares, before, weights, fused=not fused)
        raise
    return sum(map(len, modules.values()))


def _settle(
    pipe,
    shares: Shares,
    records: Mapping[str, dict[str, FusedAdapter]],
    weights: Weights,
    *,
    fused: bool,
) -> None:
    """Adapters, weights and record as they are to be, whatever of them is so already."""
    for name, parts in shares.items():
        take_off(pipe, name, parts)
        for part, share in parts.items() if not fused else ():
            _put_back(pipe, part, name, share)
    for part, model in models_of(pipe).items():
        _write(model, weights[part])
        record = fused_in(model)
        record.parts = records[part]
        needed = {module for share in record.parts.values() for module in share.ready}
        record.weights = {
            module: weight for module, weight in record.weights.items() if module in needed
        }


def _sums(
    part: str, model: nn.Module, shares: Mapping[str, FusedAdapter], modules: Iterable[str]
) -> dict[str, Tensor]:
    """The weights of these modules with all that is fused, from the originals."""
    placed, found = dict(walk(model)), {}
    for module in modules:
        check_plain(part, base_weight(placed[module]))
        own = original(model, module, base_weight(placed[module]))
        parts = [
            (share.ready[module], share.fused_at[module])
            for share in shares.values()
            if module in share.ready
        ]
        found[module] = own
        if parts:
            total = own.float()
            for made, factor in parts:
                up, down = (
                    half.to(own.device, torch.float32).flatten(1) for half in (made.up, made.down)
                )
                delta = up @ down
                total = total + (factor * made.alpha / made.rank) * delta.view_as(own)
            if (
                not total.abs().max() <= torch.finfo(own.dtype).max
            ):  # 8 bits know no infinity, and cut off in silence
                raise ValueError(
                    f"fusing makes layer {module} infinite in {str(own.dtype)[6:]}; give a smaller scale"
                )
            found[module] = total.to(own.dtype)
    return found


@torch.no_grad()
def _write(model: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Put the weights in their places, keeping the originals."""
    placed, record = dict(walk(model)), fused_in(model)
    for module, value in weights.items():
        weight = base_weight(placed[module])
        if module not in record.weights:
            record.weights[module] = weight.detach().to("cpu", copy=True)
        weight.copy_(value)


def _put_back(pipe, part: str, name: str, share: FusedAdapter) -> None:
    before = active_adapters(pipe)
    modules = dict(walk(models_of(pipe)[part]))
    ready = {
        module: _ready(made, base_weight(modules[module])) for module, made in share.ready.items()
    }
    put_on(pipe, name, {part: ready}, share.adapter, share.rank)
    remember_source(pipe, name, share.came_from)
    layers = layers_of(pipe, name)[part]
    for module, factor in share.scales.items():
        put_factor(layers[module], name, factor)
    activate(pipe, [*before, name] if share.active and name not in before else before)
    put_in_order(pipe, share.order)


def _ready(made: Ready, weight: Tensor) -> Ready:
    """The adapter's weights where the model is now, which may have moved meanwhile; never in 8 bits."""
    dtype = weight.dtype if weight.element_size() > 1 else made.down.dtype
    return Ready(made.down.to(weight.device, dtype), made.up.to(weight.device, dtype), made.alpha)
