"""What happens between the steps: reading the loss, validating, reporting, saving."""

import math
import warnings
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from lorabook.training.checkpoints import save_checkpoint
from lorabook.training.reports import Display, report, report_images
from lorabook.training.trainer import Trainer
from lorabook.training.validation import ValidationImages, validation_loss

READ_EVERY = 10  # steps; reading the loss waits for the device
VALIDATIONS = 5  # validation losses on the way


class Callbacks:
    """What a run does between its steps."""

    def __init__(self, trainer: Trainer, images: ValidationImages | None = None):
        self.trainer, self.images = trainer, images
        shown = trainer.accelerator.is_local_main_process
        self.display = Display(trainer.steps, trainer.step, shown)
        self.finite_step, self.finite_weights = 0, {}  # the last at which all was finite

    def before_training(self) -> None:
        """Validate the base model, unless a checkpoint has it."""
        trainer = self.trainer
        if trainer.step == 0 and (trainer.held_out or self.images):
            trainer.history.append({"step": 0})
            self._validate(loss=True, images=True)
            if len(trainer.history[0]) == 1:
                trainer.history.pop()

    def after_step(self) -> None:
        """Do what is due after this step."""
        trainer, config = self.trainer, self.trainer.config
        self.display.bar.update()
        step, last = trainer.step, trainer.step == trainer.steps
        validations = {round(trainer.steps * part / VALIDATIONS) for part in range(1, VALIDATIONS)}
        saves = last or step % config.checkpointing_steps == 0
        validates = last or step in validations
        generates = last or step % (config.validation_epochs * trainer.steps_in_epoch) == 0
        if saves or validates or generates or step % READ_EVERY == 0:
            self.read_losses()
        if validates or generates:
            self._validate(validates, generates)
        if last:
            self.display.show_losses(trainer.history, last=True)
        if saves:
            self.save()

    def read_losses(self) -> None:
        """Bring the losses from the device, check that all is finite, and remember the weights."""
        trainer = self.trainer
        records = [r for r in trainer.history if isinstance(r.get("loss"), Tensor)]
        if records:
            losses = torch.stack([record["loss"] for record in records])
            losses = trainer.accelerator.reduce(losses, "mean").tolist()
            for record, loss in zip(records, losses, strict=True):
                record["loss"] = loss
                report(trainer.accelerator, record)
                if not math.isfinite(loss):
                    raise _not_finite(record["step"], f"loss is {loss}")
        parameters = trainer.parameters.values()
        weights = torch.cat([value.detach().flatten() for value in parameters]).cpu()  # one copy
        if not weights.isfinite().all():
            raise _not_finite(trainer.step, "weights are not finite")
        sizes = [value.numel() for value in parameters]
        named = zip(trainer.parameters.items(), weights.split(sizes), strict=True)
        self.finite_weights = {name: part.view(value.shape) for (name, value), part in named}
        self.finite_step = trainer.step
        if trainer.accelerator.is_main_process:
            self.display.show_losses(trainer.history)

    @torch.no_grad()
    def restore_finite_weights(self) -> None:
        """Give the models the last weights that were finite."""
        for name, value in self.trainer.parameters.items():
            value.copy_(self.finite_weights[name])

    def save(self) -> None:
        """Write a checkpoint; on a full disk warn, and let training go on."""
        trainer = self.trainer
        if not trainer.accelerator.is_main_process:
            return
        folder, limit = Path(trainer.config.output_dir), trainer.config.checkpoints_total_limit
        try:
            save_checkpoint(folder, trainer.state_dict(), trainer.write_adapter, limit)
        except OSError as error:
            warnings.warn(
                f"checkpoint {trainer.step} could not be written ({error.strerror or error}); "
                "training goes on, the checkpoints before it are as they were",
                stacklevel=3,
            )

    def _validate(self, loss: bool, images: bool) -> None:
        """Add the validation loss, and images with their similarities, to the last record."""
        trainer, record = self.trainer, self.trainer.history[-1]
        if not trainer.accelerator.is_main_process:
            return
        values = {}
        trainer.learn(False)
        # a compiled model would be compiled anew for other shapes and without gradients
        with torch.compiler.set_stance("force_eager"):
            if loss and trainer.held_out:
                with trainer.accelerator.autocast():
                    values["validation_loss"] = validation_loss(trainer.family, trainer.held_out)
            if images and self.images:
                pictures = self._generate(record["step"])
                values |= self.images.similarities(pictures)
                report_images(trainer.accelerator, pictures, record["step"])
        trainer.learn(True)
        record |= values
        report(trainer.accelerator, {"step": record["step"]} | values)

    def _generate(self, step: int) -> list[Image.Image]:
        """The validation images of a step, with the VAE in the pipeline's precision."""
        family, dtype = self.trainer.family, self.trainer.dtype
        if family.pipe.vae.dtype != dtype:
            family.pipe.vae.to(dtype)
        with family.on_device(family.encoders, family.device):
            images = self.images.generate(family.pipe, step)
        if self.images.steps:
            self.display.show_images(self.images.grid())
        return images


def _not_finite(step: int, what: str) -> FloatingPointError:
    return FloatingPointError(
        f"at step {step} the {what}: the learning rate is usually too high, or fp16 overflows"
    )
