"""How well a run does: a loss at fixed noise, and images at fixed seeds with their similarities."""

import re
import warnings
from itertools import count
from pathlib import Path

import datasets
import torch
from diffusers import DiffusionPipeline
from PIL import Image

from lorabook.checks import first_line
from lorabook.metrics import image_similarity, prompt_similarity
from lorabook.pipelines import world_of
from lorabook.show.grid import ImageGrid
from lorabook.sweeps.batched import generate_image
from lorabook.training.config import TrainingConfig
from lorabook.training.dataset import EncodedImages
from lorabook.training.families import StableDiffusion

NOISES = 4  # for each image, with a timestep each
MAX_IMAGES, MAX_COLUMNS = 64, 8


@torch.no_grad()
def validation_loss(family: StableDiffusion, images: EncodedImages, batch_size: int = 16) -> float:
    """The loss on held-out images, always with the same noise and evenly spread timesteps."""
    generator = torch.Generator().manual_seed(0)
    rows = torch.arange(min(len(images), MAX_IMAGES)).repeat(NOISES)
    shares = (torch.arange(len(rows)) + 0.5) / len(rows)
    spread = (shares * family.noise.config.num_train_timesteps).long()
    timesteps = spread[torch.randperm(len(rows), generator=generator)]
    errors = []
    for part, steps in zip(rows.split(batch_size), timesteps.split(batch_size), strict=True):
        moments, geometry = images.plain(part)
        mean, deviation = moments.float().unbind(1)
        latents = mean + deviation * torch.randn(mean.shape, generator=generator).to(mean)
        noise, steps = torch.randn(mean.shape, generator=generator).to(mean), steps.to(mean.device)
        noisy, target = family.add_noise(latents, noise, steps)
        prompts = images.prompts(images.caption_of[part])
        prediction = family.predict(noisy, steps, prompts, geometry)
        errors.append(family.losses(prediction, target, steps))
    return torch.cat(errors).mean().item()


class ValidationImages:
    """Images of the validation prompt at fixed seeds, generated again and again during training.

    They stay in `validation/step-000100_seed-0.png`, so that a resumed run goes on with them.
    """

    def __init__(self, config: TrainingConfig, references: datasets.Dataset | None, until: int):
        """Take up the images of steps up to `until`, move those of an earlier run aside.

        The references are training images, whose likeness is measured.
        """
        self.prompt, self.references = config.validation_prompt, references
        self.seeds = range(config.num_validation_images)
        self.folder = Path(config.output_dir, "validation")
        names = (self.folder / f"earlier-{number}" for number in count(1))
        aside = next(path for path in names if not path.exists())
        self.steps: list[int] = []
        for path in sorted(self.folder.glob("step-*_seed-*.png")):
            step = int(re.match(r"step-(\d+)", path.name)[1])
            if step > until or until == 0:
                aside.mkdir(exist_ok=True)
                path.rename(aside / path.name)
            elif step not in self.steps and all(self._path(step, s).is_file() for s in self.seeds):
                self.steps.append(step)

    def generate(self, pipe: DiffusionPipeline, step: int) -> list[Image.Image]:
        """Generate and save the images of a step."""
        world = world_of(pipe)
        images = [
            generate_image(
                pipe,
                seed=seed,
                prompt=self.prompt,
                num_inference_steps=world.num_inference_steps,
                guidance_scale=world.guidance_scale,
            )
            for seed in self.seeds
        ]
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            for seed, image in zip(self.seeds, images, strict=True):
                image.save(self._path(step, seed))
            self.steps.append(step)
        except OSError as error:
            warnings.warn(
                f"the pictures of step {step} could not be kept: {error.strerror or error}",
                stacklevel=2,
            )
        return images

    def similarities(self, images: list[Image.Image]) -> dict[str, float]:
        """How like the prompt and the training images they are; empty without a CLIP model."""
        if self.references is None:
            return {}
        references = self.references.select(range(min(16, len(self.references))))["image"]
        try:
            return {
                "prompt_similarity": prompt_similarity(images, [self.prompt]).mean().item(),
                "image_similarity": image_similarity(images, list(references)).mean().item(),
            }
        except OSError as error:
            warnings.warn(f"similarities are not measured: {first_line(error)}", stacklevel=2)
            self.references = None
            return {}

    def grid(self) -> ImageGrid | None:
        """A row a seed, a column a step; of many steps some, evenly."""
        if not self.steps:
            return None
        last = len(self.steps) - 1
        places = {round(i * last / (MAX_COLUMNS - 1)) for i in range(MAX_COLUMNS)}
        steps = [self.steps[place] for place in sorted(places)]
        return ImageGrid(
            [
                [Image.open(self._path(step, seed)).convert("RGB") for step in steps]
                for seed in self.seeds
            ],
            [f"step {step}" for step in steps],
            [f"seed {seed}" for seed in self.seeds],
            self.prompt,
        )

    def _path(self, step: int, seed: int) -> Path:
        return self.folder / f"step-{step:06}_seed-{seed}.png"
