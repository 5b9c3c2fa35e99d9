"""What happens between the steps of a run: looking at the loss, saving, measuring, drawing."""

import math
import warnings
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass, field
from statistics import median

import torch
from torch import Tensor

from lorabook.training.checkpoints import Progress
from lorabook.training.devices import components_on, input_casts
from lorabook.training.display import Display
from lorabook.training.setup import Setup
from lorabook.training.trackers import report, report_pictures
from lorabook.training.validation import FilmStrip

LOOK_EVERY = 10  # steps between two looks at the loss; each look waits for the device
CHECKS = 5  # validation losses on the way


@dataclass
class Watch:
    """Called after each step.

    Attributes:
        setup, progress: the run.
        steps, epoch: optimiser steps in all, and in an epoch.
        weights: the parameters that learn, by component and name.
        save: writes a checkpoint.
        validate: measures the validation loss, or None.
        strip: the validation pictures, or None.
        good: a copy of the weights at the last look that found them finite.
    """

    setup: Setup
    progress: Progress
    steps: int
    epoch: int
    weights: dict[str, Tensor]
    save: Callable[[], object]
    validate: Callable[[], float] | None
    strip: FilmStrip | None
    display: Display
    good: dict[str, Tensor] = field(default_factory=dict)
    good_step: int = 0
    told: bool = False

    def begin(self) -> None:
        """Measure and draw the base model, unless a checkpoint has it."""
        if self.progress.step == 0 and (self.validate or self.strip):
            self.progress.history.append({"step": 0})
            self._measure(loss=True, pictures=True)
            if len(self.progress.history[-1]) == 1:
                self.progress.history.pop()

    def __call__(self) -> None:
        """A step is done."""
        step, config = self.progress.step, self.setup.config
        self.display.step()
        last = step == self.steps
        saves = last or step % config.checkpointing_steps == 0
        measures = last or step in {round(self.steps * part / CHECKS) for part in range(1, CHECKS)}
        draws = last or step % (config.validation_epochs * self.epoch) == 0
        if last or saves or measures or draws or step % LOOK_EVERY == 0:
            self.look()
        if measures or draws:
            self._measure(measures, draws)
        if last:
            self.display.losses(self.progress.history, last=True)
        if saves:
            self.keep()

    def look(self) -> None:
        """Bring the losses from the device, stop where one is not finite, and keep the weights where they are.

        Raises: FloatingPointError.
        """
        self._read_losses()
        flat = torch.cat(
            [value.detach().flatten() for value in self.weights.values()]
        ).cpu()  # one copy from the device
        parts = flat.split([value.numel() for value in self.weights.values()])
        weights = {
            key: part.view(value.shape)
            for (key, value), part in zip(self.weights.items(), parts, strict=True)
        }
        if not flat.isfinite().all():
            raise FloatingPointError(_reason(self.progress.step, "weights are not finite"))
        self.good, self.good_step = weights, self.progress.step
        if self.setup.accelerator.is_main_process:
            self.display.losses(self.progress.history)
            self._tell_minutes()

    @torch.no_grad()
    def put_back_good(self) -> None:
        """Give the models the weights of the last look that found them finite."""
        for key, value in self.weights.items():
            value.copy_(self.good[key])

    def _tell_minutes(self) -> None:
        """Say once, after the first steps, how long the rest will take."""
        steps = [record["seconds"] for record in self.progress.history if "seconds" in record][
            -LOOK_EVERY:
        ]
        left = self.steps - self.progress.step
        if not self.told and len(steps) >= LOOK_EVERY and left * median(steps) > 20:
            self.display.tell(
                f"{median(steps):.2f} s a step; about {median(steps) * left / 60:.1f} minutes to go"
            )
            self.told = True

    def _read_losses(self) -> None:
        pending = [
            record for record in self.progress.history if isinstance(record.get("loss"), Tensor)
        ]
        if not pending:
            return
        values = self.setup.accelerator.reduce(
            torch.stack([record["loss"] for record in pending]), "mean"
        ).tolist()
        for record, value in zip(pending, values, strict=True):
            record["loss"] = value
            report(self.setup.accelerator, record)
            if not math.isfinite(value):
                raise FloatingPointError(_reason(record["step"], f"loss is {value}"))

    def _measure(self, loss: bool, pictures: bool) -> None:
        """Add the validation loss, and pictures with their likeness, to the last record; on the main process."""
        accelerator, record = self.setup.accelerator, self.progress.history[-1]
        if not accelerator.is_main_process:
            return
        measured = {}
        with evaluating(self.setup):
            if loss and self.validate:
                measured["validation_loss"] = self.validate()
            if pictures and self.strip:
                drawn = self._draw(record["step"])
                measured |= self.strip.likeness(drawn)
                report_pictures(accelerator, drawn, record["step"])
        record |= measured
        report(accelerator, {"step": record["step"]} | measured)

    def _draw(self, step: int) -> list:
        """The validation pictures, with the VAE in the pipeline's precision, and the film strip with them."""
        pipe = self.setup.family.pipe
        if pipe.vae.dtype != self.setup.dtype:
            pipe.vae.to(self.setup.dtype)
        with components_on(self.setup.family, self.setup.family.encoders, self.setup.family.device):
            drawn = self.strip.draw(pipe, step)
        if self.strip.steps:
            self.display.strip(self.strip.grid())
        return drawn

    def keep(self) -> None:
        """Write a checkpoint; a disk that is full is told, and training goes on."""
        if not self.setup.accelerator.is_main_process:
            return
        try:
            self.save()
        except OSError as error:
            warnings.warn(
                f"checkpoint {self.progress.step} could not be written ({error.strerror or error}); training "
                "goes on, the checkpoints before it are as they were",
                stacklevel=3,
            )


@contextmanager
def evaluating(setup: Setup):
    """The models in evaluation mode inside the block, and as they were after it."""
    pipe = setup.family.pipe
    models = [pipe.unet, *(getattr(pipe, part) for part in setup.family.text_encoders)]
    learning = [model for model in models if model.training]
    for model in learning:
        model.eval()
    try:  # a compiled model would be compiled anew for other shapes and without gradients
        with input_casts(models, True), torch.compiler.set_stance("force_eager"):
            yield
    finally:
        for model in learning:
            model.train()


def _reason(step: int, what: str) -> str:
    return f"at step {step} the {what}: the learning rate is usually too high, or fp16 overflows"
