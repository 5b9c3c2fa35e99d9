"""What a training run is told: dataclasses whose fields are the command line's flags."""
import math
import os
import shlex
import sys
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import get_args

from accelerate import PartialState
from datasets.exceptions import DatasetsError
from transformers import HfArgumentParser

from lorabook.blocks import TARGETS

INTERPOLATIONS = ("nearest", "box", "bilinear", "hamming", "bicubic", "lanczos")
LR_SCHEDULERS = ("linear", "cosine", "cosine_with_restarts", "polynomial", "constant", "constant_with_warmup")
PREDICTION_TYPES = ("epsilon", "v_prediction")


def _flag(default, help_text: str, **kwargs):
    return field(default=default, metadata={"help": help_text, **kwargs})


@dataclass(frozen=True)
class TextToImageConfig:
    """A text-to-image LoRA training run; names and defaults are those of diffusers' train_text_to_image_lora.py.

    Every field is a flag of `python -m lorabook.training.text_to_image`, and its help says what it does. None means
    that the model or the data decide. Raises ValueError, naming the field, if a value cannot be used.
    """

    pretrained_model_name_or_path: str | None = _flag(None, "base model: folder, bundled name or Hub id; default: the bundled tiny-sd without a GPU, Stable Diffusion 1.5 with one")
    revision: str | None = _flag(None, "revision of the base model on the Hub")
    variant: str | None = _flag(None, "variant of its weight files, for example fp16")
    dataset_name: str | None = _flag(None, "captioned images: Hub id or bundled name")
    dataset_config_name: str | None = _flag(None, "configuration of the Hub data set")
    train_data_dir: str | None = _flag(None, "captioned images: a folder")
    image_column: str | None = _flag(None, "column of images; found if not given")
    caption_column: str | None = _flag(None, "column of captions; found if not given")
    max_train_samples: int | None = _flag(None, "use only the first so many images")
    validation_split: float = _flag(0.0, "share of the images kept out of training to measure the loss on")
    validation_prompt: str | None = _flag(None, "prompt of the pictures drawn before and after training")
    num_validation_images: int = _flag(4, "number of those pictures")
    output_dir: str = _flag("sd-model-finetuned-lora", "folder for the adapter")
    cache_dir: str | None = _flag(None, "where downloads are kept")
    seed: int | None = _flag(None, "seed of everything random; not given: another one each time")
    resolution: int | None = _flag(None, "side of the training images in pixels; default: the model's own")
    center_crop: bool = _flag(False, "crop the middle; else a random part where the image is not square")
    random_flip: bool = _flag(False, "mirror half of the images")
    image_interpolation_mode: str = _flag("lanczos", "how images are resized", choices=INTERPOLATIONS)
    train_batch_size: int = _flag(16, "images a step on each device")
    num_train_epochs: int = _flag(100, "passes over the images, where max_train_steps is not given")
    max_train_steps: int | None = _flag(None, "number of optimiser steps")
    gradient_accumulation_steps: int = _flag(1, "batches summed before an optimiser step")
    gradient_checkpointing: bool = _flag(False, "save memory by computing activations twice")
    learning_rate: float = _flag(1e-4, "learning rate")
    scale_lr: bool = _flag(False, "multiply the rate by devices, accumulation and batch size")
    lr_scheduler: str = _flag("constant", "how the rate changes", choices=LR_SCHEDULERS)
    lr_warmup_steps: int = _flag(500, "steps over which the rate rises, where the schedule has such")
    snr_gamma: float | None = _flag(None, "weigh the loss by signal to noise, clamped at this (5 is usual)")
    noise_offset: float = _flag(0.0, "strength of a constant added to each channel's noise")
    prediction_type: str | None = _flag(None, "epsilon or v_prediction; default: the model's own", choices=PREDICTION_TYPES)
    caption_dropout: float = _flag(0.0, "share of captions replaced by an empty one")
    adam_beta1: float = _flag(0.9, "AdamW's first beta")
    adam_beta2: float = _flag(0.999, "AdamW's second beta")
    adam_weight_decay: float = _flag(1e-2, "AdamW's weight decay")
    adam_epsilon: float = _flag(1e-8, "AdamW's epsilon")
    max_grad_norm: float = _flag(1.0, "gradients are clipped to this norm")
    mixed_precision: str | None = _flag(None, "precision of the frozen weights", choices=("no", "fp16", "bf16"))
    rank: int = _flag(4, "rank of every adapted layer")
    alpha: float | None = _flag(None, "alpha: the adapter's output is scaled by alpha / rank; default: equal to rank")
    target: str = _flag("attention", "which UNet layers are adapted", choices=tuple(TARGETS))
    lora_dropout: float = _flag(0.0, "dropout on the adapter's input")

    def __post_init__(self):
        for option in fields(self):
            value = getattr(self, option.name)
            if isinstance(value, os.PathLike):  # so that it can stand in the adapter's metadata
                object.__setattr__(self, option.name, os.fspath(value))
            else:
                _check(self, option.name, _fits(value, option), f"of type {_type_name(option.type)}")
        for name in ("rank", "train_batch_size", "num_train_epochs", "gradient_accumulation_steps"):
            _check(self, name, getattr(self, name) >= 1, "at least 1")
        for name in ("max_train_steps", "max_train_samples", "resolution"):
            _check(self, name, getattr(self, name) is None or getattr(self, name) >= 1, "at least 1")
        for name in ("lr_warmup_steps", "num_validation_images"):
            _check(self, name, getattr(self, name) >= 0, "0 or more")
        for name in ("learning_rate", "max_grad_norm", "adam_epsilon"):
            _check(self, name, math.isfinite(getattr(self, name)) and getattr(self, name) > 0, "a number above 0")
        for name in ("caption_dropout", "lora_dropout", "validation_split", "adam_beta1", "adam_beta2"):
            _check(self, name, 0 <= getattr(self, name) < 1, "0 or more and below 1")
        for name in ("noise_offset", "adam_weight_decay"):
            _check(self, name, math.isfinite(getattr(self, name)) and getattr(self, name) >= 0, "0 or more")
        _check(self, "snr_gamma", self.snr_gamma is None or (math.isfinite(self.snr_gamma) and self.snr_gamma > 0),
               "a number above 0")
        _check(self, "seed", self.seed is None or 0 <= self.seed < 2**32, "0 or more and below 2 ** 32")
        _check(self, "alpha", self.alpha is None or (math.isfinite(self.alpha) and self.alpha > 0), "a number above 0")
        for option in fields(self):
            choices, value = option.metadata.get("choices"), getattr(self, option.name)
            if choices and value is not None:
                _check(self, option.name, value in choices, f"one of {', '.join(choices)}")
        if self.dataset_name and self.train_data_dir:
            raise ValueError("dataset_name and train_data_dir are both given; give one of them")
        _check_output(Path(self.output_dir))

    @property
    def command(self) -> str:
        """The command line that repeats this run."""
        parts = ["accelerate launch --quiet -m lorabook.training.text_to_image"]
        for option in fields(self):
            value = getattr(self, option.name)
            if value == option.default:
                continue
            parts.append(f"--{option.name}" if value is True else f"--{option.name}={shlex.quote(str(value))}")
        return " ".join(parts)

    @property
    def told(self) -> dict:
        """The fields that were given, as plain data."""
        return {key: value for key, value in asdict(self).items() if value != type(self).__dataclass_fields__[key].default}


def _fits(value, option) -> bool:
    """Whether a value is of a field's type; a whole number will do for a float, None where it is the default."""
    if value is None:  # HfArgumentParser takes the None out of the fields' types
        return option.default is None
    allowed = get_args(option.type) or (option.type,)
    if isinstance(value, bool):
        return bool in allowed
    return isinstance(value, (*allowed, int) if float in allowed else allowed)


def _type_name(kind) -> str:
    return str(kind) if get_args(kind) else kind.__name__


def _check_output(folder: Path) -> None:
    """Fail now rather than after training where the output folder cannot be made."""
    if folder.is_file():
        raise ValueError(f"output_dir {str(folder)!r} is a file; give a folder")
    there = next(p for p in (folder.absolute(), *folder.absolute().parents) if p.exists())
    if not there.is_dir() or not os.access(there, os.W_OK):
        raise ValueError(f"output_dir {str(folder)!r} cannot be made: {there} is a file or may not be written to")


def _check(config, name: str, holds: bool, expected: str) -> None:
    if not holds:
        raise ValueError(f"{name} must be {expected}, not {getattr(config, name)!r}")


class _Parser(HfArgumentParser):
    def error(self, message: str):
        self.exit(2, f"error: {message}\n")


def parse(config_class: type, arguments: list[str] | None = None):
    """A config from a command line; unknown and abbreviated flags and bad values end the program with one sentence."""
    parser = _Parser(config_class, allow_abbrev=False, description=config_class.__doc__.splitlines()[0])
    config, unknown = parser.parse_args_into_dataclasses(arguments, return_remaining_strings=True)
    if unknown:
        flag = unknown[0].split("=")[0]
        near = [f"--{f.name}" for f in fields(config_class) if len(flag) > 3 and f"--{f.name}".startswith(flag)][:3]
        parser.error(f"unknown flag {unknown[0]}{'; did you mean ' + ' or '.join(near) + '?' if near else ''}")
    return config


def run_command_line(config_class: type, train) -> None:
    """Train as the command line says; bad input ends in one sentence and exit status 2."""
    try:
        run = train(parse(config_class))
    except (ValueError, OSError, FloatingPointError, DatasetsError) as error:
        print(f"error: {' '.join(str(error).split())[:400]}", file=sys.stderr)
        sys.exit(2)
    if PartialState().is_main_process:
        print(run)
