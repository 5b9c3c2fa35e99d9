"""The adapters of a pipeline: listed, switched, moved, swapped and removed."""

import warnings
from collections.abc import Iterable
from typing import Any

import torch
from diffusers import DiffusionPipeline
from pandas import DataFrame
from torch import Tensor

from lorabook.live.fuse import keep_fused
from lorabook.live.inject import add_adapter, delete_adapter, original_adapter, write_weights
from lorabook.live.layers import (
    activate,
    active_adapters,
    adapter_names,
    device_of,
    flat,
    layers_of,
    models_of,
    move_weights,
    read_scale,
    write_scale,
)
from lorabook.live.load import LoadReport, choose_components, read_for, report_of
from lorabook.live.match import Weights, match_layers, why_not_swapped
from lorabook.live.scales import set_steps
from lorabook.live.state import check_known, fused_names, locked, state_of
from lorabook.live.upstream import check_weights_available, is_compiled
from lorabook.lora.adapter import Adapter
from lorabook.lora.files import brief
from lorabook.show.tables import RowReport


class AdapterTable(RowReport):
    """The adapters on a pipeline, a row each: `table["ink"].ranks`; scales and ranks that occur."""

    row, empty = "adapter", "no adapters"

    def __init__(self, rows: Iterable[dict]):
        self.table = DataFrame(rows)

    def cells(self) -> DataFrame:
        """The table as people read it."""
        heads = ["adapter", "format", "components", "ranks", "active", "scale", "size", "device"]
        rows = [
            (
                row.name,
                row.format,
                ", ".join(row.components),
                ", ".join(map(str, row.ranks)),
                "fused" if row.fused else "yes" if row.active else "no",
                " to ".join(f"{scale:g}" for scale in row.scales),
                f"{row.megabytes:.1f} MB",
                row.device,
            )
            for row in self.rows
        ]
        return DataFrame(rows, columns=heads)


@locked
def list_adapters(pipe: DiffusionPipeline) -> AdapterTable:
    """The adapters on a pipeline, fused ones too: format, ranks, state, scales, size, device."""
    active, fused, rows = active_adapters(pipe), fused_names(pipe), []
    for name in adapter_names(pipe):
        if name not in fused:
            parts = layers_of(pipe, name)
            halves = [
                (layer.lora_A[name].weight, layer.lora_B[name].weight, read_scale(layer, name))
                for layer in flat(parts)
            ]
            original = original_adapter(pipe, next(iter(parts)), name)
            rows.append(_row(name, original, parts, halves, name in active, False))
    states = {component: state_of(model) for component, model in models_of(pipe).items()}
    for name in fused:
        parts = {part: state.fused[name] for part, state in states.items() if name in state.fused}
        halves = [
            (layer.down, layer.up, layer.scale)
            for part in parts.values()
            for layer in part.layers.values()
        ]
        loaded = next(iter(parts.values())).loaded
        components = [*parts, *layers_of(pipe, name)]
        rows.append(_row(name, loaded and loaded.adapter, components, halves, True, True))
    return AdapterTable(rows)


def _row(
    name: str,
    original: Adapter | None,
    components: Iterable[str],
    halves: list[tuple[Tensor, Tensor, float]],
    is_active: bool,
    is_fused: bool,
) -> dict[str, Any]:
    scales = [scale for *_, scale in halves]
    return {
        "name": name,
        "format": original.format if original else "diffusers",
        "components": tuple(components),
        "ranks": tuple(sorted({len(down) for down, *_ in halves})),
        "active": is_active,
        "scales": tuple(sorted({round(min(scales), 6), round(max(scales), 6)})),
        "fused": is_fused,
        "megabytes": sum(down.nbytes + up.nbytes for down, up, _ in halves) / 1e6,
        "device": str(halves[0][0].device),
    }


@locked
def enable_adapters(pipe: DiffusionPipeline, names: str | Iterable[str] | None = None) -> None:
    """Let adapters act again, at the scales they have, on their model's device; None lets all."""
    on = {*active_adapters(pipe), *_names(pipe, names)}
    activate(pipe, [name for name in adapter_names(pipe) if name in on])


@locked
def disable_adapters(pipe: DiffusionPipeline, names: str | Iterable[str] | None = None) -> None:
    """Switch adapters off; they stay on the pipeline with their scales. None switches all off."""
    off = _names(pipe, names)
    activate(pipe, [name for name in active_adapters(pipe) if name not in off])


@locked
def remove_adapter(pipe: DiffusionPipeline, name: str) -> None:
    """Take an adapter off the pipeline; what then carries none is plain again.

    Raises: ValueError for an unknown adapter, or one that is fused.
    """
    check_known(pipe, [name])
    set_steps(pipe, {name: ()})
    delete_adapter(pipe, name)


@locked
def unload_adapters(pipe: DiffusionPipeline) -> None:
    """Take all adapters off; what is fused stays in the weights for good.

    The originals are freed, as in diffusers, where `fuse_lora` and `unload_lora_weights` come
    before `save_pretrained` and `push_to_hub`. `unfuse` has nothing to work with afterwards: to
    have the base model again, call it first, or load the model anew.
    """
    check_known(pipe, ())
    keep_fused(pipe)
    for name in adapter_names(pipe):
        remove_adapter(pipe, name)


@locked
def move_adapter(pipe: DiffusionPipeline, name: str, device: str | torch.device) -> None:
    """Move an adapter's weights to a device, as to the CPU to spare a GPU's memory.

    Away from its model it cannot act and is switched off. What lets it act again
    (`enable_adapters`, `set_scales` with a scale that is not 0) brings it back to its model.

    Raises: ValueError for an unknown adapter, one that is fused, an unknown device, or offloaded
        weights.
    """
    check_known(pipe, [name])
    check_weights_available(models_of(pipe))
    try:
        target = torch.empty(0, device=device).device
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0][:120]
        raise ValueError(f"device {device!r} is not there: {reason}") from error
    if target.type == "meta":
        raise ValueError("the meta device holds no weights; move the adapter to the CPU")
    layers = flat(layers_of(pipe, name))
    if any(device_of(layer) != target for layer in layers):
        disable_adapters(pipe, name)
    for layer in layers:
        move_weights(layer, name, target)


@locked
def swap_adapter(
    pipe: DiffusionPipeline,
    name: str,
    source: Any,
    *,
    components: Iterable[str] | None = None,
    **find: Any,
) -> LoadReport:
    """Put another adapter in the place of one, under its name and at its scale.

    Where the new adapter has no further layers and no larger ranks (see `hotswap_rank` of
    `load_adapter`), weights are written into the layers that are there, and a compiled model goes
    on. Else the old is taken off and the new put on, and a compiled model compiles once more, with
    a warning.

    Args:
        pipe: A pipeline with the adapter.
        name: Of the adapter to be replaced.
        source: As in `load_adapter`, like `components` and `find`.

    Raises:
        ValueError: As `load_adapter`, or where the adapter is fused; the old adapter then stays.
    """
    check_known(pipe, [name])
    read = read_for(pipe, source, **find)
    where = brief(read.path or "the new adapter")
    adapter = choose_components(read.adapter, components, where)
    weights = match_layers(pipe, adapter, where)
    reason = why_not_swapped(pipe, name, weights)
    if reason is None:
        write_weights(pipe, name, weights, adapter, padded=True)
    else:
        if any(is_compiled(getattr(pipe, component)) for component in models_of(pipe)):
            warnings.warn(
                f"the new adapter {reason}, so the model is compiled once more on its next call",
                stacklevel=3,
            )
        _replace(pipe, name, weights, adapter)
    return report_of(pipe, name, read, adapter)


def _replace(pipe: DiffusionPipeline, name: str, weights: Weights, adapter: Adapter) -> None:
    """Take the old adapter off and put the new one on, layer by layer at the old one's scale."""
    active, before = active_adapters(pipe), layers_of(pipe, name)
    first = flat(before)[0]
    rank = None
    if isinstance(first.scaling[name], Tensor):  # prepared for swapping
        ranks = [own.rank for modules in weights.values() for own in modules.values()]
        rank = max(*ranks, first.r[name])
    scales = {
        component: {module: read_scale(layer, name) for module, layer in modules.items()}
        for component, modules in before.items()
    }
    numbers = {scale for modules in scales.values() for scale in modules.values()}
    usual = numbers.pop() if len(numbers) == 1 else 1.0
    delete_adapter(pipe, name)
    add_adapter(pipe, name, weights, adapter, rank=rank)
    for component, modules in layers_of(pipe, name).items():
        for module, layer in modules.items():
            write_scale(layer, name, scales.get(component, {}).get(module, usual))
    activate(pipe, active)


def _names(pipe: DiffusionPipeline, names: str | Iterable[str] | None) -> list[str]:
    if names is None:
        fused = fused_names(pipe)
        names = [name for name in adapter_names(pipe) if name not in fused]
    names = [names] if isinstance(names, str) else list(names)
    check_known(pipe, names)
    return names
