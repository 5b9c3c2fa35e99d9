"""What a blend is and how far it is from the sum of what it blends."""

import html
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch

from lorabook.lora.adapter import Adapter
from lorabook.lora.compare import by_block, inner_products
from lorabook.lora.merge import Bases, Weights, check_weights, places, taking_part

NOTHING = 1e-6  # a sum of ΔW smaller than this share of its terms has cancelled out


@dataclass(frozen=True, repr=False)
class BlendReport:
    """What a blend made; shows itself.

    Attributes:
        name: the blend's name.
        method: one of `lorabook.lora.merge.METHODS`.
        weights: by adapter, a number, or numbers by component and module.
        ranks: the largest rank in each adapter.
        rank: the largest rank in the blend.
        error: as `relative_error` gives it, against the weighted sum of ΔW: "total", components, blocks.
    """

    name: str
    method: str
    weights: Weights
    ranks: Mapping[str, int]
    rank: int
    error: Mapping[str, float] = field(default_factory=dict)

    def __str__(self):
        parts = ", ".join(
            f"{name!r} (weight {_shown(weight)}, rank {self.ranks[name]})"
            for name, weight in self.weights.items()
        )
        errors = ", ".join(
            f"{name} {value:.2g}" for name, value in self.error.items() if name != "total"
        )
        return (
            f"blend {self.name!r} by {self.method}, rank {self.rank}, of {parts}; relative error against the sum of "
            f"ΔW {self.error['total']:.2g}" + (f" ({errors})" if errors else "")
        )

    __repr__ = __str__

    def _repr_html_(self):
        parts = "".join(
            f"<tr><td>{html.escape(name)}</td><td>{_shown(weight)}</td><td>{self.ranks[name]}</td></tr>"
            for name, weight in self.weights.items()
        )
        errors = "".join(
            f"<tr><td>{html.escape(name)}</td><td>{value:.2g}</td></tr>"
            for name, value in self.error.items()
        )
        return (
            f"<p>Blend <b>{html.escape(self.name)}</b> by {html.escape(self.method)}, rank {self.rank}</p>"
            f"<table><tr><th>adapter</th><th>weight</th><th>rank</th></tr>{parts}</table>"
            f"<table><tr><th>where</th><th>relative error against the sum of ΔW</th></tr>{errors}</table>"
        )


def blend_report(
    name: str,
    method: str,
    merged: Adapter,
    adapters: Mapping[str, Adapter],
    weights: Weights,
    *,
    bases: Bases | None = None,
) -> BlendReport:
    """The report of a blend that `merge` made; arguments as there."""
    ranks = {own: largest_rank(adapter) for own, adapter in adapters.items()}
    return BlendReport(
        name,
        method,
        weights,
        ranks,
        largest_rank(merged),
        relative_error(merged, adapters, weights, bases=bases),
    )


def largest_rank(adapter: Adapter) -> int:
    """The largest rank that an adapter's layers speak of; 0 without layers."""
    return max(
        (layer.rank for inside in adapter.layers.values() for layer in inside.values()), default=0
    )


def relative_error(
    merged: Adapter,
    adapters: Mapping[str, Adapter],
    weights: Weights,
    *,
    bases: Bases | None = None,
) -> dict[str, float]:
    """How far a blend is from the weighted sum of ΔW: the norm of the difference over the norm of the sum.

    Args:
        merged: the blend.
        adapters, weights, bases: as in `merge`.
    Returns: of Frobenius norms over all layers under "total", then under each component's name, then each block's.
        Where the sum has cancelled out it is 0 if the blend is nothing there too, and infinity if it is not.
    Raises: ValueError for weights that do not fit, or a DoRA without its base weight.
    """
    check_weights(adapters, weights)
    everywhere = places([merged, *adapters.values()])
    squares = {
        place: _squares(place, merged, adapters, weights, bases or {}) for place in everywhere
    }
    modules: dict[str, list[str]] = {}
    for part, module in everywhere:
        modules.setdefault(part, []).append(module)
    groups = {"total": everywhere} | {
        part: [(part, module) for module in inside] for part, inside in modules.items()
    }
    return {
        name: _ratio([squares[place] for place in group])
        for name, group in (groups | by_block(modules)).items()
    }


def _squares(place, merged: Adapter, adapters, weights, bases) -> tuple[float, float, float]:
    """Of one layer the squared norms of the difference and of the sum, and those of its terms added up."""
    terms = taking_part(adapters, weights, place)
    parts = [*terms, *taking_part({"": merged}, {"": -1.0}, place)]
    ups, downs = zip(
        *(layer.factors(bases.get(place[0], {}).get(place[1])) for layer, _ in parts), strict=True
    )
    all_of_it = (
        torch.cat(ups, 1),
        torch.cat([weight * down for (_, weight), down in zip(parts, downs, strict=True)]),
    )
    owner = (
        torch.eye(len(parts))
        .double()
        .repeat_interleave(torch.tensor([len(down) for down in downs]), 0)
    )
    products = owner.T @ inner_products(all_of_it, all_of_it) @ owner  # of each part with each
    among_terms = products[: len(terms), : len(terms)]
    return float(products.sum()), float(among_terms.sum()), float(among_terms.trace())


def _ratio(squares: Sequence[tuple[float, float, float]]) -> float:
    off, whole, terms = (
        math.sqrt(max(math.fsum(column), 0.0)) for column in zip(*squares, strict=True)
    )
    if whole > NOTHING * terms:
        return off / whole
    return 0.0 if off <= NOTHING * terms else math.inf


def _shown(weight) -> str:
    return "by layer" if isinstance(weight, Mapping) else f"{weight:g}"
