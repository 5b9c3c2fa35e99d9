"""The adapters of a pipeline: listed, switched, moved, swapped and removed."""

import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch

from lorabook.checks import listed
from lorabook.live.fuse import keep_fused
from lorabook.live.inject import (
    add_adapter,
    delete_adapter,
    original_adapter,
    write_weights,
)
from lorabook.live.layers import (
    activate,
    active_adapters,
    adapter_names,
    device_of,
    layers_of,
    models_of,
    move_weights,
    read_scale,
    write_scale,
)
from lorabook.live.load import LoadReport, choose_components, read_for, report_of
from lorabook.live.match import match_layers, why_not_swapped
from lorabook.live.scale_schedule import set_steps
from lorabook.live.state import check_known, fused_names, locked, state_of
from lorabook.live.upstream import check_weights_available
from lorabook.lora.adapter import Adapter
from lorabook.lora.files import brief
from lorabook.show.tables import as_html, as_text


@dataclass(frozen=True)
class AdapterRow:
    """One adapter on a pipeline; `scales` is its number, or its smallest and largest."""

    name: str
    format: str
    components: tuple[str, ...]
    ranks: tuple[int, ...]
    active: bool
    scales: tuple[float, ...]
    fused: bool
    megabytes: float
    device: str


class AdapterTable(Sequence):
    """The rows of `list_adapters`; shows itself."""

    def __init__(self, rows: Iterable[AdapterRow]):
        self.rows = tuple(rows)

    def __getitem__(self, index):
        """The row of a number, or of an adapter's name."""
        if isinstance(index, str):
            found = [row for row in self.rows if row.name == index]
            if not found:
                raise KeyError(
                    f"no adapter {index!r}; there are: {listed(row.name for row in self.rows)}"
                )
            return found[0]
        return self.rows[index]

    def __len__(self) -> int:
        return len(self.rows)

    def _cells(self) -> list[list[str]]:
        return [
            [
                row.name,
                row.format,
                ", ".join(row.components),
                ", ".join(map(str, row.ranks)),
                "fused" if row.fused else "yes" if row.active else "no",
                " to ".join(f"{s:g}" for s in row.scales),
                f"{row.megabytes:.1f} MB",
                row.device,
            ]
            for row in self.rows
        ]

    def __str__(self):
        if not self.rows:
            return "no adapters"
        return as_text(list(_HEADS), self._cells())

    __repr__ = __str__

    def _repr_html_(self):
        return as_html(list(_HEADS), self._cells())


_HEADS = ("adapter", "format", "components", "ranks", "active", "scale", "size", "device")


@locked
def list_adapters(pipe) -> AdapterTable:
    """The adapters on a pipeline, those that are fused too: format, ranks, whether they take part, scales, size, device."""
    active, models = active_adapters(pipe), models_of(pipe)
    rows = [
        _row(pipe, name, name in active)
        for name in adapter_names(pipe)
        if name not in fused_names(pipe)
    ]
    for name in fused_names(pipe):
        shares = {
            part: state_of(model).fused[name]
            for part, model in models.items()
            if name in state_of(model).fused
        }
        layers = [layer for share in shares.values() for layer in share.layers.values()]
        loaded = next(iter(shares.values())).loaded
        rows.append(
            AdapterRow(
                name,
                loaded.adapter.format if loaded else "diffusers",
                (*shares, *layers_of(pipe, name)),
                tuple(sorted({len(layer.down) for layer in layers})),
                True,
                _span([layer.scale for layer in layers]),
                True,
                sum(_size(half) for layer in layers for half in (layer.up, layer.down)) / 1e6,
                str(layers[0].up.device),
            )
        )
    return AdapterTable(rows)


@locked
def enable_adapters(pipe, names: str | Iterable[str] | None = None) -> None:
    """Let adapters take part again, at the scales they have, on their model's device; None lets all."""
    chosen_ones = _names(pipe, names)
    active = active_adapters(pipe)
    activate(pipe, [name for name in adapter_names(pipe) if name in active or name in chosen_ones])


@locked
def disable_adapters(pipe, names: str | Iterable[str] | None = None) -> None:
    """Switch adapters off and keep them on the pipeline with their scales; None switches all off."""
    off = _names(pipe, names)
    activate(pipe, [name for name in active_adapters(pipe) if name not in off])


@locked
def remove_adapter(pipe, name: str) -> None:
    """Take an adapter off the pipeline; what then carries none is plain again.

    Raises: ValueError for an unknown adapter, or one that is fused.
    """
    check_known(pipe, [name])
    set_steps(pipe, {name: ()})
    delete_adapter(pipe, name)


@locked
def unload_adapters(pipe) -> None:
    """Take all adapters off; what is fused stays in the weights for good, and the originals are freed.

    As in diffusers, where `fuse_lora` and `unload_lora_weights` come before `save_pretrained` and `push_to_hub`. `unfuse`
    has nothing to work with afterwards: to have the base model again, call it first, or load the model anew.
    """
    check_known(pipe, ())
    keep_fused(pipe)
    for name in adapter_names(pipe):
        remove_adapter(pipe, name)


@locked
def move_adapter(pipe, name: str, device: str | torch.device) -> None:
    """Move an adapter's weights to a device, as to the CPU to spare a GPU's memory.

    Away from its model it cannot take part and is switched off. What lets it take part again (`enable_adapters`,
    `set_scales` with a scale that is not 0) brings it back to its model. Raises ValueError for an unknown adapter, one that
    is fused, an unknown device, or offloaded weights.
    """
    check_known(pipe, [name])
    check_weights_available(models_of(pipe))
    try:
        place = torch.empty(0, device=device).device
    except (RuntimeError, AssertionError) as error:
        raise ValueError(
            f"device {device!r} is not there: {str(error).splitlines()[0][:120]}"
        ) from error
    if place.type == "meta":
        raise ValueError(
            "the meta device holds no weights; move the adapter to the CPU, or remove it"
        )
    layers = [layer for part in layers_of(pipe, name).values() for layer in part.values()]
    if any(device_of(layer) != place for layer in layers):
        disable_adapters(pipe, name)
    for layer in layers:
        move_weights(layer, name, place)


@locked
def swap_adapter(
    pipe, name: str, source, *, components: Iterable[str] | None = None, **find
) -> LoadReport:
    """Put another adapter in the place of one, under its name and at its scale.

    Weights are written into the layers that are there where the new adapter fits into them: it has no further layers and no
    larger ranks (see `hotswap_rank` of `load_adapter`). Then a compiled model goes on without compiling anew. Else the old
    is taken off and the new put on.

    Args:
        pipe: a pipeline with the adapter.
        name: of the adapter to be replaced.
        source, components, **find: as in `load_adapter`.
    Returns: a LoadReport.
    Raises: ValueError as `load_adapter`, or where the adapter is fused; the old adapter then stays.
    Warns: where a compiled model will be compiled once more.
    """
    check_known(pipe, [name])
    found = read_for(pipe, source, **find)
    adapter = choose_components(found.adapter, components, brief(found.path or "the new adapter"))
    weights = match_layers(pipe, adapter, brief(found.path or "the new adapter"))
    reason = why_not_swapped(pipe, name, weights)
    if reason is None:
        write_weights(pipe, name, weights, adapter, padded=True, source=source)
    else:
        if _is_compiled(pipe):
            warnings.warn(
                f"the new adapter {reason}, so the model is compiled once more on its next call",
                stacklevel=3,
            )
        _replace(pipe, name, weights, adapter, source)
    return report_of(pipe, name, found, adapter)


def _replace(pipe, name: str, weights: Mapping, adapter: Adapter, source) -> None:
    before, order = active_adapters(pipe), layers_of(pipe, name)
    factors = {
        (part, module): read_scale(layer, name)
        for part, layers in order.items()
        for module, layer in layers.items()
    }
    usual = next(iter(factors.values())) if len(set(factors.values())) == 1 else 1.0
    first = next(layer for layers in order.values() for layer in layers.values())
    prepared = isinstance(first.scaling[name], torch.Tensor)
    most = max(made.rank for layers in weights.values() for made in layers.values())
    delete_adapter(pipe, name)
    rank = max(most, first.r[name]) if prepared else None
    add_adapter(pipe, name, weights, adapter, rank=rank, source=source)
    for part, layers in layers_of(pipe, name).items():
        for module, layer in layers.items():
            write_scale(layer, name, factors.get((part, module), usual))
    activate(pipe, before)


def _row(pipe, name: str, active: bool) -> AdapterRow:
    parts = layers_of(pipe, name)
    layers = [layer for found in parts.values() for layer in found.values()]
    origin = original_adapter(pipe, next(iter(parts)), name)
    halves = [half.weight for layer in layers for half in (layer.lora_A[name], layer.lora_B[name])]
    return AdapterRow(
        name,
        origin.format if origin else "diffusers",
        tuple(parts),
        tuple(sorted({layer.r[name] for layer in layers})),
        active,
        _span([read_scale(layer, name) for layer in layers]),
        False,
        sum(map(_size, halves)) / 1e6,
        str(halves[0].device),
    )


def _names(pipe, names: str | Iterable[str] | None) -> list[str]:
    fused = fused_names(pipe)
    free = [name for name in adapter_names(pipe) if name not in fused]
    names = free if names is None else [names] if isinstance(names, str) else list(names)
    check_known(pipe, names)
    return names


def _is_compiled(pipe) -> bool:
    models = [getattr(pipe, part) for part in models_of(pipe)]
    return any(
        hasattr(model, "_orig_mod") or getattr(model, "_compiled_call_impl", None)
        for model in models
    )


def _span(numbers: list[float]) -> tuple[float, ...]:
    return tuple(sorted({round(min(numbers), 6), round(max(numbers), 6)}))


def _size(tensor: torch.Tensor) -> int:
    return tensor.numel() * tensor.element_size()
