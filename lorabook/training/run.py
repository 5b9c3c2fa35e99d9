"""What a training call returns."""

import html
from dataclasses import dataclass, field
from pathlib import Path

from lorabook.show import display as mime
from lorabook.show.grid import ImageGrid
from lorabook.show.plots import Plot, plot_losses


@dataclass
class TrainingRun:
    """A training run; shows its loss and its pictures in a notebook.

    Attributes:
        adapter: the adapter file.
        history: a record a step: `step`, `loss`, `learning_rate`, `seconds`; some have `validation_loss`,
            `prompt_similarity` and `image_similarity`.
        grid: pictures of the validation prompt, a row a seed and a column a step, or None.
        command: the command line that repeats the run.
        finished: whether it came to its last step; else it was stopped, and `resume_from_checkpoint="latest"` goes on.
        pushed: the adapter's address on the Hub, or None.
    """

    adapter: Path
    history: list[dict] = field(repr=False)
    command: str = field(repr=False)
    grid: ImageGrid | None = field(default=None, repr=False)
    finished: bool = True
    pushed: str | None = None

    @property
    def folder(self) -> Path:
        """The folder with the adapter, the checkpoints and the pictures."""
        return self.adapter.parent

    @property
    def validation_losses(self) -> list[float]:
        """The validation loss at its fixed noise, from before the first step to after the last."""
        return [record["validation_loss"] for record in self.history if "validation_loss" in record]

    @property
    def losses(self) -> list[float]:
        """The training loss of each step."""
        return [record["loss"] for record in self.history if "loss" in record]

    def plot(self) -> Plot:
        """The loss curves, and the similarities where they were measured."""
        return plot_losses(self.history)

    def __str__(self):
        seconds = sum(record.get("seconds", 0) for record in self.history)
        told = f"{len(self.losses)} steps in {seconds:.0f} s; loss {self.losses[0]:.3f} to {self.losses[-1]:.3f}"
        if self.validation_losses:
            told += f", validation loss {self.validation_losses[0]:.3f} to {self.validation_losses[-1]:.3f}"
        if not self.finished:
            told = f"stopped: {told}"
        return (
            f"{told}; adapter: {self.adapter}{f', pushed to {self.pushed}' if self.pushed else ''}"
        )

    def _repr_html_(self):
        pictures = [self.plot(), *([self.grid] if self.grid else [])]
        shown = "".join(mime.image_tag(picture._repr_png_(), picture.alt) for picture in pictures)
        return f"<p>{html.escape(str(self))}</p>{shown}"
