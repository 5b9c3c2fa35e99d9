"""Figures in one style, made from plain data."""
import io
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from matplotlib.figure import Figure

STYLE = {"axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "grid.alpha": 0.3,
         "font.size": 11, "figure.facecolor": "white", "axes.facecolor": "white", "savefig.facecolor": "white"}
BLUE, ORANGE, GREEN = "#0072B2", "#D55E00", "#009E73"  # Okabe and Ito's colours, told apart by colour-blind readers
COLORS = (BLUE, ORANGE, GREEN, "#CC79A7", "#000000")
SIMILARITIES = {"prompt_similarity": "pictures like their prompt", "image_similarity": "pictures like the training images"}


@dataclass
class Plot:
    """A matplotlib figure that shows itself, with its content in words for those who do not see it."""

    figure: Figure
    alt: str

    def save(self, path: str | os.PathLike) -> Path:
        """Write the figure as a PNG; returns the path."""
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(self._repr_png_())
        return path

    def _repr_png_(self) -> bytes:
        encoded = io.BytesIO()
        self.figure.savefig(encoded, format="png", dpi=90, bbox_inches="tight")
        return encoded.getvalue()


def plot_losses(history: Sequence[dict], *, title: str = "") -> Plot:
    """The training loss, smoothed, and the validation loss and the similarities where they were measured.

    Args:
        history: records as in `TrainingRun.history`: `step`, `loss`, and in some `validation_loss`,
            `prompt_similarity`, `image_similarity`.
    Raises: ValueError if the history has no losses.
    """
    import matplotlib
    losses, checked = _points(history, "loss"), _points(history, "validation_loss")
    if not losses:
        raise ValueError("the history has no losses to draw")
    likeness = {words: points for key, words in SIMILARITIES.items() if (points := _points(history, key))}
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(10.5 if likeness else 7, 3.2))
        axes = figure.subplots(1, 2 if likeness else 1, squeeze=False)[0]
        steps, values = zip(*losses, strict=True)
        axes[0].plot(steps, values, color=BLUE, alpha=0.25, linewidth=1)
        axes[0].plot(steps, _smoothed(values), color=BLUE, linewidth=2, label="training loss, smoothed")
        if checked:
            axes[0].plot(*zip(*checked, strict=True), color=ORANGE, marker="o", label="validation loss, fixed noise")
        axes[0].set(xlabel="step", ylabel="mean squared error", title=title, ylim=(0, None))
        axes[0].legend(frameon=False)
        for (words, points), color, marker in zip(likeness.items(), (GREEN, ORANGE), "os", strict=False):
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
    import matplotlib
    lines = {label: _points(run.history, "validation_loss") for label, run in runs.items()}
    if empty := [label for label, points in lines.items() if not points]:
        raise ValueError(f"run {empty[0]!r} has no validation loss; train it with validation_split")
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(7, 3.2))
        axes = figure.subplots()
        for number, (label, points) in enumerate(lines.items()):
            axes.plot(*zip(*points, strict=True), color=COLORS[number % 5], marker="os^Dv"[number % 5], label=label)
        axes.set(xlabel="step", ylabel="validation loss", title=title, ylim=(0, None))
        axes.legend(frameon=False)
    ends = ", ".join(f"{label} {points[-1][1]:.2f}" for label, points in lines.items())
    return Plot(figure, f"Validation loss against steps; at the end: {ends}.")


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
