"""Do two adapters pull in the same direction? Cosines and principal angles of their ΔW, by block."""

import html
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean

import torch
from matplotlib import rc_context
from matplotlib.figure import Figure
from torch import Tensor

from lorabook.blocks import block_map
from lorabook.lora.adapter import Adapter, Factors
from lorabook.lowrank import principal_angles, svd_of_product
from lorabook.show import display as mime
from lorabook.show.plots import BLUE, ORANGE, STYLE, Plot

NOISE = 1e-5  # a singular value below this share of the largest counts as zero
HEADS = (
    "block",
    "shared layers",
    "cosine",
    "output: angle",
    "overlap",
    "by chance",
    "input: angle",
    "overlap",
    "by chance",
)


@dataclass(frozen=True)
class Side:
    """How the subspaces of two adapters lie on one side of their layers.

    Attributes:
        angle: the smallest principal angle, in radians; 0 where a layer's subspaces share a direction, as they must in
            one narrower than the two ranks together.
        overlap: mean squared cosine of the principal angles, 0 to 1, averaged over the layers.
        chance: what `overlap` would be for random subspaces of those ranks.
    """

    angle: float
    overlap: float
    chance: float


@dataclass(frozen=True)
class Overlap:
    """What two adapters have in common in some of the layers.

    Attributes:
        cosine: of the two ΔW, all their layers there taken together, -1 to 1; a layer that an adapter lacks is zero, and
            the cosine with nothing but zeros is 0.
        shared: number of layers that both have.
        output, input: the subspaces of ΔW's columns and rows in those layers; None where there are none.
    """

    cosine: float
    shared: int
    output: Side | None
    input: Side | None

    def cells(self) -> list[str]:
        """The table's cells, angles in degrees."""
        sides = [
            ["–"] * 3
            if side is None
            else [f"{math.degrees(side.angle):.1f}°", f"{side.overlap:.3f}", f"{side.chance:.3f}"]
            for side in (self.output, self.input)
        ]
        return [str(self.shared), f"{self.cosine:+.3f}", *sides[0], *sides[1]]


@dataclass(frozen=True, repr=False)
class Interference:
    """What `compare_adapters` found; shows itself as a table and as a figure.

    Attributes:
        names: what the two adapters are called.
        total: over all layers.
        blocks: by block, in the model's order; each text encoder is one.
    """

    names: tuple[str, str]
    total: Overlap
    blocks: dict[str, Overlap]

    def rows(self) -> list[list[str]]:
        """The table's rows: the blocks, then the total."""
        return [
            [block, *overlap.cells()]
            for block, overlap in {**self.blocks, "total": self.total}.items()
        ]

    def plot(self) -> Plot:
        """Cosine and overlap by block, as a figure."""
        with rc_context(STYLE):
            figure = Figure(figsize=(10.5, 1.2 + 0.38 * len(self.blocks)))
            left, right = figure.subplots(1, 2, sharey=True)
            left.barh(
                list(self.blocks), [overlap.cosine for overlap in self.blocks.values()], color=BLUE
            )
            left.set(
                xlabel=f"cosine of ΔW, {self.names[0]} and {self.names[1]}",
                xlim=(-1.02, 1.02),
                xticks=(-1, -0.5, 0, 0.5, 1),
            )
            left.axvline(0, color="black", linewidth=0.8)
            left.invert_yaxis()
            for shift, part, color in ((-0.2, "output", BLUE), (0.2, "input", ORANGE)):
                sides = [
                    (row + shift, side)
                    for row, overlap in enumerate(self.blocks.values())
                    if (side := getattr(overlap, part)) is not None
                ]
                right.barh(
                    [row for row, _ in sides],
                    [side.overlap for _, side in sides],
                    0.38,
                    color=color,
                    label=part,
                )
                right.plot(
                    [side.chance for _, side in sides],
                    [row for row, _ in sides],
                    "k|",
                    markersize=9,
                )
            right.plot([], [], "k|", markersize=9, label="by chance")
            right.set(xlabel="overlap of the subspaces, 0 to 1", xlim=(0, 1.02))
            right.legend(frameon=False, loc="center left", bbox_to_anchor=(1, 0.5))
            figure.tight_layout()
        return Plot(
            figure,
            f"By block: {', '.join(f'{b} {o.cosine:+.2f}' for b, o in self.blocks.items())}. "
            f"Cosine of {self.names[0]} and {self.names[1]} in all: {self.total.cosine:+.2f}.",
        )

    def __str__(self):
        rows = [list(HEADS), *self.rows()]
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = [
            "  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])])
            for row in rows
        ]
        return "\n".join([f"adapters {self.names[0]!r} and {self.names[1]!r}", *lines])

    __repr__ = __str__

    def _repr_html_(self):
        head = "".join(f"<th>{cell}</th>" for cell in HEADS)
        rows = "".join(
            "<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>"
            for row in self.rows()
        )
        title = html.escape(f"{self.names[0]} and {self.names[1]}")
        plot = self.plot()
        picture = mime.image_tag(plot._repr_png_(), plot.alt)
        return f"{picture}<table><caption>{title}</caption><tr>{head}</tr>{rows}</table>"

    def _repr_png_(self):
        return self.plot()._repr_png_()

    def _repr_mimebundle_(self, include=None, exclude=None) -> tuple[dict, dict]:
        return self.plot()._repr_mimebundle_()


def compare_adapters(
    a: Adapter,
    b: Adapter,
    *,
    names: tuple[str, str] = ("first", "second"),
    bases: Mapping[str, Mapping[str, Tensor]] | None = None,
) -> Interference:
    """How far two adapters act in the same directions, block by block.

    Args:
        a, b: adapters for the same model.
        names: what to call them.
        bases: the model's own weights by component and module; needed for DoRA only.
    Returns: an Interference, which shows itself.
    Raises: ValueError for layers whose shapes differ, a DoRA without its base weight, or adapters without layers.
    """
    blocks = by_block(
        {
            part: [*dict.fromkeys(m for x in (a, b) for m in x.layers.get(part, ()))]
            for part in dict.fromkeys([*a.layers, *b.layers])
        }
    )
    if not blocks:
        raise ValueError(f"adapters {names[0]!r} and {names[1]!r} have no layers to compare")
    found = {
        block: [_compared(place, (a, b), names, bases or {}) for place in layers]
        for block, layers in blocks.items()
    }
    return Interference(
        names,
        _summary([one for some in found.values() for one in some]),
        {block: _summary(some) for block, some in found.items()},
    )


def inner_products(a: Factors, b: Factors) -> Tensor:
    """The Frobenius inner products of each rank-1 part of one matrix with each of another, in double precision.

    Args:
        a, b: (up, down) of shapes (out, p) and (p, in), (out, q) and (q, in).
    Returns: (p, q), on the CPU; its sum is the inner product of the two matrices.
    """
    (up_a, down_a), (up_b, down_b) = (
        [factor.cpu().double() for factor in pair] for pair in (a, b)
    )  # MPS has no double
    return (up_a.T @ up_b) * (down_a @ down_b.T)


def by_block(modules: Mapping[str, Iterable[str]]) -> dict[str, list[tuple[str, str]]]:
    """Layers, as (component, module), by block: a UNet's in its own order, every other component as one block.

    Args:
        modules: module names by component.
    """
    blocks = {
        block: [("unet", module) for module in inside]
        for block, inside in block_map(modules.get("unet", ())).items()
    }
    return blocks | {
        part: [(part, module) for module in inside]
        for part, inside in modules.items()
        if part != "unet" and inside
    }


def check_same_shape(place: tuple[str, str], shapes: Mapping[str, Sequence[int]]) -> None:
    """Refuse ΔW of different shapes for one layer.

    Args:
        place: component and module.
        shapes: (out, in · height · width) by whose it is.
    Raises: ValueError naming the layer and two that differ, with their shapes.
    """
    (first, shape), *others = (
        (name, " x ".join(map(str, shape))) for name, shape in shapes.items()
    )
    for name, other in others:
        if other != shape:
            raise ValueError(
                f"{first} is {shape} in layer {place[1]} of {place[0]}, but {name} is {other}; "
                "use adapters made for one and the same model"
            )


def _compared(
    place, adapters: tuple[Adapter, Adapter], names, bases
) -> tuple[float, float, float, list | None]:
    """One layer: inner product, both squared norms, and the sides if both adapters have the layer."""
    part, module = place
    base = bases.get(part, {}).get(module)
    layers = [adapter.layers.get(part, {}).get(module) for adapter in adapters]
    factors = [None if layer is None else layer.factors(base) for layer in layers]
    squares = [0.0 if pair is None else float(inner_products(pair, pair).sum()) for pair in factors]
    if None in factors:
        return 0.0, *squares, None
    check_same_shape(
        place,
        {
            f"adapter {name!r}": (len(up), down.shape[1])
            for name, (up, down) in zip(names, factors, strict=True)
        },
    )
    return float(inner_products(*factors).sum()), *squares, _sides(*factors) if all(squares) else []


def _sides(a: Factors, b: Factors) -> list[Side]:
    """The output side and the input side of one layer."""
    (left_a, right_a), (left_b, right_b) = _spaces(*a), _spaces(*b)
    return [_side(left_a, left_b), _side(right_a, right_b)]


def _spaces(up: Tensor, down: Tensor) -> tuple[Tensor, Tensor]:
    """Orthonormal bases, as columns, of a product's column space and row space."""
    left, values, right = svd_of_product(up.cpu().double(), down.cpu().double())
    rank = int((values > NOISE * values[0]).sum())
    return left[:, :rank], right[:rank].T


def _side(a: Tensor, b: Tensor) -> Side:
    angles = principal_angles(a, b)
    return Side(
        float(angles[0]),
        float(torch.cos(angles).square().mean()),
        max(a.shape[1], b.shape[1]) / len(a),
    )


def _summary(found: Sequence[tuple[float, float, float, list | None]]) -> Overlap:
    """Layers taken together."""
    product, square_a, square_b = (
        math.fsum(column) for column in list(zip(*found, strict=True))[:3]
    )
    size = math.sqrt(square_a) * math.sqrt(square_b)
    shared = [sides for *_, sides in found if sides is not None]
    output, inside = ([sides[i] for sides in shared if sides] for i in (0, 1))
    return Overlap(
        max(-1.0, min(1.0, product / size)) if size else 0.0,
        len(shared),
        _mean(output),
        _mean(inside),
    )


def _mean(sides: Sequence[Side]) -> Side | None:
    if not sides:
        return None
    return Side(
        min(s.angle for s in sides), fmean(s.overlap for s in sides), fmean(s.chance for s in sides)
    )
