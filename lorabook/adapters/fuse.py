"""Adapters computed into the base weights, and exactly out of them again."""
import hashlib
import html
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lorabook.adapters.attach import adapter_of, put_on, take_off
from lorabook.adapters.expand import steps_of
from lorabook.adapters.layers import (
    activate,
    active_adapters,
    adapter_names,
    base_weight,
    check_known,
    factor_of,
    layers_of,
    models_of,
    put_factor,
    put_in_order,
    trained_scaling,
    walk,
)
from lorabook.adapters.locks import lock_of, locked
from lorabook.adapters.originals import FusedAdapter, fused_in, fused_names, original
from lorabook.adapters.ready import Ready
from lorabook.adapters.scales import factors_for, plain_scales
from lorabook.adapters.schedule import steps_on
from lorabook.adapters.undora import make_scalable


@dataclass(frozen=True, repr=False)
class FuseReport:
    """What `fuse` or `unfuse` did.

    Attributes:
        fused: the adapters that are in the weights now.
        layers: how many weights were changed.
    """

    fused: tuple[str, ...]
    layers: int

    def __str__(self):
        inside = f"fused: {', '.join(self.fused)}" if self.fused else "nothing is fused"
        return f"{inside}; {self.layers} weights changed"

    __repr__ = __str__

    def _repr_html_(self):
        return f"<p>{html.escape(str(self))}</p>"


@locked
def fuse(pipe, scales: Mapping[str, object] | None = None, *, components: Iterable[str] | None = None) -> FuseReport:
    """Compute adapters into the base weights, so that they cost no time; `unfuse` gives the base back bit for bit.

    The originals are kept beside, on the CPU. Fused adapters cannot be scaled, swapped or removed; others can be loaded,
    scaled and removed meanwhile.

    Args:
        pipe: a pipeline with adapters.
        scales: as in `set_scales`, in place of the present ones; None fuses those that take part, at their present scales.
        components: "unet", "text_encoder" …; None takes all. What is not fused of an adapter stays on as it is.
    Returns: a FuseReport.
    Raises: ValueError for an unknown adapter or component, one that is fused already, scales that change over the
        denoising, or weights that are not finite. Then nothing is changed.
    """
    if scales is not None and not isinstance(scales, Mapping):
        raise ValueError(f"scales must be a dictionary by adapter's name, as {{'ink': 0.8}}, or None; not {scales!r:.80}")
    already = fused_names(models_of(pipe))
    names = [name for name in active_adapters(pipe) if name not in already] if scales is None else list(scales)
    models = _chosen(pipe, components)
    _check(pipe, names, scales, models)
    make_scalable(pipe, names)
    taken = {name: _taken(pipe, name, None if scales is None else scales[name], models) for name in names}
    changed = {}
    for part, model in models.items():
        more = {name: parts[part] for name, parts in taken.items() if part in parts}
        changed[part] = _sums(model, {**fused_in(model).parts, **more}, {m for one in more.values() for m in one.ready})
    for name, parts in taken.items():
        take_off(pipe, name, parts)
        for part, share in parts.items():
            fused_in(models[part]).parts[name] = share
    for part, weights in changed.items():
        _write(models[part], weights)
    return _report(pipe, sum(map(len, changed.values())))


@locked
def unfuse(pipe, names: str | Iterable[str] | None = None) -> FuseReport:
    """Take fused adapters out of the weights and put them on the pipeline as they were before.

    Args:
        names: one name or several, in any order; None takes all.
    Returns: a FuseReport. When nothing is fused any more, `base_checksum` is what it was before.
    Raises: ValueError where nothing, or not that adapter, is fused.
    """
    models = models_of(pipe)
    known = fused_names(models)
    if names is not None and not isinstance(names, (str, Iterable)):
        raise ValueError(f"names must be an adapter's name, or several, not {names!r:.80}")
    names = known if names is None else [names] if isinstance(names, str) else list(names)
    if not known:
        raise ValueError("nothing is fused, so there is nothing to unfuse; fuse(pipe) fuses the adapters that take part")
    for name in names:
        if name not in known:
            raise ValueError(f"adapter {name!r} is not fused; fused are: {', '.join(known)}")
    touched = 0
    for part, model in models.items():
        kept = fused_in(model)
        gone = {name: kept.parts.pop(name) for name in names if name in kept.parts}
        modules = {module for share in gone.values() for module in share.ready}
        _write(model, _sums(model, kept.parts, modules))
        for module in modules - {module for share in kept.parts.values() for module in share.ready}:
            del kept.weights[module]
        touched += len(modules)
        for name, share in gone.items():
            _put_back(pipe, part, name, share)
    return _report(pipe, touched)


@contextmanager
def fused(pipe, scales: Mapping[str, object] | None = None, *, components: Iterable[str] | None = None
          ) -> Iterator[FuseReport]:
    """Fuse for the time of a block, and undo it on the way out, after an error too; arguments as in `fuse`."""
    with lock_of(pipe):
        before = set(fused_names(models_of(pipe)))
        report = fuse(pipe, scales, components=components)
        try:
            yield report
        finally:
            if ours := [name for name in fused_names(models_of(pipe)) if name not in before]:
                unfuse(pipe, ours)


@locked
def base_checksum(pipe) -> str:
    """SHA-256 of a pipeline's weights, those of adapters on it left out: equal before fusing and after unfusing."""
    seen = hashlib.sha256()
    for part, model in models_of(pipe).items():
        weights = {name.replace(".base_layer.", "."): value for name, value in model.state_dict().items()
                   if ".lora_" not in name}
        for name in sorted(weights):
            seen.update(f"{part}.{name}".encode())
            seen.update(weights[name].detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return seen.hexdigest()


def _chosen(pipe, parts: Iterable[str] | None) -> dict[str, nn.Module]:
    models = models_of(pipe)
    wanted = list(models) if parts is None else [parts] if isinstance(parts, str) else list(parts)
    for part in wanted:
        if part not in models:
            raise ValueError(f"{part!r} is no component of this pipeline that carries adapters; it has: {', '.join(models)}")
    return {part: models[part] for part in wanted}


def _check(pipe, names: list[str], scales: Mapping | None, models: Mapping[str, nn.Module]) -> None:
    if already := [name for name in names if name in fused_names(models_of(pipe))]:
        raise ValueError(f"adapter {already[0]!r} is fused already; call unfuse(pipe, {already[0]!r}) first")
    check_known(pipe, names)
    if not names:
        raise ValueError("no adapter takes part, so there is nothing to fuse; load one, or name it with its scale")
    for name in names:
        if not layers_of(pipe, name).keys() & models.keys():
            raise ValueError(f"adapter {name!r} has nothing in {', '.join(models) or 'no component'}; it is for "
                             + ", ".join(layers_of(pipe, name)))
        if scales is not None:
            factors_for(pipe, name, plain_scales(pipe, scales[name], name))
        changing = name in steps_on(pipe) if scales is None else steps_of(plain_scales(pipe, scales[name], name), name)
        if changing:
            raise ValueError(f"the scales of {name!r} change over the denoising, and fused weights cannot; set them without "
                             "steps")


def _taken(pipe, name: str, scales, models: Mapping[str, nn.Module]) -> dict[str, FusedAdapter]:
    """The adapter as it is on the pipeline, by component, for those that are to be fused."""
    adapter, active = adapter_of(pipe, name), name in active_adapters(pipe)
    wanted = None if scales is None else factors_for(pipe, name, plain_scales(pipe, scales, name))
    taken = {}
    for part, layers in layers_of(pipe, name).items():
        if part in models:
            present = {module: factor_of(layer, name) for module, layer in layers.items()}
            ready = {module: Ready(layer.lora_A[name].weight.detach(), layer.lora_B[name].weight.detach(),
                                   trained_scaling(layer, name) * layer.r[name]) for module, layer in layers.items()}
            for module, made in ready.items():
                if not (made.up.isfinite().all() and made.down.isfinite().all()):
                    raise ValueError(f"adapter {name!r} has weights that are not finite in layer {module}; load it anew")
            padded = any(isinstance(layer.scaling[name], Tensor) for layer in layers.values())
            rank = max(made.rank for made in ready.values()) if padded else None
            taken[part] = FusedAdapter(ready, present if wanted is None else wanted[part], present, active, rank, adapter,
                                       _order(pipe))
    return taken


def _order(pipe) -> list[str]:
    """The order the adapters came in, those that are fused already among them."""
    before = [name for model in models_of(pipe).values() for share in fused_in(model).parts.values() for name in share.order]
    return list(dict.fromkeys([*before, *adapter_names(pipe)]))


def _sums(model: nn.Module, shares: Mapping[str, FusedAdapter], modules: Iterable[str]) -> dict[str, Tensor]:
    """The weights of these modules with all that is fused, from the originals."""
    placed, found = dict(walk(model)), {}
    for module in modules:
        own = original(model, module, base_weight(placed[module]))
        parts = [(share.ready[module], share.fused_at[module]) for share in shares.values() if module in share.ready]
        found[module] = own
        if parts:
            total = own.float()
            for made, factor in parts:
                up, down = (half.to(own.device, torch.float32).flatten(1) for half in (made.up, made.down))
                total = total + (factor * made.alpha / made.rank) * (up @ down).view_as(own)
            found[module] = total.to(own.dtype)
        if not found[module].isfinite().all():
            raise ValueError(f"fusing makes layer {module} infinite in {str(own.dtype)[6:]}; give a smaller scale")
    return found


@torch.no_grad()
def _write(model: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Put the weights in their places, keeping the originals."""
    placed, kept = dict(walk(model)), fused_in(model)
    for module, value in weights.items():
        weight = base_weight(placed[module])
        if module not in kept.weights:
            kept.weights[module] = weight.detach().to("cpu", copy=True)
        weight.copy_(value)


def _put_back(pipe, part: str, name: str, share: FusedAdapter) -> None:
    before = active_adapters(pipe)
    modules = dict(walk(models_of(pipe)[part]))  # the model may have moved meanwhile
    ready = {module: Ready(made.down.to(base_weight(modules[module])), made.up.to(base_weight(modules[module])), made.alpha)
             for module, made in share.ready.items()}
    put_on(pipe, name, {part: ready}, share.adapter, share.rank)
    layers = layers_of(pipe, name)[part]
    for module, factor in share.scales.items():
        put_factor(layers[module], name, factor)
    activate(pipe, [*before, name] if share.active and name not in before else before)
    put_in_order(pipe, share.order)


def _report(pipe, layers: int) -> FuseReport:
    return FuseReport(tuple(fused_names(models_of(pipe))), layers)

