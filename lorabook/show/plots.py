"""Figures in one style, made from plain data."""

import io
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from matplotlib import rc_context
from matplotlib.figure import Figure

from lorabook.show import display as mime

_INK, _PAPER = (
    "black",
    "white",
)  # both are named, so that a figure reads on a dark page and under a dark style of matplotlib
STYLE = {
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.alpha": 0.3,
    "grid.color": "#b0b0b0",
    "font.size": 11,
    "savefig.pad_inches": 0.15,
    "figure.facecolor": _PAPER,
    "axes.facecolor": _PAPER,
    "savefig.facecolor": _PAPER,
    "text.color": _INK,
    "axes.labelcolor": _INK,
    "axes.edgecolor": _INK,
    "xtick.color": _INK,
    "ytick.color": _INK,
}
BLUE, ORANGE, GREEN = (
    "#0072B2",
    "#D55E00",
    "#009E73",
)  # Okabe and Ito's colours, told apart by colour-blind readers
COLORS = (BLUE, ORANGE, GREEN, "#CC79A7", "#000000")
SIMILARITIES = {
    "prompt_similarity": "pictures like their prompt",
    "image_similarity": "pictures like the training images",
}


@dataclass
class Plot:
    """A matplotlib figure that shows itself, with its content in words for those who do not see it."""

    figure: Figure = field(repr=False)
    alt: str

    def save(self, path: str | os.PathLike) -> Path:
        """Write the figure as a PNG; returns the path."""
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(self._repr_png_())
        return path

    def _repr_png_(self) -> bytes:
        encoded = io.BytesIO()
        with rc_context(STYLE):  # the paper and the margin are looked up only now
            self.figure.savefig(encoded, format="png", dpi=90, bbox_inches="tight")
        return encoded.getvalue()

    def _repr_mimebundle_(self, include=None, exclude=None) -> tuple[dict, dict]:
        return mime.bundle(self._repr_png_(), self.alt)


def line_look(number: int) -> dict[str, str]:
    """Colour, marker and dashes of a line among others, so that no two of 15 look alike."""
    return {
        "color": COLORS[number % 5],
        "marker": "os^Dv"[number % 5],
        "linestyle": ("-", "--", ":")[number // 5 % 3],
    }


def plot_losses(history: Sequence[dict], *, title: str = "") -> Plot:
    """The training loss, smoothed, and the validation loss and the similarities where they were measured.

    Args:
        history: records as in `TrainingRun.history`: `step`, `loss`, and in some `validation_loss`,
            `prompt_similarity`, `image_similarity`.
    Raises: ValueError if the history has no losses.
    """
    losses, checked = _points(history, "loss"), _points(history, "validation_loss")
    if not losses:
        raise ValueError("the history has no losses to draw")
    likeness = {
        words: points for key, words in SIMILARITIES.items() if (points := _points(history, key))
    }
    with rc_context(STYLE):
        figure = Figure(figsize=(10.5 if likeness else 7, 3.2))
        axes = figure.subplots(1, 2 if likeness else 1, squeeze=False)[0]
        steps, values = zip(*losses, strict=True)
        axes[0].plot(steps, values, color=BLUE, alpha=0.25, linewidth=1)
        axes[0].plot(
            steps, _smoothed(values), color=BLUE, linewidth=2, label="training loss, smoothed"
        )
        if checked:
            axes[0].plot(
                *zip(*checked, strict=True),
                color=ORANGE,
                marker="o",
                label="validation loss, fixed noise",
            )
        axes[0].set(xlabel="step", ylabel="mean squared error", title=title, ylim=(0, None))
        axes[0].legend(frameon=False)
        for (words, points), color, marker in zip(
            likeness.items(), (GREEN, ORANGE), "os", strict=False
        ):
            axes[1].plot(*zip(*points, strict=True), color=color, marker=marker, label=words)
        if likeness:
            axes[1].set(xlabel="step", ylabel="cosine similarity")
            axes[1].legend(frameon=False)
            figure.tight_layout()
    alt = f"Training loss from {values[0]:.2f} to {values[-1]:.2f} over {steps[-1]} steps."
    measured = ({"validation loss": checked} if checked else {}) | likeness
    for words, points in measured.items():
        alt += f" {words.capitalize()} from {points[0][1]:.2f} to {points[-1][1]:.2f}."
    return Plot(figure, alt)


def plot_runs(runs: Mapping[str, object], *, title: str = "") -> Plot:
    """The validation losses of several runs in one figure.

    Args:
        runs: by label, anything with a `history`, as TrainingRun.
    Raises: ValueError if a run has no validation loss.
    """
    lines = {label: _points(run.history, "validation_loss") for label, run in runs.items()}
    if empty := [label for label, points in lines.items() if not points]:
        raise ValueError(f"run {empty[0]!r} has no validation loss; train it with validation_split")
    return plot_lines(lines, xlabel="step", ylabel="validation loss", title=title)


def plot_lines(
    lines: Mapping[str, Sequence[tuple[float, float]]], *, xlabel: str, ylabel: str, title: str = ""
) -> Plot:
    """Lines in one figure, each with a marker and dashes of its own; the vertical axis starts at 0.

    Args:
        lines: by label, the points of each as (x, y).
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
        axes.legend(frameon=False)
    ends = ", ".join(f"{label} {points[-1][1]:.2f}" for label, points in lines.items())
    return Plot(figure, f"{ylabel.capitalize()} against {xlabel}; at the end: {ends}.")


def plot_bars(values: Mapping[str, float], *, label: str, title: str = "") -> Plot:
    """A bar a value, the first on top.

    Args:
        values: by name.
        label: what the values are, and their unit.
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
    return Plot(
        figure,
        f"{label.capitalize()}: "
        + ", ".join(f"{name} {value:.3g}" for name, value in values.items())
        + ".",
    )


def _points(history: Sequence[dict], key: str) -> list[tuple[int, float]]:
    """Step and value of the records that have a key."""
    return [(record["step"], record[key]) for record in history if key in record]


def _smoothed(values: Sequence[float], keep: float = 0.9) -> list[float]:
    """Exponential moving average, without the bias of its start."""
    average, weight, result = 0.0, 0.0, []
    for value in values:
        average, weight = keep * average + (1 - keep) * value, keep * weight + (1 - keep)
        result.append(average / weight)
    return result
