"""Figures in one style, made from plain data."""
import io
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from matplotlib.figure import Figure

STYLE = {"axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "grid.alpha": 0.3,
         "font.size": 11, "figure.facecolor": "white", "axes.facecolor": "white", "savefig.facecolor": "white"}
BLUE, ORANGE, GREEN = "#0072B2", "#D55E00", "#009E73"  # Okabe and Ito's colours, told apart by colour-blind readers


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
    """The training loss, smoothed, and the validation loss where there is one.

    Args:
        history: records as in `TrainingRun.history`: `step`, `loss`, and `validation_loss` in some.
    Raises: ValueError if the history is empty.
    """
    import matplotlib
    steps = [record["step"] for record in history if "loss" in record]
    if not steps:
        raise ValueError("the history has no losses to draw")
    losses = [record["loss"] for record in history if "loss" in record]
    checked = [(r["step"], r["validation_loss"]) for r in history if "validation_loss" in r]
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(7, 3.2))
        axes = figure.subplots()
        axes.plot(steps, losses, color=BLUE, alpha=0.25, linewidth=1)
        axes.plot(steps, _smoothed(losses), color=BLUE, linewidth=2, label="training loss, smoothed")
        if checked:
            axes.plot(*zip(*checked, strict=True), color=ORANGE, marker="o", label="validation loss, fixed noise")
        axes.set(xlabel="step", ylabel="mean squared error", title=title, ylim=(0, None))
        axes.legend(frameon=False)
    alt = f"Training loss from {losses[0]:.2f} to {losses[-1]:.2f} over {steps[-1]} steps."
    if checked:
        alt += f" Validation loss from {checked[0][1]:.2f} to {checked[-1][1]:.2f}."
    return Plot(figure, alt)


def _smoothed(values: Sequence[float], keep: float = 0.9) -> list[float]:
    """Exponential moving average, without the bias of its start."""
    average, weight, result = 0.0, 0.0, []
    for value in values:
        average, weight = keep * average + (1 - keep) * value, keep * weight + (1 - keep)
        result.append(average / weight)
    return result
