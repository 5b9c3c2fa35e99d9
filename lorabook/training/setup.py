"""What every training begins with: devices, the base model, each check that needs no images."""

import importlib.util
import os
import random
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import InitProcessGroupKwargs, ProjectConfiguration, broadcast_object_list
from diffusers import AutoencoderKL, DiffusionPipeline, UNet2DConditionModel
from huggingface_hub import try_to_load_from_cache
from transformers import AutoTokenizer

from lorabook.checks import first_line
from lorabook.hub import client, open_repository
from lorabook.pipelines import check_hub, default_device, find_model, load_pipeline, whole_weights
from lorabook.training.config import TrainingConfig
from lorabook.training.devices import process_state
from lorabook.training.families import StableDiffusion, check_trainable, family_of
from lorabook.training.lora import target_layers
from lorabook.training.reports import installed_trackers

DTYPES = {"no": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


@dataclass
class Setup:
    """A run that can begin.

    Attributes:
        config: With everything filled in that the model family decides.
        given: The config as it was given, with the seed of the run.
        given_seed: The seed that was given, or None.
        accelerator: Devices and precision.
        family: The base model.
        dtype: Of the frozen weights.
        resolution: Of the training images, in pixels.
        repository: Where the adapter will be pushed, or None.
    """

    config: TrainingConfig
    given: TrainingConfig
    given_seed: int | None
    accelerator: Accelerator
    family: StableDiffusion
    dtype: torch.dtype
    resolution: int
    repository: str | None


@contextmanager
def set_up(config: TrainingConfig) -> Iterator[Setup]:
    """Load the base model and check all settings; after the block the process is as it was before.

    Raises:
        FileNotFoundError: In one sentence, if something is missing.
        ValueError: In one sentence, if something cannot be used.
    """
    for sentence in config.without_effect:
        warnings.warn(sentence, stacklevel=3)
    with process_state():
        setup = _load(config)
        try:
            yield setup
        finally:
            for tracker in setup.accelerator.trackers:
                tracker.finish()


def check_early(config: TrainingConfig) -> None:
    """Check what can be known before images or models are read.

    Raises:
        FileNotFoundError: In one sentence, if the base model is missing.
        ValueError: In one sentence, if something cannot be used.
    """
    _check_base_model(config)
    wanted = {"prodigyopt": "optimizer prodigy", "bitsandbytes": "use_8bit_adam"}
    uses = {"prodigyopt": config.optimizer == "prodigy", "bitsandbytes": config.use_8bit_adam}
    for package, flag in wanted.items():
        if uses[package] and importlib.util.find_spec(package) is None:
            raise ValueError(
                f"{flag} needs the package {package}, which is not installed: "
                "pip install 'lorabook[lowbit]'"
            )
    if config.mixed_precision == "fp16" and not _can_use_fp16():
        raise ValueError("mixed_precision fp16 needs a GPU, and none is here: use bf16 or no")
    if config.push_to_hub:
        client(_repository(config), config.hub_token)


def _load(config: TrainingConfig) -> Setup:
    accelerator = _accelerator(config)
    repository = None
    if config.push_to_hub and accelerator.is_main_process:
        repository = open_repository(_repository(config), config.hub_token)
    dtype = DTYPES.get(accelerator.mixed_precision, torch.float32)
    family = family_of(_pipeline(config, accelerator, dtype), config.prediction_type)
    seed = random.randrange(2**31) if config.seed is None else config.seed
    given = replace(config, seed=broadcast_object_list([seed])[0])  # one seed for all processes
    if accelerator.mixed_precision != "no":  # it may be the launcher's
        given = replace(given, mixed_precision=accelerator.mixed_precision)
    complete = family.resolve(given)
    target_layers(family, complete)  # raises where the rank or a block does not fit
    resolution = checked_resolution(family, config.resolution)
    if config.allow_tf32:
        torch.backends.cuda.matmul.allow_tf32 = True
    return Setup(complete, given, config.seed, accelerator, family, dtype, resolution, repository)


def _check_base_model(config: TrainingConfig) -> None:
    """Whether the base model can be trained, by its configs: a few kilobytes, from the Hub too."""
    model = find_model(config.pretrained_model_name_or_path)
    where = {"revision": config.revision, "cache_dir": config.cache_dir}
    if not Path(model).is_dir():
        check_hub(model, **where)
        cached = try_to_load_from_cache(model, "unet/config.json", **where)
        where["local_files_only"] = isinstance(cached, str)
    unet = {}
    try:
        index = DiffusionPipeline.load_config(model, **where)
        if "unet" in index:
            unet = UNet2DConditionModel.load_config(model, subfolder="unet", **where)
    except (OSError, ValueError):  # loading the model will say what is missing
        return
    check_trainable(index, unet)


def _repository(config: TrainingConfig) -> str:
    return config.hub_model_id or Path(config.output_dir).absolute().name


def _can_use_fp16() -> bool:
    return torch.cuda.is_available() or default_device() == "mps"


def _accelerator(config: TrainingConfig) -> Accelerator:
    precision = config.mixed_precision or os.environ.get("ACCELERATE_MIXED_PRECISION")
    if precision == "fp16" and not _can_use_fp16():
        warnings.warn(
            "the launcher asks for mixed precision fp16, which the CPU does not have: training in "
            "float32",
            stacklevel=4,
        )
        precision = "no"
    logs = str(Path(config.output_dir, config.logging_dir))
    return Accelerator(
        gradient_accumulation_steps=config.gradient_accumulation_steps,
        mixed_precision=precision,
        log_with=installed_trackers(config) or None,
        project_config=ProjectConfiguration(project_dir=config.output_dir, logging_dir=logs),
        # one process encodes while all wait
        kwargs_handlers=[InitProcessGroupKwargs(timeout=timedelta(hours=12))],
    )


def _pipeline(
    config: TrainingConfig, accelerator: Accelerator, dtype: torch.dtype
) -> DiffusionPipeline:
    """The base pipeline, with the VAE, the tokenizer and the attention that the config names."""
    components = {}
    if vae := config.pretrained_vae_model_name_or_path:
        with whole_weights(vae):
            components["vae"] = _component(AutoencoderKL, vae, "VAE", torch_dtype=dtype)
    if name := config.tokenizer_name:
        components["tokenizer"] = _component(AutoTokenizer, name, "tokenizer", use_fast=False)
    pipe = load_pipeline(
        config.pretrained_model_name_or_path,
        device=accelerator.device,
        dtype=dtype,
        revision=config.revision,
        variant=config.variant,
        cache_dir=config.cache_dir,
        **components,
    )
    if getattr(pipe, "safety_checker", None):  # the LoRA would learn the images that it blackens
        pipe.safety_checker = None
    if length := config.tokenizer_max_length:
        for tokenizer in filter(None, (pipe.tokenizer, getattr(pipe, "tokenizer_2", None))):
            tokenizer.model_max_length = length
    if config.text_encoder_use_attention_mask:
        if hasattr(pipe, "text_encoder_2"):
            warnings.warn(
                "text_encoder_use_attention_mask has no effect: SDXL's text encoders see the "
                "padding",
                stacklevel=6,
            )
        pipe.text_encoder.config.use_attention_mask = True
    if config.enable_xformers_memory_efficient_attention:
        try:
            pipe.unet.enable_xformers_memory_efficient_attention()
        except (ImportError, ValueError) as error:
            missing = isinstance(error, ImportError)
            warnings.warn(
                "enable_xformers_memory_efficient_attention has no effect, "
                f"{'it is not installed' if missing else 'it needs a GPU'}: torch's own "
                "attention, which needs as little memory, is used",
                stacklevel=6,
            )
    return pipe


def _component(loader: type, name: str, kind: str, **kwargs):
    missing = f"{kind} {name!r} not found: no folder {Path(name).absolute()}, and"
    if not Path(name).is_dir() and not re.fullmatch(r"[\w.-]+/[\w.-]+", name):
        raise FileNotFoundError(f"{missing} it is not a Hub id of the form owner/name")
    try:
        return loader.from_pretrained(name, **kwargs)
    except (OSError, ValueError) as error:
        raise FileNotFoundError(
            f"{missing} the Hub did not give it: {first_line(error, 120)}"
        ) from error


def checked_resolution(family: StableDiffusion, wanted: int | None) -> int:
    """The side of the training images in pixels; the VAE and the UNet both halve it."""
    resolution, factor = wanted or family.resolution, family.pipe.vae_scale_factor
    if resolution % factor:
        step = factor * 2 ** (len(family.pipe.unet.config.block_out_channels) - 1)
        nearest = max(step, round(resolution / step) * step)
        raise ValueError(
            f"resolution {resolution} is not a multiple of {factor}, the factor by which this "
            f"model's VAE shrinks images; try {nearest}"
        )
    return resolution
