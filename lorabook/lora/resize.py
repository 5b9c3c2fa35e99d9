"""Adapters at a smaller rank, and the difference of two models as an adapter, by singular value decomposition."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from numbers import Integral, Real

import torch
from torch import Tensor

from lorabook.blocks import block_map
from lorabook.lora.adapter import Adapter, Layer
from lorabook.lora.shapes import as_lora, shapes_of
from lorabook.lowrank import rank_for_energy, svd_of_product, truncated
from lorabook.show.tables import as_html, as_text

Svd = tuple[Tensor, Tensor, Tensor]


@dataclass(frozen=True)
class Resized:
    """What became of one layer.

    Attributes:
        before, after: its rank; before is what it takes to hold the layer exactly.
        energy: ‖ΔW‖² before.
        lost: ‖ΔW − ΔW after‖².
        numbers: how many its tensors held before and hold after.
    """

    before: int
    after: int
    energy: float
    lost: float
    numbers: tuple[int, int]

    @property
    def kept(self) -> float:
        """The share of the energy that is kept; 1 for a layer of zeros."""
        return 1 - self.error**2

    @property
    def error(self) -> float:
        """‖ΔW − ΔW after‖ / ‖ΔW‖."""
        return (self.lost / self.energy) ** 0.5 if self.energy else 0.0


@dataclass(frozen=True, repr=False)
class ResizeReport:
    """What `resize` made of an adapter, layer by layer; shows itself as a table by block.

    Attributes:
        layers: by component and module.
    """

    layers: Mapping[str, Mapping[str, Resized]]

    @property
    def total(self) -> Resized:
        """All layers as one: the largest ranks, and the sums of the rest."""
        return _sum([row for rows in self.layers.values() for row in rows.values()])

    def by_block(self) -> dict[str, Resized]:
        """The layers of each block as one; a text encoder is a block."""
        blocks: dict[str, Resized] = {}
        for part, rows in self.layers.items():
            groups = block_map(rows) if part == "unet" else {part: list(rows)}
            blocks |= {
                block: _sum([rows[module] for module in modules])
                for block, modules in groups.items()
            }
        return blocks

    def _rows(self) -> list[list[str]]:
        blocks = self.by_block() | {"all": self.total}
        return [
            [
                block,
                f"{row.before} → {row.after}",
                f"{row.numbers[0]:,} → {row.numbers[1]:,}",
                f"{row.kept:.4%}",
                f"{row.error:.2g}",
            ]
            for block, row in blocks.items()
        ]

    def __str__(self):
        return as_text(_HEADS, self._rows())

    __repr__ = __str__

    def _repr_html_(self):
        return as_html(_HEADS, self._rows())


_HEADS = ["block", "largest rank", "numbers", "energy kept", "relative error"]


def resize(
    adapter: Adapter,
    *,
    rank: int | None = None,
    energy: float | None = None,
    bases: Mapping[str, Mapping[str, Tensor]] | None = None,
) -> tuple[Adapter, ResizeReport]:
    """An adapter with each layer at the best approximation of a rank.

    Layers become plain LoRA of scaling 1 (alpha = rank), in the number format they had; what rounding to it costs is not
    in the report. A plain layer that is small enough already stays as it is, bit for bit.

    Args:
        adapter: of any kind.
        rank: the largest rank of a layer.
        energy: instead, the share of ‖ΔW‖² that each layer keeps, above 0, up to 1; each takes the smallest rank for it.
        bases: the model's own weights by component and module, which a DoRA needs and which tell a weight's shape.
    Returns: the adapter, and a ResizeReport.
    Raises: ValueError unless one of rank and energy is given and in its range; for a DoRA without its base; for weights
        that are not finite.
    """
    _check(rank, energy)
    shapes, bases = shapes_of(adapter, bases), bases or {}
    layers: dict[str, dict[str, Layer]] = {}
    rows: dict[str, dict[str, Resized]] = {}
    for part, found in adapter.layers.items():
        for module, layer in found.items():
            base = bases.get(part, {}).get(module)
            made = _resized(layer, base, shapes[part][module], rank, energy, f"{part}.{module}")
            layers.setdefault(part, {})[module], rows.setdefault(part, {})[module] = made
    return replace(adapter, layers=layers), ResizeReport(rows)


def difference(
    tuned: Mapping[str, Tensor],
    base: Mapping[str, Tensor],
    rank: int,
) -> tuple[dict[str, Layer], dict[str, Resized]]:
    """The difference of two models' weights as LoRA layers, each the best of its rank.

    Args:
        tuned, base: the same weights by module, (out, in) or (out, in, height, width), in any floating point format.
        rank: of each layer, 1 or more; a layer whose weight has fewer rows or columns takes as many as it has.
    Returns: plain layers in float32, of scaling 1, and what was kept in each; modules that do not differ are left out.
    Raises: ValueError for another rank, weights that the two models do not share, or weights that are not finite.
    """
    _check(rank, None)
    _check_alike(tuned, base)
    layers, rows = {}, {}
    for module, weight in tuned.items():
        delta = weight.float() - base[module].to(weight.device, torch.float32)
        if not delta.any():
            continue
        layers[module], rows[module] = _truncated(
            svd(delta.flatten(1)), tuple(weight.shape), rank, weight.numel()
        )
    return layers, rows


def svd(matrix: Tensor) -> Svd:
    """The thin SVD of a matrix in float64, by the eigenvectors of its smaller Gram matrix.

    For 1280 × 5120 on one core a quarter of `torch.linalg.svd`'s time. Singular values below 1e-7 of the largest are
    rounding, as they are in float32.

    Args:
        matrix: (out, in), finite.
    Returns: (U, S, Vh), singular values falling.
    """
    if matrix.shape[0] > matrix.shape[1]:
        V, S, Uh = svd(matrix.T)
        return Uh.T, S, V.T
    matrix = matrix.double()
    values, U = torch.linalg.eigh(matrix @ matrix.T)
    S = values.flip(0).clamp_min(0).sqrt()
    U = U.flip(1)
    floor = (S[0] * 1e-8).clamp_min(torch.finfo(torch.float64).tiny)
    return U, S, (U.T @ matrix) / S.clamp_min(floor)[:, None]


def svd_of_layer(up: Tensor, down: Tensor) -> Svd:
    """The thin SVD of `up @ down` in float64, in whichever way is quicker."""
    if _is_wide(up, down):
        U, S, Vh = svd(up.double() @ down.double())
        return U[:, : up.shape[1]], S[: up.shape[1]], Vh[: up.shape[1]]
    return svd_of_product(up.double(), down.double())


def singular_values(up: Tensor, down: Tensor) -> Tensor:
    """The singular values of `up @ down`, falling, in whichever way is quicker."""
    if not _is_wide(up, down):
        return svd_of_product(up, down)[1]
    matrix = (up @ down).double()
    gram = matrix @ matrix.T if matrix.shape[0] <= matrix.shape[1] else matrix.T @ matrix
    return torch.linalg.eigvalsh(gram).flip(0)[: up.shape[1]].clamp_min(0).sqrt().float()


def _is_wide(up: Tensor, down: Tensor) -> bool:
    """Whether the rank comes so near the matrix's own size that the product is worth making."""
    return 2 * up.shape[1] >= min(up.shape[0], down.shape[1])


def _resized(
    layer: Layer, base: Tensor | None, shape, rank: int | None, energy: float | None, name: str
):
    """The layer at its new rank, and what became of it."""
    up, down = layer.factors(base)
    if not (up.isfinite().all() and down.isfinite().all()):
        raise ValueError(
            f"layer {name} has weights that are not finite, so it has no rank; its training failed, use an "
            "earlier checkpoint"
        )
    numbers = sum(value.numel() for value in layer.tensors.values())
    exact = Resized(up.shape[1], layer.rank, _energy(up, down), 0.0, (numbers, numbers))
    if layer.is_plain and layer.rank <= (rank or 0):
        return layer, exact
    found = svd_of_layer(up, down)
    after = rank or rank_for_energy(found[1], energy)
    if layer.is_plain and layer.rank <= after:
        return layer, exact
    made, row = _truncated(found, shape, after, numbers)
    kept = next(value.dtype for value in layer.tensors.values())
    return made.map(lambda value: value.to(kept)), replace(row, before=up.shape[1])


def _truncated(found: Svd, shape, rank: int, numbers: int) -> tuple[Layer, Resized]:
    """The layer of a rank from a decomposition, in float32."""
    energy = found[1].square()
    layer = as_lora(*(half.float() for half in truncated(*found, rank)), shape)
    after = sum(value.numel() for value in layer.tensors.values())
    return layer, Resized(
        len(energy), layer.rank, float(energy.sum()), float(energy[rank:].sum()), (numbers, after)
    )


def _energy(up: Tensor, down: Tensor) -> float:
    """‖up @ down‖², without forming the product."""
    up, down = up.double(), down.double()
    return float(((up.T @ up) * (down @ down.T)).sum())


def _sum(rows: list[Resized]) -> Resized:
    return Resized(
        max((row.before for row in rows), default=0),
        max((row.after for row in rows), default=0),
        sum(row.energy for row in rows),
        sum(row.lost for row in rows),
        tuple(sum(row.numbers[i] for row in rows) for i in (0, 1)),
    )


def _check(rank, energy) -> None:
    if (rank is None) == (energy is None):
        raise ValueError(
            "give one of rank (a whole number) and energy (a share), not both and not neither"
        )
    if rank is not None and (isinstance(rank, bool) or not isinstance(rank, Integral) or rank < 1):
        raise ValueError(f"rank must be a whole number of 1 or more, not {rank!r}")
    if energy is not None and (
        isinstance(energy, bool) or not isinstance(energy, Real) or not 0 < energy <= 1
    ):
        raise ValueError(f"energy must be a share above 0 and up to 1, not {energy!r}")


def _check_alike(tuned: Mapping[str, Tensor], base: Mapping[str, Tensor]) -> None:
    """Raise ValueError unless both have the same weights, all finite."""
    for module in [*tuned, *base]:
        if module not in tuned or module not in base:
            raise ValueError(
                f"layer {module} is in one of the two models only; both must be of one architecture"
            )
        shapes = tuple(tuned[module].shape), tuple(base[module].shape)
        if shapes[0] != shapes[1]:
            raise ValueError(
                f"layer {module} is {shapes[0]} in the tuned model and {shapes[1]} in the base; both must "
                "be of one architecture"
            )
        if not all(weights[module].float().isfinite().all() for weights in (tuned, base)):
            raise ValueError(
                f"layer {module} has weights that are not finite; there is nothing to take from it"
            )
