"""What both kinds of training begin with: devices, the base model, and every check that needs no images."""

import os
import random
import re
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path

import psutil
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import InitProcessGroupKwargs, ProjectConfiguration, broadcast_object_list
from diffusers import AutoencoderKL, DiffusionPipeline, UNet2DConditionModel
from huggingface_hub import try_to_load_from_cache
from transformers import AutoTokenizer

from lorabook.hub import client, open_repository
from lorabook.pipelines import check_hub, default_device, find_model, load_pipeline, whole_weights
from lorabook.training.config import TrainingConfig
from lorabook.training.families import StableDiffusion, check_trainable, family_of
from lorabook.training.lora import target_layers
from lorabook.training.optimizers import check_optimizer
from lorabook.training.process import process_state
from lorabook.training.trackers import trackers_of

DTYPES = {"no": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


@dataclass
class Setup:
    """A run that can begin.

    Attributes:
        config: with everything filled in that the family decides.
        told: the config as it was given, with the seed of the run.
        given_seed: the seed that was given, or None.
        accelerator: devices and precision.
        family: the base model.
        dtype: of the frozen weights.
        resolution: of the training images, in pixels.
        repository: where the adapter will be pushed, or None.
        put_back: gives the process the state it had before: generators, TF32, a user's own Accelerator.
    """

    config: TrainingConfig
    told: TrainingConfig
    given_seed: int | None
    accelerator: Accelerator
    family: StableDiffusion
    dtype: torch.dtype
    resolution: int
    repository: str | None
    put_back: Callable[[], None]


def set_up(config: TrainingConfig) -> Setup:
    """Load the base model and check all settings.

    Raises: FileNotFoundError or ValueError, in one sentence, where something cannot be used.
    """
    put_back = process_state()
    try:
        return _set_up(config, put_back)
    except BaseException:
        put_back()
        raise


def _set_up(config: TrainingConfig, put_back: Callable[[], None]) -> Setup:
    for sentence in config.without_effect:
        warnings.warn(sentence, stacklevel=3)
    accelerator = _accelerator(config)
    repository = (
        open_repository(_repository(config), config.hub_token)
        if config.push_to_hub and accelerator.is_main_process
        else None
    )
    dtype = DTYPES.get(accelerator.mixed_precision, torch.float32)
    family = family_of(_pipeline(config, accelerator, dtype), config.prediction_type)
    given, told = config.seed, replace(config, seed=_common_seed(config.seed))
    if accelerator.mixed_precision != "no":  # it may be the launcher's
        told = replace(told, mixed_precision=accelerator.mixed_precision)
    config = family.resolve(told)
    target_layers(family, config)
    if config.allow_tf32:
        torch.backends.cuda.matmul.allow_tf32 = True
    return Setup(
        config,
        told,
        given,
        accelerator,
        family,
        dtype,
        checked_resolution(family, config.resolution),
        repository,
        put_back,
    )


def check_early(config: TrainingConfig) -> None:
    """What can be told before images or models are read.

    Raises: FileNotFoundError or ValueError, in one sentence.
    """
    _check_base(config)
    check_optimizer(config)
    if config.mixed_precision == "fp16" and not _takes_half():
        raise ValueError("mixed_precision fp16 needs a GPU, and none is here: use bf16 or no")
    if config.push_to_hub:
        client(_repository(config), config.hub_token)


def _check_base(config: TrainingConfig) -> None:
    """Whether the base model can be trained, by its configs, a few kilobytes of its folder or of the Hub."""
    found = find_model(config.pretrained_model_name_or_path)
    asked = {"revision": config.revision, "cache_dir": config.cache_dir}
    if not Path(found).is_dir():
        check_hub(found, **asked)
        asked["local_files_only"] = isinstance(
            try_to_load_from_cache(found, "unet/config.json", **asked), str
        )
    try:
        index = DiffusionPipeline.load_config(found, **asked)
        unet = (
            UNet2DConditionModel.load_config(found, subfolder="unet", **asked)
            if "unet" in index
            else {}
        )
    except (OSError, ValueError):  # loading the model will say what is missing
        return
    check_trainable(index, unet)


def _repository(config: TrainingConfig) -> str:
    return config.hub_model_id or Path(config.output_dir).absolute().name


def _takes_half() -> bool:
    return torch.cuda.is_available() or default_device() == "mps"


def close(setup: Setup) -> None:
    """Leave no global state behind, so that another run, or `notebook_launcher`, can begin."""
    for tracker in setup.accelerator.trackers:
        tracker.finish()
    setup.put_back()


def _common_seed(given: int | None) -> int:
    """The seed that was given, or a random one that all processes share."""
    return broadcast_object_list([random.randrange(2**31) if given is None else given])[0]


def _accelerator(config: TrainingConfig) -> Accelerator:
    AcceleratorState._reset_state()  # else a second run in one process keeps the precision of the first, or fails
    precision = config.mixed_precision or os.environ.get("ACCELERATE_MIXED_PRECISION")
    if precision == "fp16" and not _takes_half():
        warnings.warn(
            "the launcher asks for mixed precision fp16, which the CPU does not have: training in float32",
            stacklevel=4,
        )
        precision = "no"
    logs = str(Path(config.output_dir, config.logging_dir))
    project = ProjectConfiguration(project_dir=config.output_dir, logging_dir=logs)
    accelerator = Accelerator(
        gradient_accumulation_steps=config.gradient_accumulation_steps,
        mixed_precision=precision,
        log_with=trackers_of(config) or None,
        project_config=project,
        kwargs_handlers=[InitProcessGroupKwargs(timeout=timedelta(hours=12))],
    )  # one encodes, all wait
    asked = _processes_asked_for()
    if asked > accelerator.num_processes == 1:
        warnings.warn(
            f"{asked} processes were asked for and one runs: accelerate launch starts a single one on CPUs; "
            f"«torchrun --standalone --nproc_per_node {asked} -m lorabook.training.{config.method} …» starts "
            "them all",
            stacklevel=4,
        )
    return accelerator


def _processes_asked_for() -> int:
    """What the launcher above this process was told by --num_processes; 1 where there is none."""
    parent = psutil.Process().parent()
    try:
        words = " ".join(parent.cmdline() if parent else []).replace("=", " ").split()
    except psutil.Error:
        return 1
    launched = any("accelerate" in word for word in words) and "--num_processes" in words
    told = words[words.index("--num_processes") + 1] if launched else "1"
    return int(told) if told.isdigit() else 1


def _pipeline(config: TrainingConfig, accelerator: Accelerator, dtype: torch.dtype):
    """The base pipeline, with the VAE and tokenizer that were asked for."""
    parts = {}
    if config.pretrained_vae_model_name_or_path:
        with whole_weights(config.pretrained_vae_model_name_or_path):
            parts["vae"] = _part(
                AutoencoderKL, config.pretrained_vae_model_name_or_path, "VAE", torch_dtype=dtype
            )
    if getattr(config, "tokenizer_name", None):
        parts["tokenizer"] = _part(
            AutoTokenizer, config.tokenizer_name, "tokenizer", use_fast=False
        )
    pipe = load_pipeline(
        config.pretrained_model_name_or_path,
        device=accelerator.device,
        dtype=dtype,
        revision=config.revision,
        variant=config.variant,
        cache_dir=config.cache_dir,
        **parts,
    )
    if getattr(pipe, "safety_checker", None):  # what it blackens would be learned
        pipe.safety_checker = None
    if getattr(config, "tokenizer_max_length", None):
        for tokenizer in filter(None, (pipe.tokenizer, getattr(pipe, "tokenizer_2", None))):
            tokenizer.model_max_length = config.tokenizer_max_length
    if getattr(config, "text_encoder_use_attention_mask", False):
        _use_attention_mask(pipe)
    if config.enable_xformers_memory_efficient_attention:
        _use_xformers(pipe)
    return pipe


def _part(loader, name: str, what: str, **kwargs):
    looked = f"{what} {name!r} not found: no folder {Path(name).absolute()}, and"
    if not Path(name).is_dir() and not re.fullmatch(r"[\w.-]+/[\w.-]+", name):
        raise FileNotFoundError(f"{looked} it is not a Hub id of the form owner/name")
    try:
        return loader.from_pretrained(name, **kwargs)
    except (OSError, ValueError) as error:
        raise FileNotFoundError(
            f"{looked} the Hub did not give it: {' '.join(str(error).split())[:120]}"
        ) from error


def _use_attention_mask(pipe) -> None:
    if hasattr(pipe, "text_encoder_2"):
        warnings.warn(
            "text_encoder_use_attention_mask has no effect: SDXL's text encoders see the padding",
            stacklevel=6,
        )
    pipe.text_encoder.config.use_attention_mask = True


def _use_xformers(pipe) -> None:
    try:
        pipe.unet.enable_xformers_memory_efficient_attention()
    except (ImportError, ValueError) as error:
        reason = "it needs a GPU" if isinstance(error, ValueError) else "it is not installed"
        warnings.warn(
            f"enable_xformers_memory_efficient_attention has no effect, {reason}: torch's own attention, which "
            "needs as little memory, is used",
            stacklevel=6,
        )


def checked_resolution(family: StableDiffusion, asked: int | None) -> int:
    """The training resolution in pixels; the VAE and the UNet both halve it, so that not every number will do."""
    resolution = asked or family.resolution
    factor = family.pipe.vae_scale_factor * 2 ** (
        len(family.pipe.unet.config.block_out_channels) - 1
    )
    if resolution % family.pipe.vae_scale_factor:
        raise ValueError(
            f"resolution {resolution} is not a multiple of {family.pipe.vae_scale_factor}, the factor by "
            f"which this model's VAE shrinks images; try {max(factor, round(resolution / factor) * factor)}"
        )
    return resolution
