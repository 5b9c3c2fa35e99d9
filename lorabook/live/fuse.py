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

from lorabook.live.expand import LayerScales, steps_of
from lorabook.live.inject import convert_doras, entries_of, loaded_adapter
from lorabook.live.layers import (
    active_adapters,
    adapter_names,
    layers_of,
    models_of,
    trained_scaling,
)
from lorabook.live.merged_weights import exchange
from lorabook.live.scales import layer_scales, resolve_scales, scales_of
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
    """What `fuse` or `unfuse` did."""

    fused: tuple[str, ...]  # the adapters that are in the weights now
    layers: int  # how many weights were changed
    # the 8-bit formats that fused weights are kept in (`enable_layerwise_casting`), losing small ΔW
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
    `cross_attention_kwargs={"scale": …}`, which warns once. After an error or an interruption
    everything is as before. Where the model keeps 8-bit weights, the sums are rounded, with a
    warning.

    Args:
        pipe: A pipeline with adapters.
        scales: As in `set_scales`, in place of the present ones; None fuses the active adapters at
            their present scales.
        components: "unet", "text_encoder" …; None takes all. What is not fused of an adapter stays
            on as it is.

    Raises:
        ValueError: For an unknown adapter or component, one that is fused already, scales that
            change over the denoising, weights that are not finite, or a model that is offloaded or
            quantised.
    """
    if scales is not None and not isinstance(scales, Mapping):
        raise ValueError(
            f"scales must be a dictionary, as {{'ink': 0.8}}, or None; not {scales!r:.80}"
        )
    models = _chosen_models(pipe, components)
    names = list(scales or ())
    if scales is None:
        names = [name for name in active_adapters(pipe) if name not in fused_names(pipe)]
    _check_fusible(pipe, names, models)
    table = scales_of(pipe)
    numbers, steps = dict(table), dict(table.steps)
    for name, value in (scales or {}).items():
        resolved = resolve_scales(pipe, value, name)
        numbers[name], steps[name] = layer_scales(pipe, name, resolved), steps_of(resolved, name)
    for name in names:
        if steps.get(name):
            raise ValueError(
                f"the scales of {name!r} change over the denoising, and fused weights cannot; set "
                "them without steps"
            )
    convert_doras(pipe, names)
    fusing = {name: _to_fuse(pipe, name, models, numbers[name]) for name in names}
    change = {
        component: {name: parts[component] for name, parts in fusing.items() if component in parts}
        for component in models
    }
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
        pipe: A pipeline; when nothing is fused any more, its `base_checksum` is what it was before.
        names: One name or several, in any order; None takes all.

    Raises:
        ValueError: Where nothing, or not that adapter, is fused, where the originals were let go,
            or where the model is offloaded. Nothing is changed then.
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
            f"adapter {lost[0]!r} is fused for good by unload_adapters; load the model anew"
        )
    if not known:
        raise ValueError("nothing is fused, so there is nothing to unfuse; fuse(pipe) fuses")
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
                f"{component!r} is no component with adapters; there are: {', '.join(models)}"
            )
    return {component: models[component] for component in chosen}


def _check_fusible(
    pipe: DiffusionPipeline, names: list[str], models: Mapping[str, nn.Module]
) -> None:
    for name in names:
        if name in fused_names(pipe):
            raise ValueError(
                f"adapter {name!r} is fused already; call unfuse(pipe, {name!r}) first"
            )
    check_known(pipe, names)
    check_weights_available(models_of(pipe))
    if not names:
        raise ValueError("no adapter is active, so there is nothing to fuse; load or name one")
    for name in names:
        components = layers_of(pipe, name)
        if not components.keys() & models.keys():
            raise ValueError(
                f"adapter {name!r} has nothing in {', '.join(models) or 'no component'}; it is for "
                f"{', '.join(components)}"
            )


def _to_fuse(
    pipe: DiffusionPipeline, name: str, models: Mapping[str, nn.Module], scales: LayerScales
) -> dict[str, FusedAdapter]:
    """An adapter as it is on these models, by component, at these scales."""
    before = [one for model in models_of(pipe).values() for one in state_of(model).fused.values()]
    order = [other for one in before for other in one.order] + adapter_names(pipe)
    adapters = {}
    for component, layers in layers_of(pipe, name).items():
        if component not in models:
            continue
        fused_layers = {}
        for module, layer in layers.items():
            scale = scales[component][module]
            up, down = (half[name].weight.detach() for half in (layer.lora_B, layer.lora_A))
            scaling, entries = scale * trained_scaling(layer, name), entries_of(layer, name)
            fused_layers[module] = FusedLayer(layer, entries, up, down, scale, scaling)
            if not (up.float().isfinite().all() and down.float().isfinite().all()):
                raise ValueError(
                    f"adapter {name!r} has weights that are not finite in layer {module}; load "
                    "it anew"
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
