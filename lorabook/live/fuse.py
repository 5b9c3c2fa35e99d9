"""Adapters computed into the base weights, and exactly out of them again."""

import hashlib
import html
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lorabook.live.call_scale import watch_call_scale
from lorabook.live.expand import steps_of
from lorabook.live.fused_weights import exchange
from lorabook.live.inject import adapter_of, source_of
from lorabook.live.layers import (
    active_adapters,
    adapter_names,
    check_known,
    factor_of,
    layers_of,
    models_of,
    trained_scaling,
)
from lorabook.live.locks import lock_of, locked
from lorabook.live.match import Ready
from lorabook.live.offloaded import check_at_hand
from lorabook.live.originals import FusedAdapter, fused_in, fused_names
from lorabook.live.scale_schedule import steps_on
from lorabook.live.scales import layer_scales, resolve_scales
from lorabook.live.undora import make_scalable


@dataclass(frozen=True, repr=False)
class FuseReport:
    """What `fuse` or `unfuse` did.

    Attributes:
        fused: the adapters that are in the weights now.
        layers: how many weights were changed.
        rounded: the 8-bit formats that the fused weights are kept in, as after `enable_layerwise_casting`; small ΔW are lost
            in them.
    """

    fused: tuple[str, ...]
    layers: int
    rounded: tuple[str, ...] = ()

    def __str__(self):
        inside = f"fused: {', '.join(self.fused)}" if self.fused else "nothing is fused"
        rounded = (
            f", rounded to {' and '.join(self.rounded)}, in which the model is kept"
            if self.rounded
            else ""
        )
        return f"{inside}; {self.layers} weights changed{rounded}"

    __repr__ = __str__

    def _repr_html_(self):
        return f"<p>{html.escape(str(self))}</p>"


@locked
def fuse(
    pipe, scales: Mapping[str, object] | None = None, *, components: Iterable[str] | None = None
) -> FuseReport:
    """Compute adapters into the base weights, so that they cost no time; `unfuse` gives the base back bit for bit.

    The originals are kept beside, on the CPU, until `unload_adapters` lets them go and what is fused stays for good. Fused
    adapters cannot be scaled, swapped or removed, nor by a call's `cross_attention_kwargs={"scale": …}`, which warns once;
    others can be loaded, scaled and removed meanwhile. After an error or an interruption everything is as before.

    Args:
        pipe: a pipeline with adapters.
        scales: as in `set_scales`, in place of the present ones; None fuses those that take part, at their present scales.
        components: "unet", "text_encoder" …; None takes all. What is not fused of an adapter stays on as it is.
    Returns: a FuseReport.
    Raises: ValueError for an unknown adapter or component, one that is fused already, scales that change over the
        denoising, weights that are not finite, or a model that is offloaded or quantised. Then nothing is changed.
    Warns: where the model keeps its weights in 8 bits, to which the sums are rounded.
    """
    if scales is not None and not isinstance(scales, Mapping):
        raise ValueError(
            f"scales must be a dictionary by adapter's name, as {{'ink': 0.8}}, or None; not {scales!r:.80}"
        )
    already = fused_names(models_of(pipe))
    names = (
        [name for name in active_adapters(pipe) if name not in already]
        if scales is None
        else list(scales)
    )
    models = _chosen(pipe, components)
    _check(pipe, names, scales, models)
    make_scalable(pipe, names)
    taken = {
        name: _taken(pipe, name, None if scales is None else scales[name], models) for name in names
    }
    report = _report(pipe, exchange(pipe, taken, fused=True))
    if report.rounded:
        warnings.warn(
            f"the model keeps weights in {' and '.join(report.rounded)}, and the fused ones are rounded to it "
            "too: the picture differs from that with the adapter beside them; unfuse is exact",
            stacklevel=3,
        )
    return report


@locked
def unfuse(pipe, names: str | Iterable[str] | None = None) -> FuseReport:
    """Take fused adapters out of the weights and put them on the pipeline as they were before.

    Args:
        names: one name or several, in any order; None takes all.
    Returns: a FuseReport. When nothing is fused any more, `base_checksum` is what it was before.
    Raises: ValueError where nothing, or not that adapter, is fused, where the originals were let go, or where the model is
        offloaded. Nothing is changed then, nor by an error or an interruption on the way.
    """
    models = models_of(pipe)
    known = fused_names(models)
    if names is not None and not isinstance(names, (str, Iterable)):
        raise ValueError(f"names must be an adapter's name, or several, not {names!r:.80}")
    names = known if names is None else [names] if isinstance(names, str) else list(names)
    for_good = [name for model in models.values() for name in fused_in(model).for_good]
    lost = [name for name in (names or for_good) if name in for_good and name not in known]
    if lost:
        raise ValueError(
            f"adapter {lost[0]!r} is fused for good: unload_adapters let the originals go; load the model anew"
        )
    if not known:
        raise ValueError(
            "nothing is fused, so there is nothing to unfuse; fuse(pipe) fuses the adapters that take part"
        )
    for name in names:
        if name not in known:
            raise ValueError(f"adapter {name!r} is not fused; fused are: {', '.join(known)}")
    check_at_hand(models)
    taken = {
        name: {
            part: fused_in(model).parts[name]
            for part, model in models.items()
            if name in fused_in(model).parts
        }
        for name in names
    }
    return _report(pipe, exchange(pipe, taken, fused=False))


@contextmanager
def fused(
    pipe, scales: Mapping[str, object] | None = None, *, components: Iterable[str] | None = None
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
    """SHA-256 of a pipeline's weights, those of adapters on it left out: equal before fusing and after unfusing.

    Raises: ValueError where weights are offloaded.
    """
    check_at_hand(models_of(pipe))
    seen = hashlib.sha256()
    for part, model in models_of(pipe).items():
        weights = {
            name.replace(".base_layer.", "."): value
            for name, value in model.state_dict().items()
            if ".lora_" not in name
        }
        for name in sorted(weights):
            seen.update(f"{part}.{name}".encode())
            seen.update(
                weights[name].detach().cpu().contiguous().flatten().view(torch.uint8).numpy()
            )
    return seen.hexdigest()


def _chosen(pipe, parts: Iterable[str] | None) -> dict[str, nn.Module]:
    models = models_of(pipe)
    wanted = list(models) if parts is None else [parts] if isinstance(parts, str) else list(parts)
    for part in wanted:
        if part not in models:
            raise ValueError(
                f"{part!r} is no component of this pipeline that carries adapters; it has: {', '.join(models)}"
            )
    return {part: models[part] for part in wanted}


def _check(pipe, names: list[str], scales: Mapping | None, models: Mapping[str, nn.Module]) -> None:
    if already := [name for name in names if name in fused_names(models_of(pipe))]:
        raise ValueError(
            f"adapter {already[0]!r} is fused already; call unfuse(pipe, {already[0]!r}) first"
        )
    check_known(pipe, names)
    check_at_hand(models_of(pipe))
    if not names:
        raise ValueError(
            "no adapter takes part, so there is nothing to fuse; load one, or name it with its scale"
        )
    for name in names:
        if not layers_of(pipe, name).keys() & models.keys():
            raise ValueError(
                f"adapter {name!r} has nothing in {', '.join(models) or 'no component'}; it is for "
                + ", ".join(layers_of(pipe, name))
            )
        if scales is not None:
            layer_scales(pipe, name, resolve_scales(pipe, scales[name], name))
        changing = (
            name in steps_on(pipe)
            if scales is None
            else steps_of(resolve_scales(pipe, scales[name], name), name)
        )
        if changing:
            raise ValueError(
                f"the scales of {name!r} change over the denoising, and fused weights cannot; set them without "
                "steps"
            )


def _taken(pipe, name: str, scales, models: Mapping[str, nn.Module]) -> dict[str, FusedAdapter]:
    """The adapter as it is on the pipeline, by component, for those that are to be fused."""
    adapter, active = adapter_of(pipe, name), name in active_adapters(pipe)
    wanted = (
        None if scales is None else layer_scales(pipe, name, resolve_scales(pipe, scales, name))
    )
    taken = {}
    for part, layers in layers_of(pipe, name).items():
        if part in models:
            present = {module: factor_of(layer, name) for module, layer in layers.items()}
            ready = {
                module: Ready(
                    layer.lora_A[name].weight.detach(),
                    layer.lora_B[name].weight.detach(),
                    trained_scaling(layer, name) * layer.r[name],
                )
                for module, layer in layers.items()
            }
            for module, made in ready.items():
                if not (made.up.float().isfinite().all() and made.down.float().isfinite().all()):
                    raise ValueError(
                        f"adapter {name!r} has weights that are not finite in layer {module}; load it anew"
                    )
            padded = any(isinstance(layer.scaling[name], Tensor) for layer in layers.values())
            rank = max(made.rank for made in ready.values()) if padded else None
            taken[part] = FusedAdapter(
                ready,
                present if wanted is None else wanted[part],
                present,
                active,
                rank,
                adapter,
                _order(pipe),
                source_of(pipe, name),
            )
    return taken


def _order(pipe) -> list[str]:
    """The order the adapters came in, those that are fused already among them."""
    before = [
        name
        for model in models_of(pipe).values()
        for share in fused_in(model).parts.values()
        for name in share.order
    ]
    return list(dict.fromkeys([*before, *adapter_names(pipe)]))


def _report(pipe, layers: int) -> FuseReport:
    watch_call_scale(pipe)
    models = models_of(pipe)
    kept = [weight for model in models.values() for weight in fused_in(model).weights.values()]
    rounded = {str(weight.dtype)[6:] for weight in kept if weight.element_size() == 1}
    return FuseReport(tuple(fused_names(models)), layers, tuple(sorted(rounded)))
