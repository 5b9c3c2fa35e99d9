"""What every training begins with: devices, the base model, each check that needs no images."""

import importlib.util
import os
import random
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import InitProcessGroupKwargs, ProjectConfiguration, broadcast_object_list
from diffusers import AutoencoderKL, DiffusionPipeline, UNet2DConditionModel
from huggingface_hub import try_to_load_from_cache
from transformers import AutoTokenizer

from lorabook.hub import client, open_repository
from lorabook.pipelines import (
    check_hub,
    default_device,
    find_model,
    load_components,
    load_pipeline,
)
from lorabook.training.config import TrainingConfig
from lorabook.training.families import StableDiffusion, check_trainable, family_of
from lorabook.training.lora import target_layers
from lorabook.training.reports import installed_trackers
from lorabook.upstream import separate_accelerator

DTYPES = {"no": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


@dataclass
class Setup:
    """A run that can begin."""

    config: TrainingConfig  # with all that it left open: the family's values, precision, seed
    is_seeded: bool  # whether the seed was given
    accelerator: Accelerator
    family: StableDiffusion

    @property
    def dtype(self) -> torch.dtype:
        """Of the frozen weights."""
        return DTYPES[self.config.mixed_precision]


@contextmanager
def set_up(config: TrainingConfig) -> Iterator[Setup]:
    """Load the base model and check all settings; after the block the process is as it was before.

    Raises FileNotFoundError for what is missing, and ValueError for what cannot be used.
    """
    for sentence in config.without_effect:
        warnings.warn(sentence, stacklevel=3)
    with _process_state():
        setup = _load(config)
        try:
            yield setup
        finally:
            for tracker in setup.accelerator.trackers:
                tracker.finish()


def check_early(config: TrainingConfig) -> None:
    """Check what can be known before images or models are read; raises as `set_up`."""
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
        client(config.repository, config.hub_token)


def _load(config: TrainingConfig) -> Setup:
    accelerator = _accelerator(config)
    if config.push_to_hub and accelerator.is_main_process:
        open_repository(config.repository, config.hub_token)
    precision = accelerator.mixed_precision  # it may be the launcher's
    pipe = _pipeline(config, accelerator.device, DTYPES.get(precision, torch.float32))
    family = family_of(pipe, config.prediction_type)
    seed = random.randrange(2**31) if config.seed is None else config.seed
    complete = replace(
        family.resolve(config),
        seed=broadcast_object_list([seed])[0],  # one for all processes
        mixed_precision=precision,
        resolution=_checked_resolution(family, config.resolution),
    )
    target_layers(family, complete)  # raises where the rank or a block does not fit
    if config.allow_tf32:
        torch.backends.cuda.matmul.allow_tf32 = True
    return Setup(complete, config.seed is not None, accelerator, family)


@contextmanager
def _process_state() -> Iterator[None]:
    """Put back after the block what a run changes in the process.

    That is Python's, numpy's and torch's random generators, TF32, and a user's own Accelerator.
    """
    python, arrays = random.getstate(), np.random.get_state()
    tf32 = torch.backends.cuda.matmul.allow_tf32
    gpus = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ()
    with torch.random.fork_rng(list(gpus)), separate_accelerator():
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(arrays)
            torch.backends.cuda.matmul.allow_tf32 = tf32


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


def _can_use_fp16() -> bool:
    return default_device() in ("cuda", "mps")


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
    config: TrainingConfig, device: torch.device, dtype: torch.dtype
) -> DiffusionPipeline:
    """The base pipeline, with the VAE, the tokenizer and the attention that the config names."""
    components = {}
    if vae := config.pretrained_vae_model_name_or_path:
        (components["vae"],) = load_components("VAE", vae, AutoencoderKL, torch_dtype=dtype)
    if name := config.tokenizer_name:
        loaded = load_components("tokenizer", name, AutoTokenizer, use_fast=False)
        components["tokenizer"] = loaded[0]
    pipe = load_base(config, device, dtype, **components)
    if getattr(pipe, "safety_checker", None):  # the LoRA would learn the images that it blackens
        pipe.safety_checker = None
    if length := config.tokenizer_max_length:
        for tokenizer in filter(None, (pipe.tokenizer, getattr(pipe, "tokenizer_2", None))):
            tokenizer.model_max_length = length
    if config.text_encoder_use_attention_mask:
        if hasattr(pipe, "text_encoder_2"):
            _warn_without_effect(
                "text_encoder_use_attention_mask", "SDXL's text encoders see the padding"
            )
        pipe.text_encoder.config.use_attention_mask = True
    if config.enable_xformers_memory_efficient_attention:
        try:
            pipe.unet.enable_xformers_memory_efficient_attention()
        except (ImportError, ValueError) as error:
            missing = isinstance(error, ImportError)
            _warn_without_effect(
                "enable_xformers_memory_efficient_attention",
                f"{'it is not installed' if missing else 'it needs a GPU'}: torch's own "
                "attention, which needs as little memory, is used",
            )
    return pipe


def load_base(
    config: TrainingConfig, device: torch.device, dtype: torch.dtype, **components
) -> DiffusionPipeline:
    """The base pipeline that a config names, with other components in the place of its own."""
    return load_pipeline(
        config.pretrained_model_name_or_path,
        device=device,
        dtype=dtype,
        revision=config.revision,
        variant=config.variant,
        cache_dir=config.cache_dir,
        **components,
    )


def _warn_without_effect(flag: str, reason: str) -> None:
    warnings.warn(f"{flag} has no effect, {reason}", stacklevel=7)


def _checked_resolution(family: StableDiffusion, wanted: int | None) -> int:
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
