"""Figures in one style, made from plain data."""

import io
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from matplotlib import rc_context
from matplotlib.figure import Figure
from pandas import Series

from lorabook.show.display import bundle, write

# Ink and paper are both named: a figure reads on a dark page, and under a dark style, too.
STYLE = {
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.alpha": 0.3,
    "grid.color": "#b0b0b0",
    "font.size": 11,
    "legend.frameon": False,
    "savefig.pad_inches": 0.15,
    **dict.fromkeys(["figure.facecolor", "axes.facecolor", "savefig.facecolor"], "white"),
    **dict.fromkeys(["text.color", "axes.labelcolor", "axes.edgecolor"], "black"),
    **dict.fromkeys(["xtick.color", "ytick.color"], "black"),
}
# Okabe and Ito's colours: readers who see few colours tell them apart.
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#000000")
BLUE, ORANGE, GREEN = COLORS[:3]
_SIMILARITIES = {
    "prompt_similarity": "pictures like their prompt",
    "image_similarity": "pictures like the training images",
}


@dataclass
class Plot:
    """A matplotlib figure that shows itself.

    Attributes:
        figure: The figure.
        alt: Its content in words, for those who do not see it.
    """

    figure: Figure = field(repr=False)
    alt: str

    def save(self, path: str | os.PathLike) -> Path:
        """Write the figure as a PNG; returns the path."""
        return write(path, self._repr_png_())

    def _repr_png_(self) -> bytes:
        encoded = io.BytesIO()
        with rc_context(STYLE):  # matplotlib looks up the paper and the margin only now
            self.figure.savefig(encoded, format="png", dpi=90, bbox_inches="tight")
        return encoded.getvalue()

    def _repr_mimebundle_(self, include=None, exclude=None) -> tuple[dict, dict]:
        return bundle(self._repr_png_(), self.alt)


def line_look(number: int) -> dict[str, str]:
    """Colour, marker and dashes of a line among others; no two of 15 look alike."""
    return {
        "color": COLORS[number % 5],
        "marker": "os^Dv"[number % 5],
        "linestyle": ("-", "--", ":")[number // 5 % 3],
    }


def plot_losses(history: Sequence[dict], *, title: str = "") -> Plot:
    """The training loss, smoothed; the validation loss and the similarities where there are any.

    Args:
        history: Records as in `TrainingRun.history`: `step`, `loss`, and in some
            `validation_loss`, `prompt_similarity`, `image_similarity`.
        title: What stands above.
    Raises: ValueError if the history has no losses.
    """
    losses, validation = _points(history, "loss"), _points(history, "validation_loss")
    if not losses:
        raise ValueError("the history has no losses to draw")
    similarities = {words: _points(history, key) for key, words in _SIMILARITIES.items()}
    similarities = {words: points for words, points in similarities.items() if points}
    steps, values = zip(*losses, strict=True)
    smooth = Series(values).ewm(alpha=0.1).mean()
    with rc_context(STYLE):
        figure = Figure(
            figsize=(10.5 if similarities else 7, 3.2), layout="tight" if similarities else None
        )
        left, *right = figure.subplots(1, 2 if similarities else 1, squeeze=False)[0]
        left.plot(steps, values, color=BLUE, alpha=0.25, linewidth=1)
        left.plot(steps, smooth, color=BLUE, linewidth=2, label="training loss, smoothed")
        if validation:
            look = {"color": ORANGE, "marker": "o", "label": "validation loss, fixed noise"}
            left.plot(*zip(*validation, strict=True), **look)
        left.set(xlabel="step", ylabel="mean squared error", title=title, ylim=(0, None))
        left.legend()
        for axes in right:
            for (words, points), color in zip(similarities.items(), (GREEN, ORANGE), strict=False):
                marker = "o" if color == GREEN else "s"
                axes.plot(*zip(*points, strict=True), color=color, marker=marker, label=words)
            axes.set(xlabel="step", ylabel="cosine similarity")
            axes.legend()
    alt = f"Training loss from {values[0]:.2f} to {values[-1]:.2f} over {steps[-1]} steps."
    measures = ({"validation loss": validation} if validation else {}) | similarities
    for words, points in measures.items():
        alt += f" {words.capitalize()} from {points[0][1]:.2f} to {points[-1][1]:.2f}."
    return Plot(figure, alt)


def plot_runs(runs: Mapping[str, object], *, title: str = "") -> Plot:
    """The validation losses of several runs in one figure.

    Args:
        runs: By label, anything with a `history`, as TrainingRun.
        title: What stands above.
    Raises: ValueError if a run has no validation loss.
    """
    lines = {label: _points(run.history, "validation_loss") for label, run in runs.items()}
    for label, points in lines.items():
        if not points:
            raise ValueError(
                f"run {label!r} has no validation loss; train it with validation_split"
            )
    return plot_lines(lines, xlabel="step", ylabel="validation loss", title=title)


def plot_lines(
    lines: Mapping[str, Sequence[tuple[float, float]]], *, xlabel: str, ylabel: str, title: str = ""
) -> Plot:
    """Lines in one figure, each with its own marker and dashes; the vertical axis starts at 0.

    Args:
        lines: By label, the points of each as (x, y).
        xlabel, ylabel: What the axes are, with their units.
        title: What stands above.
    Raises: ValueError if there is no line, or one has no points.
    """
    if not lines or not all(lines.values()):
        raise ValueError("there is nothing to draw: give each line its points, as (x, y)")
    with rc_context(STYLE):
        figure = Figure(figsize=(7, 3.2))
        axes = figure.subplots()
        for number, (label, points) in enumerate(lines.items()):
            axes.plot(*zip(*points, strict=True), label=label, **line_look(number))
        axes.set(xlabel=xlabel, ylabel=ylabel, title=title, ylim=(0, None))
        axes.legend()
    ends = ", ".join(f"{label} {points[-1][1]:.2f}" for label, points in lines.items())
    return Plot(figure, f"{ylabel.capitalize()} against {xlabel}; at the end: {ends}.")


def plot_bars(values: Mapping[str, float], *, label: str, title: str = "") -> Plot:
    """A bar a value, the first on top.

    Args:
        values: By name.
        label: What the values are, and their unit.
        title: What stands above.
    Raises: ValueError if there is no value.
    """
    if not values:
        raise ValueError("there is nothing to draw: give at least one value")
    with rc_context(STYLE):
        figure = Figure(figsize=(7, 0.6 + 0.4 * len(values)))
        axes = figure.subplots()
        axes.bar_label(axes.barh(list(values), list(values.values()), color=BLUE), fmt=" {:.3g}")
        axes.invert_yaxis()
        axes.set(xlabel=label, title=title)
    words = ", ".join(f"{name} {value:.3g}" for name, value in values.items())
    return Plot(figure, f"{label.capitalize()}: {words}.")


def plot_interference(table, names: tuple[str, str]) -> Plot:
    """Two adapters by block: the cosine of their ΔW, and how far their subspaces overlap.

    Args:
        table: `Interference.table`; its last row is for all blocks together.
        names: What the two adapters are called.
    """
    blocks, total = table[:-1], table.iloc[-1]
    rows = range(len(blocks))
    with rc_context(STYLE):
        figure = Figure(figsize=(10.5, 1.2 + 0.38 * len(blocks)))
        left, right = figure.subplots(1, 2, sharey=True)
        left.barh(blocks["block"], blocks["cosine"], color=BLUE)
        label = f"cosine of ΔW, {names[0]} and {names[1]}"
        left.set(xlabel=label, xlim=(-1.02, 1.02), xticks=(-1, -0.5, 0, 0.5, 1))
        left.axvline(0, color="black", linewidth=0.8)
        left.invert_yaxis()
        for shift, side, color in ((-0.2, "output", BLUE), (0.2, "input", ORANGE)):
            heights = [row + shift for row in rows]
            right.barh(heights, blocks[f"{side}_overlap"], 0.38, color=color, label=side)
            right.plot(blocks[f"{side}_by_chance"], heights, "k|", markersize=9)
        right.plot([], [], "k|", markersize=9, label="by chance")
        right.set(xlabel="overlap of the subspaces, 0 to 1", xlim=(0, 1.02))
        right.legend(loc="center left", bbox_to_anchor=(1, 0.5))
        figure.tight_layout()
    cosines = zip(blocks["block"], blocks["cosine"], strict=True)
    by_block = ", ".join(f"{block} {cosine:+.2f}" for block, cosine in cosines)
    alt = (
        f"By block: {by_block}. Cosine of {names[0]} and {names[1]} in all: {total['cosine']:+.2f}."
    )
    return Plot(figure, alt)


def _points(history: Sequence[dict], key: str) -> list[tuple[int, float]]:
    return [(record["step"], record[key]) for record in history if key in record]
