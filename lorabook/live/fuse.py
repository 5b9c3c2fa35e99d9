"""Adapters computed into the base weights, and exactly out of them again."""

import hashlib
import html
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from diffusers import DiffusionPipeline
from torch import nn

from lorabook.live.expand import steps_of
from lorabook.live.inject import convert_doras, entries_of, loaded_adapter
from lorabook.live.layers import (
    active_adapters,
    adapter_names,
    layers_of,
    models_of,
    read_scale,
    trained_scaling,
)
from lorabook.live.merged_weights import exchange
from lorabook.live.scale_schedule import steps_on
from lorabook.live.scales import layer_scales, resolve_scales
from lorabook.live.state import (
    FusedAdapter,
    FusedLayer,
    check_known,
    fused_names,
    lock_of,
    locked,
    state_of,
)
from lorabook.live.upstream import check_weights_available
from lorabook.types import Scales


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
    """Compute adapters into the base weights, where they cost no time; `unfuse` undoes it.

    The originals are kept on the CPU until `unload_adapters` lets them go; what is fused then stays
    for good. Fused adapters cannot be scaled, swapped or removed, nor by a call's
    `cross_attention_kwargs={"scale": …}`, which warns once; others can be loaded, scaled and
    removed meanwhile. After an error or an interruption everything is as before.

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
    names = list(scales or ())
    if scales is None:
        names = [name for name in active_adapters(pipe) if name not in fused_names(pipe)]
    _check_fusible(pipe, names, models)
    scales_by_layer = {}
    for name in names:
        changing = name in steps_on(pipe)
        if scales is not None:
            resolved = resolve_scales(pipe, scales[name], name)
            changing = steps_of(resolved, name)
            scales_by_layer[name] = layer_scales(pipe, name, resolved)
        if changing:
            raise ValueError(
                f"the scales of {name!r} change over the denoising, and fused weights cannot; set "
                "them without steps"
            )
    convert_doras(pipe, names)
    change: dict[str, dict[str, FusedAdapter]] = {component: {} for component in models}
    for name in names:
        adapters = _to_fuse(pipe, name, models, scales_by_layer.get(name))
        for component, adapter in adapters.items():
            change[component][name] = adapter
    report = _report(pipe, exchange(pipe, change, into_weights=True))
    if report.rounded:
        warnings.warn(
            f"the model keeps weights in {' and '.join(report.rounded)}, and the fused ones are "
            "rounded to it too: the picture differs from that with the adapter beside them; unfuse "
            "is exact",
            stacklevel=3,
        )
    return report


@locked
def unfuse(pipe: DiffusionPipeline, names: str | Iterable[str] | None = None) -> FuseReport:
    """Take fused adapters out of the weights and put them on the pipeline as they were before.

    Args:
        names: one name or several, in any order; None takes all.
    Returns: a FuseReport. When nothing is fused any more, `base_checksum` is what it was before.
    Raises: ValueError where nothing, or not that adapter, is fused, where the originals were let
        go, or where the model is offloaded. Nothing is changed then, nor by an error or an
        interruption on the way.
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
            f"adapter {lost[0]!r} is fused for good: unload_adapters let the originals go; load "
            "the model anew"
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
    return _report(pipe, exchange(pipe, change, into_weights=False))


@contextmanager
def fused(
    pipe: DiffusionPipeline,
    scales: Mapping[str, Scales] | None = None,
    *,
    components: Iterable[str] | None = None,
) -> Iterator[FuseReport]:
    """Fuse within a block, and undo it at its end, after an error too; arguments as in `fuse`."""
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
    """SHA-256 of a pipeline's weights without adapters': equal before fusing and after unfusing.

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


def _chosen_models(
    pipe: DiffusionPipeline, components: Iterable[str] | None
) -> dict[str, nn.Module]:
    models = models_of(pipe)
    components = models if components is None else components
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


def _to_fuse(
    pipe: DiffusionPipeline,
    name: str,
    models: Mapping[str, nn.Module],
    scales: Mapping[str, Mapping[str, float]] | None,
) -> dict[str, FusedAdapter]:
    """An adapter as it is on these models, by component.

    Args:
        scales: to fuse it at, by component and module; None for the present ones.
    """
    before = [one for model in models_of(pipe).values() for one in state_of(model).fused.values()]
    order = [other for one in before for other in one.order] + adapter_names(pipe)
    adapters = {}
    for component, layers in layers_of(pipe, name).items():
        if component not in models:
            continue
        fused_layers = {}
        for module, layer in layers.items():
            own = read_scale(layer, name)
            scale = own if scales is None else scales[component][module]
            up, down = (half[name].weight.detach() for half in (layer.lora_B, layer.lora_A))
            scaling = scale * trained_scaling(layer, name)
            entries = entries_of(layer, name)
            fused_layers[module] = FusedLayer(layer, entries, up, down, scale, scaling)
            if not (up.float().isfinite().all() and down.float().isfinite().all()):
                raise ValueError(
                    f"adapter {name!r} has weights that are not finite in layer {module}; load it "
                    "anew"
                )
        adapters[component] = FusedAdapter(
            fused_layers,
            models[component].peft_config[name],
            loaded_adapter(models[component], name),
            name in active_adapters(pipe),
            list(dict.fromkeys(order)),
        )
    return adapters


def _report(pipe: DiffusionPipeline, changed: int) -> FuseReport:
    states = [state_of(model) for model in models_of(pipe).values()]
    originals = [weight for state in states for weight in state.base_weights.values()]
    rounded = {str(weight.dtype)[6:] for weight in originals if weight.element_size() == 1}
    return FuseReport(tuple(fused_names(pipe)), changed, tuple(sorted(rounded)))
