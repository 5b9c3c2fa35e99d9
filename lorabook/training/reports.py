"""What a person sees of a run while it goes on: a bar, a curve, images; trackers' reports."""

import os
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
from accelerate import Accelerator
from accelerate.tracking import GeneralTracker, get_available_trackers
from accelerate.utils import LoggerType
from PIL import Image
from tqdm.auto import tqdm

from lorabook.checks import first_line
from lorabook.lora.metadata import shareable
from lorabook.show.display import in_notebook
from lorabook.show.grid import ImageGrid
from lorabook.show.plots import plot_losses
from lorabook.training.config import TrainingConfig

CURVE_EVERY = 60  # seconds; a shorter run has the bar alone, unless it generates images
PROJECTS = {"text_to_image": "text2image-fine-tune", "dreambooth": "dreambooth-lora"}


class Display:
    """The progress bar, loss curve and validation images of one run; silent unless `shown`."""

    def __init__(self, steps: int, step: int, shown: bool):
        self.notebook = shown and in_notebook()
        self.bar = tqdm(total=steps, initial=step, desc="training", disable=not shown)
        self.handles: dict[str, object] = {}
        self.next_curve = time.perf_counter() + CURVE_EVERY

    def show_losses(self, history: list[dict], last: bool = False) -> None:
        """Show the last loss, and the curve if it is time."""
        self.bar.set_postfix(loss=f"{history[-1]['loss']:.3f}", refresh=False)
        now = time.perf_counter()
        if self.notebook and (last and self.handles or now > self.next_curve):
            self._show("curve", plot_losses(history))
            self.next_curve = now + CURVE_EVERY

    def show_images(self, grid: ImageGrid) -> None:
        """Show the validation images so far."""
        if self.notebook:
            self._show("images", grid)

    def _show(self, name: str, figure: object) -> None:
        from IPython.display import display

        if name in self.handles:
            self.handles[name].update(figure)
        else:
            self.handles[name] = display(figure, display_id=True)


def installed_trackers(config: TrainingConfig) -> list[str]:
    """The trackers that `report_to` names and that are installed; a warning for one that is not."""
    several = {"all": ["tensorboard", "wandb", "comet_ml"], "none": []}
    wanted, available = several.get(config.report_to, [config.report_to]), get_available_trackers()
    installed = [name for name in wanted if LoggerType(name) in available]
    if config.report_to != "all" and wanted != installed:
        warnings.warn(
            f"report_to {config.report_to}: it is not installed, so nothing is reported; "
            "pip install 'lorabook[trackers]' brings it, --report_to=none silences this",
            stacklevel=2,
        )
    return installed


def open_trackers(accelerator: Accelerator, config: TrainingConfig) -> None:
    """Begin reporting; a tracker that refuses is left out, with a warning."""
    if not accelerator.log_with:
        return
    folder = Path(config.output_dir).absolute()
    folder.mkdir(parents=True, exist_ok=True)
    settings = shareable(config.settings).items()
    settings = {name: value for name, value in settings if isinstance(value, int | float | str)}
    wandb = {"dir": str(folder)}
    if "wandb" in map(str, accelerator.log_with) and not _has_wandb_login():
        wandb["mode"] = "offline"
        warnings.warn(
            "report_to wandb: no login found, so it reports offline into output_dir; «wandb sync» "
            "uploads it",
            stacklevel=2,
        )
    try:
        accelerator.init_trackers(
            PROJECTS[config.method], config=settings, init_kwargs={"wandb": wandb}
        )
    except Exception as error:  # each tracker has errors of its own; none is worth a training run
        warnings.warn(
            f"report_to {config.report_to} is left out: {first_line(error)}", stacklevel=2
        )


def report(accelerator: Accelerator, record: dict) -> None:
    """Report a record of the history; its step is the tracker's step."""
    values = {name: value for name, value in record.items() if isinstance(value, float)}
    values |= {f"loss_for_{row}": record["loss"] for row in record.get("rows", ())}
    _report(accelerator, lambda tracker: tracker.log(values, step=record["step"]))


def report_images(accelerator: Accelerator, images: list[Image.Image], step: int) -> None:
    """Report the validation images of a step."""
    arrays = np.stack([np.asarray(image) for image in images])

    def log(tracker: GeneralTracker) -> None:
        if tracker.name == "tensorboard":
            tracker.log_images({"validation": arrays}, step=step, dataformats="NHWC")
        elif hasattr(tracker, "log_images"):
            tracker.log_images({"validation": images}, step=step)

    _report(accelerator, log)


def _report(accelerator: Accelerator, log: Callable[[GeneralTracker], None]) -> None:
    for tracker in accelerator.trackers:
        try:
            log(tracker)
        except Exception as error:
            sentence = f"{tracker.name} did not take a report: {first_line(error)}"
            warnings.warn(sentence, stacklevel=3)


def _has_wandb_login() -> bool:
    if os.environ.get("WANDB_MODE") in ("offline", "disabled", "dryrun"):
        return True
    import wandb

    return bool(os.environ.get("WANDB_API_KEY") or wandb.api.api_key)
