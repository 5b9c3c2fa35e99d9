"""Reports to tensorboard, wandb and others, by accelerate's trackers; training goes on without them."""

import importlib.util
import os
import warnings
from pathlib import Path

import numpy as np
from accelerate import Accelerator
from PIL import Image

from lorabook.checks import first_line
from lorabook.lora.metadata import shareable
from lorabook.training.config import TrainingConfig

PACKAGES = {
    "tensorboard": ("tensorboard", "tensorboardX"),
    "wandb": ("wandb",),
    "comet_ml": ("comet_ml",),
}
PROJECTS = {"text_to_image": "text2image-fine-tune", "dreambooth": "dreambooth-lora"}


def trackers_of(config: TrainingConfig) -> list[str]:
    """The trackers asked for that are installed; a sentence for each that is not."""
    asked = {"all": list(PACKAGES), "none": []}.get(config.report_to, [config.report_to])
    there = [
        name
        for name in asked
        if any(importlib.util.find_spec(package) for package in PACKAGES[name])
    ]
    if config.report_to != "all":
        for name in set(asked) - set(there):
            warnings.warn(
                f"report_to {name}: it is not installed, so nothing is reported; pip install 'lorabook[trackers]' "
                "brings it, --report_to=none silences this",
                stacklevel=2,
            )
    return there


def open_trackers(accelerator: Accelerator, config: TrainingConfig) -> None:
    """Begin reporting; a tracker that refuses is left out, in one sentence."""
    if not accelerator.log_with:
        return
    settings = {
        key: value
        for key, value in shareable(config.settings).items()
        if isinstance(value, (int, float, str, bool))
    }
    wandb = {"dir": str(Path(config.output_dir).absolute())}
    if (
        any(getattr(name, "value", name) == "wandb" for name in accelerator.log_with)
        and not _wandb_login()
    ):
        wandb["mode"] = "offline"
        warnings.warn(
            "report_to wandb: no login found, so it reports offline into output_dir; «wandb sync» uploads it",
            stacklevel=2,
        )
    Path(config.output_dir).mkdir(parents=True, exist_ok=True)
    try:
        accelerator.init_trackers(
            PROJECTS[config.method], config=settings, init_kwargs={"wandb": wandb}
        )
    except (
        Exception
    ) as error:  # each tracker has errors of its own, and none is worth a training run
        warnings.warn(
            f"report_to {config.report_to} is left out: {first_line(error)}", stacklevel=2
        )


def report(accelerator: Accelerator, record: dict) -> None:
    """Report a record of the history; its step is the tracker's step."""
    values = {key: value for key, value in record.items() if isinstance(value, float)}
    for row in record.get("rows", ()):
        values[f"loss_for_{row}"] = record["loss"]
    _guarded(lambda tracker: tracker.log(values, step=record["step"]), accelerator)


def report_pictures(accelerator: Accelerator, pictures: list[Image.Image], step: int) -> None:
    """Report the validation pictures of a step."""
    arrays = np.stack([np.asarray(picture) for picture in pictures])

    def log(tracker):
        if tracker.name == "tensorboard":
            tracker.log_images({"validation": arrays}, step=step, dataformats="NHWC")
        elif hasattr(tracker, "log_images"):
            tracker.log_images({"validation": pictures}, step=step)

    _guarded(log, accelerator)


def _guarded(log, accelerator: Accelerator) -> None:
    for tracker in accelerator.trackers:
        try:
            log(tracker)
        except Exception as error:
            warnings.warn(
                f"{tracker.name} did not take a report: {first_line(error)}", stacklevel=3
            )


def _wandb_login() -> bool:
    if os.environ.get("WANDB_MODE") in ("offline", "disabled", "dryrun"):
        return True
    import wandb

    return bool(os.environ.get("WANDB_API_KEY") or wandb.api.api_key)
