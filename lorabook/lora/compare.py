"""Two adapters compared by cosines and angles, and a blend with the sum of what it blends."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import ClassVar, NamedTuple

import torch
from pandas import DataFrame
from torch import Tensor

from lorabook.blocks import group_by_block
from lorabook.lora.adapter import Adapter, Bases, Factors
from lorabook.lora.merge import Place, Weights, check_same_shape, check_weights, weighted_layers
from lorabook.lowrank import inner_product, principal_angles, svd
from lorabook.show.tables import PlottedReport

NOISE = 1e-5  # a singular value below this share of the largest counts as zero
NOTHING = 1e-6  # a sum of ΔW smaller than this share of its terms has cancelled out


class Side(NamedTuple):
    """How the subspaces of two adapters lie on one side of their layers.

    Attributes:
        angle: The smallest principal angle, in radians; 0 where they must share a direction, in a
            layer narrower than the two ranks together.
        overlap: Mean squared cosine of the principal angles, 0 to 1, the mean over the layers.
        chance: What `overlap` would be for random subspaces of those ranks.
    """

    angle: float
    overlap: float
    chance: float


class Overlap(NamedTuple):
    """What two adapters have in common in some of the layers.

    Attributes:
        cosine: Of the two ΔW, all their layers there together, -1 to 1; 0 with nothing but zeros.
        shared: Number of layers that both have.
        output: The subspaces of ΔW's columns in those layers; None where there are none.
        input: The subspaces of its rows.
    """

    cosine: float
    shared: int
    output: Side | None
    input: Side | None


@dataclass(frozen=True, eq=False, repr=False)
class Interference(PlottedReport):
    """How far two adapters work in the same directions; shows itself as a table and a figure."""

    names: tuple[str, str]  # what the two adapters are called
    total: Overlap  # of all layers
    blocks: dict[str, Overlap]  # in the model's order; each text encoder is one
    formats: ClassVar = {
        "cosine": "{:+.3f}",
        "output_angle": lambda angle: _shown(math.degrees(angle), "{:.1f}°"),
        "output_overlap": lambda share: _shown(share, "{:.3f}"),
        "output_by_chance": lambda share: _shown(share, "{:.3f}"),
    }
    formats |= {k.replace("output", "input"): v for k, v in formats.items() if k != "cosine"}

    @property
    def table(self) -> DataFrame:
        """A row a block, and one for all of them; angles in radians."""
        absent = Side(math.nan, math.nan, math.nan)
        rows = [
            (block, overlap.shared, overlap.cosine)
            + tuple(overlap.output or absent)
            + tuple(overlap.input or absent)
            for block, overlap in {**self.blocks, "total": self.total}.items()
        ]
        return DataFrame(rows, columns=["block", "shared_layers", *self.formats])

    @property
    def note(self) -> str:
        """Whose directions these are."""
        return f"adapters {self.names[0]!r} and {self.names[1]!r}"

    def plot(self):
        """Cosine and overlap by block, as a figure."""
        from lorabook.show.plots import plot_interference

        return plot_interference(self.table, self.names)


def compare_adapters(
    a: Adapter,
    b: Adapter,
    *,
    names: tuple[str, str] = ("first", "second"),
    bases: Bases | None = None,
) -> Interference:
    """How far two adapters of one model act in the same directions; only a DoRA needs `bases`."""
    blocks = group_by_block(dict.fromkeys([*a.flat, *b.flat]))
    if not blocks:
        raise ValueError(f"adapters {names[0]!r} and {names[1]!r} have no layers to compare")
    pairs = {
        block: [_compare_layer(place, (a, b), names, bases or {}) for place in places]
        for block, places in blocks.items()
    }
    return Interference(
        names,
        _overlap([pair for layers in pairs.values() for pair in layers]),
        {block: _overlap(layers) for block, layers in pairs.items()},
    )


def relative_error(
    merged: Adapter,
    adapters: Mapping[str, Adapter],
    weights: Weights,
    *,
    bases: Bases | None = None,
) -> dict[str, float]:
    """The norm of a blend's difference from the weighted sum of ΔW, over the norm of the sum.

    Over all layers under "total", then under each component's and each block's name. Where the sum
    has cancelled out it is 0 if the blend is nothing there too, else infinity.
    """
    check_weights(adapters, weights)
    places = dict.fromkeys(place for a in (merged, *adapters.values()) for place in a.flat)
    squares = {place: _squares(place, merged, adapters, weights, bases or {}) for place in places}
    groups: dict[str, list[Place]] = {"total": list(places)}
    for place in places:
        groups.setdefault(place[0], []).append(place)
    groups |= group_by_block(places)
    return {name: _ratio([squares[place] for place in group]) for name, group in groups.items()}


def _compare_layer(
    place: Place, adapters: tuple[Adapter, Adapter], names: Sequence[str], bases: Bases
) -> tuple[float, float, float, list[Side] | None]:
    """One layer: inner product, both squared norms, and its sides if both adapters have it."""
    component, module = place
    base = bases.get(component, {}).get(module)
    layers = [adapter.layers.get(component, {}).get(module) for adapter in adapters]
    factors = [None if layer is None else layer.factors(base) for layer in layers]
    squares = [0.0 if pair is None else inner_product(pair, pair) for pair in factors]
    if None in factors:
        return 0.0, *squares, None
    shapes = [(len(up), down.shape[1]) for up, down in factors]
    labels = [f"adapter {name!r}" for name in names]
    check_same_shape(place, dict(zip(labels, shapes, strict=True)))
    sides = []
    if all(squares):
        (left_a, right_a), (left_b, right_b) = (_spaces(*pair) for pair in factors)
        sides = [_side(left_a, left_b), _side(right_a, right_b)]
    return inner_product(*factors), *squares, sides


def _spaces(up: Tensor, down: Tensor) -> tuple[Tensor, Tensor]:
    """Orthonormal bases, as columns, of a product's column space and row space."""
    left, values, right = svd(up, down)
    rank = int((values > NOISE * values[0]).sum())
    return left[:, :rank], right[:rank].T


def _side(a: Tensor, b: Tensor) -> Side:
    angles = principal_angles(a, b)
    overlap = float(torch.cos(angles).square().mean())
    return Side(float(angles[0]), overlap, max(a.shape[1], b.shape[1]) / len(a))


def _overlap(layers: Sequence[tuple[float, float, float, list[Side] | None]]) -> Overlap:
    """Layers taken together."""
    product, square_a, square_b = (math.fsum(layer[i] for layer in layers) for i in range(3))
    size = math.sqrt(square_a) * math.sqrt(square_b)
    cosine = max(-1.0, min(1.0, product / size)) if size else 0.0
    shared = [sides for *_, sides in layers if sides is not None]
    output, input_ = (_mean([sides[i] for sides in shared if sides]) for i in range(2))
    return Overlap(cosine, len(shared), output, input_)


def _mean(sides: Sequence[Side]) -> Side | None:
    """The smallest angle, and the means of the rest."""
    if not sides:
        return None
    angles, overlaps, chances = zip(*sides, strict=True)
    return Side(min(angles), fmean(overlaps), fmean(chances))


def _squares(
    place: Place, merged: Adapter, adapters: Mapping[str, Adapter], weights: Weights, bases: Bases
) -> tuple[float, float, float]:
    """Squared norms in one layer: of the difference, of the sum, and of its terms added up."""
    base = bases.get(place[0], {}).get(place[1])

    def weighted(pairs) -> list[Factors]:
        factors = [(layer.factors(base), weight) for layer, weight in pairs]
        return [(up, weight * down) for (up, down), weight in factors]

    terms = weighted(weighted_layers(adapters, weights, place))
    negative = weighted(weighted_layers({"": merged}, {"": -1.0}, place))
    return (
        _square_of_sum([*terms, *negative]),
        _square_of_sum(terms),
        sum(inner_product(term, term) for term in terms),
    )


def _square_of_sum(terms: Sequence[Factors]) -> float:
    if not terms:
        return 0.0
    ups, downs = zip(*terms, strict=True)
    total = torch.cat(ups, 1), torch.cat(downs)
    return inner_product(total, total)


def _ratio(squares: Iterable[tuple[float, float, float]]) -> float:
    sums = (math.fsum(column) for column in zip(*squares, strict=True))
    off, whole, terms = (math.sqrt(max(total, 0.0)) for total in sums)
    if whole > NOTHING * terms:
        return off / whole
    return 0.0 if off <= NOTHING * terms else math.inf


def _shown(value: float, form: str) -> str:
    return "–" if math.isnan(value) else form.format(value)
