"""Train a text-to-image LoRA on captioned images, in a notebook or on the command line.

accelerate launch --quiet -m lorabook.training.text_to_image --train_data_dir=… takes the flags of diffusers'
train_text_to_image_lora.py.
"""
import random
from pathlib import Path

import datasets
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import set_seed
from diffusers.training_utils import cast_training_params
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict

import lorabook
from lorabook.adapters.files import WEIGHT_NAME, write_adapter
from lorabook.adapters.load import module_name
from lorabook.blocks import target_modules
from lorabook.images import load_captioned_images
from lorabook.pipelines import find_model, load_pipeline
from lorabook.training.cache import Examples
from lorabook.training.config import TextToImageConfig, run_command_line
from lorabook.training.families import StableDiffusion, family_of
from lorabook.training.loop import train
from lorabook.training.run import TrainingRun
from lorabook.training.validation import validation_grid, validation_loss
from lorabook.worlds import world

DTYPES = {"no": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


def train_text_to_image(config: TextToImageConfig) -> TrainingRun:
    """Train a LoRA on captioned images and write it to `output_dir/pytorch_lora_weights.safetensors`.

    Args:
        config: model, images and settings.
    Returns: a TrainingRun, which shows itself.
    Raises: FileNotFoundError or ValueError, in one sentence and before anything is trained or written, where model,
        images or settings cannot be used; FloatingPointError if the loss is no longer finite.
    Source: Hu et al. 2021, arXiv:2106.09685; diffusers' examples/text_to_image.
    """
    model = find_model(config.pretrained_model_name_or_path)
    source = config.train_data_dir or config.dataset_name or world().data
    images = load_captioned_images(source, caption_column=config.caption_column, image_column=config.image_column,
                                   config_name=config.dataset_config_name, max_samples=config.max_train_samples,
                                   **({"cache_dir": config.cache_dir} if config.cache_dir else {}))
    learned, held_out = split(images, config.validation_split)
    AcceleratorState._reset_state()  # else a second run in one process keeps the precision of the first, or fails
    accelerator = Accelerator(gradient_accumulation_steps=config.gradient_accumulation_steps,
                              mixed_precision=config.mixed_precision)
    pipe = load_pipeline(model, device=accelerator.device, dtype=DTYPES.get(accelerator.mixed_precision, torch.float32),
                         revision=config.revision, variant=config.variant, cache_dir=config.cache_dir)
    family = family_of(pipe, config.prediction_type)
    resolution = checked_resolution(family, config.resolution)
    seed = random.randrange(2**31) if config.seed is None else config.seed
    set_seed(seed)
    looks = dict(resolution=resolution, interpolation=config.image_interpolation_mode,
                 progress=accelerator.is_local_main_process)
    examples = Examples(family, learned, center_crop=config.center_crop, random_flip=config.random_flip, **looks)
    kept = Examples(family, held_out, center_crop=True, random_flip=False, **looks) if held_out else None
    name = module_name(Path(config.output_dir).absolute().name)
    add_lora(family, name, config)
    history = train(accelerator, family, examples, config, seed=seed,
                    validate=(lambda: validation_loss(family, pipe.unet, kept)) if kept else None)
    adapter, grid = Path(config.output_dir) / WEIGHT_NAME, None
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        write_lora(adapter, accelerator.unwrap_model(pipe.unet, keep_fp32_wrapper=False), name, config)
        if config.validation_prompt and config.num_validation_images:
            grid = validation_grid(pipe, name, config.validation_prompt, config.num_validation_images, seed)
    return TrainingRun(adapter, history, config.command, grid)


def split(images: datasets.Dataset, share: float) -> tuple[datasets.Dataset, datasets.Dataset | None]:
    """The images to learn from, and the last `share` of them, kept out; None where the share is 0."""
    count = round(len(images) * share)
    if share and not 0 < count < len(images):
        raise ValueError(f"validation_split {share} of {len(images)} images leaves {count} to validate on and "
                         f"{len(images) - count} to learn from; both need at least one")
    if not count:
        return images, None
    return images.select(range(len(images) - count)), images.select(range(len(images) - count, len(images)))


def checked_resolution(family: StableDiffusion, asked: int | None) -> int:
    """The training resolution in pixels; the VAE and the UNet both halve it, so that not every number will do."""
    resolution = asked or family.resolution
    factor = family.pipe.vae_scale_factor * 2 ** (len(family.pipe.unet.config.block_out_channels) - 1)
    if resolution % family.pipe.vae_scale_factor:
        raise ValueError(f"resolution {resolution} is not a multiple of {family.pipe.vae_scale_factor}, the factor by "
                         f"which this model's VAE shrinks images; try {max(factor, round(resolution / factor) * factor)}")
    return resolution


def add_lora(family: StableDiffusion, name: str, config: TextToImageConfig) -> None:
    """Freeze the pipeline and put a fresh LoRA in its UNet, trainable and in float32."""
    pipe = family.pipe
    for model in (pipe.unet, pipe.vae, pipe.text_encoder):
        model.requires_grad_(False)
    pipe.unet.add_adapter(LoraConfig(
        r=config.rank, lora_alpha=config.alpha or config.rank, init_lora_weights="gaussian",
        lora_dropout=config.lora_dropout, target_modules=target_modules(config.target)), adapter_name=name)
    cast_training_params(pipe.unet, torch.float32)
    if config.gradient_checkpointing:
        pipe.unet.enable_gradient_checkpointing()


def write_lora(path: Path, unet, name: str, config: TextToImageConfig) -> Path:
    """Write the UNet's LoRA as diffusers does, with its alpha, base model and settings in the metadata."""
    # lora_A / lora_B throughout: diffusers' own renaming knows attention only and cannot read the mixture it leaves
    weights = get_peft_model_state_dict(unet, adapter_name=name)
    base = config.pretrained_model_name_or_path or world().model
    about = {"base_model": str(base), "lorabook_version": lorabook.__version__, "training": config.told}
    return write_adapter(path, {f"unet.{key}": value for key, value in weights.items()},
                         config={"unet": unet.peft_config[name].to_dict()}, about=about)


if __name__ == "__main__":
    run_command_line(TextToImageConfig, train_text_to_image)
