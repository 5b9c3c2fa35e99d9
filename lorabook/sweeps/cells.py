"""One cell of a grid: which call draws it, and with which adapters at which scales."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import product

from lorabook.live.expand import steps_of
from lorabook.live.layers import active_adapters, adapter_names
from lorabook.live.scales import ScaleTable, layer_scales, resolve_scales, scales_of
from lorabook.sweeps.axes import CALL, RATIO, Axis, scales_at

SWEPT = "swept"  # the name of what a sweep itself puts on the pipeline
Factors = Mapping[str, Mapping[str, Mapping[str, float]]]


@dataclass(frozen=True)
class Cell:
    """What makes one picture.

    Attributes:
        call: prompt, negative_prompt, seed, guidance_scale, num_inference_steps and scheduler.
        said: an adapter's name, scales, and whether they speak of all its layers or only of those that they name; where
            several speak of the same layer they multiply.
        chosen: the one adapter that takes part, where an axis chooses it; "" is none.
        source: where that adapter is, if it is not on the pipeline.
        method, weights: of a blend that is to be made.
        factor: a number that multiplies all scales.
    """

    call: Mapping[str, object]
    said: Sequence[tuple[str, object, bool]] = ()
    chosen: str | None = None
    source: object = None
    method: str | None = None
    weights: Mapping[str, object] = field(default_factory=dict)
    factor: float = 1.0


@dataclass(frozen=True)
class Present:
    """The pipeline's adapters as they are before a sweep: those that take part, and all scales."""

    active: Sequence[str]
    table: ScaleTable

    @classmethod
    def of(cls, pipe) -> "Present":
        """As they are now."""
        return cls(active_adapters(pipe), scales_of(pipe))


def cells_of(
    pipe, axes: Sequence[Axis], call: Mapping[str, object], present: Present
) -> list[Cell]:
    """The cells of a grid, row by row; the first axis runs across."""
    across, *down = axes
    cells = []
    for values in product(*(axis.values for axis in down), across.values):
        cell = Cell(dict(call))
        for axis, value in zip((*down, across), values, strict=True):
            cell = _with(pipe, cell, axis, value)
        cells.append(_with_weights(cell, present))
    return cells


def _with(pipe, cell: Cell, axis: Axis, value) -> Cell:
    """The cell with one more thing said."""
    what = axis.what
    if what in CALL:
        return replace(cell, call={**cell.call, what: value})
    if what == "scale":
        return replace(cell, factor=cell.factor * value)
    if what == "method":
        return replace(cell, method=value)
    if what in ("adapter", "checkpoint"):
        there = isinstance(value, str) and value in adapter_names(pipe)
        return replace(
            cell,
            chosen="" if value is None else value if there else SWEPT,
            source=None if there else value,
        )
    if RATIO in what:
        one, other = what.split(RATIO)
        said = [*cell.said, (one, 1 - value, True), (other, value, True)]
        return replace(cell, weights={one: 1 - value, other: value}, said=said)
    return replace(
        cell, said=[*cell.said, (axis.adapter, scales_at(axis.path, value), not axis.path)]
    )


def _with_weights(cell: Cell, present: Present) -> Cell:
    """What is to be blended: the two of a ratio, or all that take part at their scales."""
    if cell.method is None:
        return replace(cell, weights={})
    weights = cell.weights or {name: as_scales(present.table[name]) for name in present.active}
    if len(weights) < 2:
        raise ValueError(
            f"'method' blends at least two adapters; {', '.join(weights) or 'none'} takes part. Load another, "
            "or enable it, or vary a ratio as 'ink:creatures' beside it"
        )
    return replace(cell, weights=weights, said=())


def as_scales(parts: Mapping[str, Mapping[str, float]]):
    """Scales, as `set_scales` takes them, that give exactly these factors: a number where they are all the same."""
    numbers = {factor for layers in parts.values() for factor in layers.values()}
    return (
        next(iter(numbers), 1.0)
        if len(numbers) < 2
        else {part: dict(layers) for part, layers in parts.items()}
    )


def factors_of(pipe, cell: Cell, present: Present) -> Factors:
    """The factor of every layer of every adapter on the pipeline, for one cell."""
    factors = {}
    for name in adapter_names(pipe):
        on = name == cell.chosen if cell.chosen is not None else name not in cell.weights
        kept = name in present.table and (name != cell.chosen or name in present.active)
        before = present.table[name] if kept else layer_scales(pipe, name, 1.0)
        said = _product(
            pipe, [(scales, whole) for adapter, scales, whole in cell.said if adapter == name], name
        )
        factors[name] = {
            part: {
                module: said.get(part, {}).get(module, number) * cell.factor * on
                for module, number in layers.items()
            }
            for part, layers in before.items()
        }
    return factors


def schedule_of(pipe, cell: Cell, steps: Mapping[str, Sequence]) -> dict[str, list]:
    """The scales over the denoising by adapter: what the cell says, else what was."""
    found = dict(steps)
    for name, scales, whole in cell.said:
        plain = resolve_scales(pipe, scales, name)
        if whole or "steps" in plain:
            found[name] = steps_of(plain, name)
    return {name: list(shares) for name, shares in found.items() if shares}


def _product(
    pipe, statements: Sequence[tuple[object, bool]], name: str
) -> dict[str, dict[str, float]]:
    """What several statements make of the layers that any of them speaks of."""
    found: dict[str, dict[str, float]] = {}
    for scales, whole in statements:
        plain = resolve_scales(pipe, scales, name)
        spoken = layer_scales(pipe, name, 0.0 if whole else _zeros(plain))
        for part, layers in layer_scales(pipe, name, plain).items():
            for module, factor in layers.items():
                if spoken[part][module] == 0:
                    found.setdefault(part, {})[module] = (
                        found.get(part, {}).get(module, 1.0) * factor
                    )
    return found


def _zeros(scales):
    """The same scales with 0 for each number, which shows the layers that they speak of."""
    if isinstance(scales, Mapping):
        return {key: value if key == "steps" else _zeros(value) for key, value in scales.items()}
    return [0.0] * len(scales) if isinstance(scales, Sequence) else 0.0
