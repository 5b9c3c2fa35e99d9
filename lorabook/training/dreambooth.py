"""Train a DreamBooth LoRA on a few images of one subject, in a notebook or on the command line.

accelerate launch --quiet -m lorabook.training.dreambooth --instance_data_dir=… takes the flags of
diffusers' train_dreambooth_lora.py and train_dreambooth_lora_sdxl.py.
"""

import os
import re
from pathlib import Path

import datasets
import torch
from diffusers import DiffusionPipeline
from tqdm.auto import tqdm

from lorabook.images import image_files, load_instance_images
from lorabook.pipelines import world_of
from lorabook.training.config import DreamBoothConfig
from lorabook.training.flags import run_command_line
from lorabook.training.run import TrainingRun, fit, split
from lorabook.training.setup import DTYPES, Setup, check_early, load_base, set_up
from lorabook.training.trainer import TrainingData
from lorabook.upstream import without_progress_bar


def train_dreambooth(config: DreamBoothConfig) -> TrainingRun:
    """Train a LoRA on images of one subject; write it as `train_text_to_image` does.

    With `with_prior_preservation` each batch also holds images of the subject's class, generated
    by the base model, so that the class stays what it was.

    Args:
        config: Model, images, prompts and settings.

    Returns:
        A TrainingRun, which shows itself.

    Raises:
        FileNotFoundError, ValueError, FloatingPointError: As `train_text_to_image`.

    Source: Ruiz et al. 2022, arXiv:2208.12242; diffusers' examples/dreambooth.
    """
    source = config.instance_data_dir or config.dataset_name
    if not source:
        raise ValueError("instance_data_dir is missing: give a folder with pictures of the subject")
    if not config.instance_prompt:
        raise ValueError(
            "instance_prompt is missing: give a prompt that names the subject, as in "
            "«a photo of sks dog»"
        )
    check_early(config)
    images = load_instance_images(
        source,
        config.instance_prompt,
        caption_column=config.caption_column,
        image_column=config.image_column,
        config_name=config.dataset_config_name,
        cache_dir=config.cache_dir,
    )
    images, held_out = split(images, config, config.repeats)
    groups, weights = (len(images),), (1.0,)
    with set_up(config) as setup:
        if config.with_prior_preservation:
            classes = _class_images(setup)
            images = datasets.concatenate_datasets([images, classes])
            groups, weights = (*groups, len(classes)), (*weights, config.prior_loss_weight)
        return fit(setup, TrainingData(images, groups, weights, held_out, config.repeats))


def _class_images(setup: Setup) -> datasets.Dataset:
    """The images of `class_data_dir`, each with the class prompt; missing ones are generated."""
    config, accelerator = setup.config, setup.accelerator
    folder = Path(config.class_data_dir).expanduser()
    folder.mkdir(parents=True, exist_ok=True)
    missing = _missing_numbers(folder, config.num_class_images)
    accelerator.wait_for_everyone()
    half = torch.float16 if accelerator.device.type == "cuda" else torch.float32
    dtype = (DTYPES | {"fp32": torch.float32}).get(config.prior_generation_precision, half)
    if missing and dtype == setup.dtype:
        _generate(setup.family.pipe, setup, folder, missing)
    elif missing:
        with setup.family.on_device(("unet", *setup.family.encoders), "cpu"):
            _generate(load_base(config, accelerator.device, dtype), setup, folder, missing)
    accelerator.wait_for_everyone()
    images = load_instance_images(folder, config.class_prompt)
    return images.select(range(min(len(images), config.num_class_images)))


def _missing_numbers(folder: Path, count: int) -> list[int]:
    """The numbers of the images to generate, beside a person's own and those of an earlier run."""
    names = [path.name for path in image_files(folder)]
    matches = [re.fullmatch(r"class-(\d+)\.png", name) for name in names]
    present = {int(match[1]) for match in matches if match}
    return [n for n in range(len(names) - len(present), count) if n not in present]


def _generate(pipe: DiffusionPipeline, setup: Setup, folder: Path, missing: list[int]) -> None:
    """Generate the missing images, in batches of fixed borders that the processes share out.

    Each image has a seed of its own and each batch is generated whole, so that a run that was cut
    short ends in the same images.
    """
    config, accelerator, world = setup.config, setup.accelerator, world_of(pipe)
    size, first_seed = config.sample_batch_size, config.seed if setup.is_seeded else 0
    batches = sorted({number // size for number in missing})
    batches = batches[accelerator.process_index :: accelerator.num_processes]
    shown = accelerator.is_local_main_process
    pipe.vae.enable_slicing()  # images are decoded one by one: less memory than a step of training
    with without_progress_bar(pipe):
        for batch in tqdm(batches, desc="generating class images", disable=not shown):
            numbers = range(batch * size, (batch + 1) * size)
            images = pipe(
                [config.class_prompt] * size,
                generator=[torch.Generator().manual_seed(first_seed + n) for n in numbers],
                num_inference_steps=world.num_inference_steps,
                guidance_scale=world.guidance_scale,
            ).images
            for number, image in zip(numbers, images, strict=True):
                if number in missing:
                    unfinished = folder / f".class-{number:04}.part"
                    image.save(unfinished, "PNG")
                    os.replace(unfinished, folder / f"class-{number:04}.png")
    pipe.vae.disable_slicing()


if __name__ == "__main__":
    run_command_line(DreamBoothConfig, train_dreambooth)
