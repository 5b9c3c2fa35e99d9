"""Adapters at a smaller rank, and the difference of two models as an adapter, by SVD."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from numbers import Integral
from typing import ClassVar

import torch
from pandas import DataFrame
from torch import Tensor

from lorabook.blocks import group_by_block
from lorabook.checks import is_number
from lorabook.lora.adapter import Adapter, Bases, Layer
from lorabook.lora.shapes import Shape, as_lora, shapes_of
from lorabook.lowrank import Svd, inner_product, rank_for_energy, svd, truncated
from lorabook.show.tables import Report


@dataclass(frozen=True)
class Resized:
    """What became of one layer, or of several."""

    before: int  # its rank: what it takes to hold it exactly; of several the largest
    after: int
    energy: float  # ‖ΔW‖² before
    lost: float  # ‖ΔW − ΔW after‖²
    numbers: tuple[int, int]  # how many its tensors held before and hold after

    @classmethod
    def total(cls, rows: Iterable["Resized"]) -> "Resized":
        """Layers as one: the largest ranks, and the sums of the rest."""
        rows = list(rows)
        return cls(
            max((row.before for row in rows), default=0),
            max((row.after for row in rows), default=0),
            sum(row.energy for row in rows),
            sum(row.lost for row in rows),
            (sum(row.numbers[0] for row in rows), sum(row.numbers[1] for row in rows)),
        )

    @property
    def kept(self) -> float:
        """The share of the energy that is left; 1 for a layer of zeros."""
        return 1 - self.error**2

    @property
    def error(self) -> float:
        """‖ΔW − ΔW after‖ / ‖ΔW‖."""
        return (self.lost / self.energy) ** 0.5 if self.energy else 0.0


@dataclass(frozen=True, eq=False, repr=False)
class ResizeReport(Report):
    """What a smaller rank cost an adapter; shows itself as a table by block."""

    layers: Mapping[str, Mapping[str, Resized]]  # by component and module
    formats: ClassVar = {
        "numbers_before": "{:,}",
        "numbers_after": "{:,}",
        "energy_kept": "{:.4%}",
        "relative_error": "{:.2g}",
    }

    @property
    def total(self) -> Resized:
        """All layers as one."""
        return Resized.total(row for rows in self.layers.values() for row in rows.values())

    def by_block(self) -> dict[str, Resized]:
        """The layers of each block as one; a text encoder is a block."""
        places = [(part, module) for part, modules in self.layers.items() for module in modules]
        return {
            block: Resized.total(self.layers[component][module] for component, module in inside)
            for block, inside in group_by_block(places).items()
        }

    @property
    def table(self) -> DataFrame:
        """A row a block, and one for all of them; ranks are the largest there."""
        rows = self.by_block() | {"all": self.total}
        return DataFrame(
            [
                (block, row.before, row.after, *row.numbers, row.kept, row.error)
                for block, row in rows.items()
            ],
            columns=["block", "rank_before", "rank_after", *self.formats],
        )


def resize(
    adapter: Adapter,
    *,
    rank: int | None = None,
    energy: float | None = None,
    bases: Bases | None = None,
) -> tuple[Adapter, ResizeReport]:
    """An adapter with each layer at the best approximation of a rank, or with a share of its ‖ΔW‖².

    Layers become plain LoRA of scaling 1 (alpha = rank), in the number format they had; what
    rounding to it costs is not in the report. A plain layer that is small enough stays as it is,
    bit for bit.
    """
    _check(rank, energy)
    shapes = shapes_of(adapter, bases)
    rows: dict[str, dict[str, Resized]] = {component: {} for component in adapter.layers}

    def smaller(component: str, module: str, layer: Layer) -> Layer:
        base = (bases or {}).get(component, {}).get(module)
        up, down = layer.factors(base)
        if not (up.isfinite().all() and down.isfinite().all()):
            raise ValueError(
                f"layer {component}.{module} has weights that are not finite; its training failed, "
                "use an earlier checkpoint"
            )
        layer, rows[component][module] = _resize_layer(
            layer, up, down, shapes[component][module], rank, energy
        )
        return layer

    return adapter.map(smaller), ResizeReport(rows)


def difference(
    tuned: Mapping[str, Tensor], base: Mapping[str, Tensor], rank: int
) -> dict[str, Layer]:
    """The difference of two models' weights as LoRA layers, each the best of its rank, by module.

    Modules that do not differ are left out.
    """
    _check(rank, None)
    _check_alike(tuned, base)
    layers = {}
    for module, weight in tuned.items():
        delta = weight.float() - base[module].to(weight.device, torch.float32)
        if delta.any():
            layers[module] = _cut(svd(delta.flatten(1)), tuple(weight.shape), rank)
    return layers


def _resize_layer(
    layer: Layer, up: Tensor, down: Tensor, shape: Shape, rank: int | None, energy: float | None
) -> tuple[Layer, Resized]:
    numbers = sum(tensor.numel() for tensor in layer.tensors.values())
    decomposed = None
    if energy is not None or not layer.is_plain or layer.rank > rank:
        decomposed = svd(up, down)
        rank = rank or rank_for_energy(decomposed[1], energy)
    if layer.is_plain and layer.rank <= rank:
        whole = inner_product((up, down), (up, down))
        return layer, Resized(up.shape[1], layer.rank, whole, 0.0, (numbers, numbers))
    dtype = next(iter(layer.tensors.values())).dtype
    layer = _cut(decomposed, shape, rank).map(lambda tensor: tensor.to(dtype))
    squares = decomposed[1].square()
    whole, lost = float(squares.sum()), float(squares[rank:].sum())
    after = sum(tensor.numel() for tensor in layer.tensors.values())
    return layer, Resized(up.shape[1], layer.rank, whole, lost, (numbers, after))


def _cut(decomposed: Svd, shape: Shape, rank: int) -> Layer:
    """The layer of a rank from a decomposition, in float32."""
    return as_lora(*(half.float() for half in truncated(*decomposed, rank)), shape)


def _check(rank, energy) -> None:
    if (rank is None) == (energy is None):
        raise ValueError("give one of rank (a whole number) and energy (a share), not both")
    if rank is not None and (isinstance(rank, bool) or not isinstance(rank, Integral) or rank < 1):
        raise ValueError(f"rank must be a whole number of 1 or more, not {rank!r}")
    if energy is not None and not (is_number(energy) and 0 < energy <= 1):
        raise ValueError(f"energy must be a share above 0 and up to 1, not {energy!r}")


def _check_alike(tuned: Mapping[str, Tensor], base: Mapping[str, Tensor]) -> None:
    shapes = [{name: tuple(w.shape) for name, w in weights.items()} for weights in (tuned, base)]
    for module in [*tuned, *base]:
        one, other = (of_model.get(module, "absent") for of_model in shapes)
        if one != other:
            raise ValueError(f"layer {module} is {one} in the tuned model and {other} in the base")
        if not all(weights[module].float().isfinite().all() for weights in (tuned, base)):
            raise ValueError(f"layer {module} has weights that are not finite; load the model anew")
