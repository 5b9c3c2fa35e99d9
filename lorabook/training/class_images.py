"""Pictures of a class, drawn by the base model itself where a folder has too few: what prior preservation learns from."""

import os
import re
from pathlib import Path

import datasets
import torch
from tqdm.auto import tqdm

from lorabook.images import image_files, load_instance_images
from lorabook.pipelines import load_pipeline, world_of
from lorabook.training.config import DreamBoothConfig
from lorabook.training.devices import components_on
from lorabook.training.setup import Setup

PRECISIONS = {
    "no": torch.float32,
    "fp32": torch.float32,
    "fp16": torch.float16,
    "bf16": torch.bfloat16,
}


def class_images(setup: Setup) -> datasets.Dataset:
    """As many class images as the config asks for, drawn where they are too few; kept in their folder and used again.

    Returns: the Dataset, each image with the class prompt.
    """
    config, accelerator = setup.config, setup.accelerator
    folder = Path(config.class_data_dir).expanduser()
    folder.mkdir(parents=True, exist_ok=True)
    missing = missing_numbers(folder, config.num_class_images)
    accelerator.wait_for_everyone()
    if missing:
        _draw(setup, config, folder, missing)
    accelerator.wait_for_everyone()
    found = load_instance_images(folder, config.class_prompt)
    return found.select(range(min(len(found), config.num_class_images)))


def missing_numbers(folder: Path, wanted: int) -> list[int]:
    """The numbers of the images to draw, beside a person's own pictures and those drawn before."""
    names = [path.name for path in image_files(folder)]
    drawn = {int(found[1]) for name in names if (found := re.fullmatch(r"class-(\d+)\.png", name))}
    own = len(names) - len(drawn)
    return [number for number in range(own, wanted) if number not in drawn]


def _draw(setup: Setup, config: DreamBoothConfig, folder: Path, missing: list[int]) -> None:
    """Draw the missing images, in batches of fixed borders shared out among the processes.

    Each image has a seed of its own and each batch is drawn whole, so that drawing that was cut short ends in the same
    images.
    """
    dtype = _precision(setup, config)
    if dtype == setup.dtype:
        return _draw_with(setup.family.pipe, setup, config, folder, missing)
    with components_on(setup.family, ("unet", *setup.family.encoders), "cpu"):
        pipe = load_pipeline(
            config.pretrained_model_name_or_path,
            device=setup.accelerator.device,
            dtype=dtype,
            revision=config.revision,
            variant=config.variant,
            cache_dir=config.cache_dir,
        )
        _draw_with(pipe, setup, config, folder, missing)
        del pipe


def _draw_with(
    pipe, setup: Setup, config: DreamBoothConfig, folder: Path, missing: list[int]
) -> None:
    size, accelerator = config.sample_batch_size, setup.accelerator
    batches = sorted({number // size for number in missing})[
        accelerator.process_index :: accelerator.num_processes
    ]
    world, bar = world_of(pipe), getattr(pipe, "_progress_bar_config", {})
    pipe.set_progress_bar_config(disable=True)
    pipe.vae.enable_slicing()  # images are decoded one by one: less memory than a step of training
    for batch in tqdm(
        batches, desc="drawing class images", disable=not accelerator.is_local_main_process
    ):
        numbers = range(batch * size, (batch + 1) * size)
        seeds = [
            torch.Generator("cpu").manual_seed((setup.given_seed or 0) + number)
            for number in numbers
        ]
        images = pipe(
            [config.class_prompt] * size,
            generator=seeds,
            num_inference_steps=world.num_inference_steps,
            guidance_scale=world.guidance_scale,
        ).images
        for number, image in zip(numbers, images, strict=True):
            if number in missing:
                unfinished = folder / f".class-{number:04}.part"
                image.save(unfinished, "PNG")
                os.replace(unfinished, folder / f"class-{number:04}.png")
    pipe.vae.disable_slicing()
    pipe.set_progress_bar_config(**bar)


def _precision(setup: Setup, config: DreamBoothConfig) -> torch.dtype:
    """The precision to draw in: as asked, else half on a GPU and full elsewhere."""
    half = torch.float16 if setup.accelerator.device.type == "cuda" else torch.float32
    return (
        PRECISIONS[config.prior_generation_precision] if config.prior_generation_precision else half
    )
