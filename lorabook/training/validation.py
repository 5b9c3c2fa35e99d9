"""How well a run does: a loss at fixed noise, pictures at fixed seeds, and how like the prompt and the images they are."""

import re
import warnings
from itertools import count
from pathlib import Path

import datasets
import torch
from PIL import Image

from lorabook.checks import first_line
from lorabook.metrics import image_similarity, prompt_similarity
from lorabook.pipelines import world_of
from lorabook.show.grid import ImageGrid
from lorabook.sweeps.batched import generate_image
from lorabook.training.dataset import EncodedImages
from lorabook.training.families import StableDiffusion

DRAWS = 4  # noises and timesteps for each image
MOST_IMAGES, MOST_COLUMNS = 64, 8


@torch.no_grad()
def validation_loss(
    family: StableDiffusion, examples: EncodedImages, batch_size: int = 16
) -> float:
    """The loss on images kept out of training, always with the same noise and evenly spread timesteps."""
    generator = torch.Generator().manual_seed(0)
    count, total = min(len(examples), MOST_IMAGES), family.noise.config.num_train_timesteps
    chosen = torch.arange(count).repeat(DRAWS)
    spread = ((torch.arange(len(chosen)) + 0.5) / len(chosen) * total).long()
    timesteps = spread[torch.randperm(len(chosen), generator=generator)]
    errors = []
    for part, steps in zip(chosen.split(batch_size), timesteps.split(batch_size), strict=True):
        moments, geometry = examples.plain(part)
        mean, deviation = moments.float().unbind(1)
        latents = mean + deviation * torch.randn(mean.shape, generator=generator).to(mean)
        noise, steps = torch.randn(mean.shape, generator=generator).to(mean), steps.to(mean.device)
        noisy, target = family.add_noise(latents, noise, steps)
        prompts = examples.prompts(examples.caption_of[part])
        prediction = family.predict(noisy, steps, prompts, geometry)
        errors.append(family.losses(prediction, target, steps))
    return torch.cat(errors).mean().item()


class FilmStrip:
    """Pictures of the validation prompt at fixed seeds, drawn again and again while the adapter learns.

    They are kept as `validation/step-000100_seed-0.png`, so that a run that was cut short goes on with them.
    """

    def __init__(
        self, prompt: str, seeds: list[int], folder: Path, likes: datasets.Dataset, until: int
    ):
        """Take up the pictures in the folder from steps up to `until`, put later ones aside; be like the images `likes`."""
        self.prompt, self.seeds, self.folder, self.likes = (
            prompt,
            seeds,
            folder / "validation",
            likes,
        )
        found = {
            path: int(name[1])
            for path in self.folder.glob("*.png")
            if (name := re.match(r"step-(\d+)_seed", path.name))
        }
        aside = next(
            p for number in count(1) if not (p := self.folder / f"earlier-{number}").exists()
        )
        for path in [
            path for path, step in found.items() if step > until or until == 0
        ]:  # of a run before this one
            aside.mkdir(exist_ok=True)
            path.rename(aside / path.name)
        self.steps = sorted(
            step
            for step in set(found.values())
            if all(self._path(step, seed).is_file() for seed in seeds)
        )

    def draw(self, pipe, step: int) -> list[Image.Image]:
        """Draw the pictures of a step and keep them; returns them."""
        world = world_of(pipe)
        drawn = [
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
            for seed, picture in zip(self.seeds, drawn, strict=True):
                picture.save(self._path(step, seed))
            self.steps.append(step)
        except OSError as error:
            warnings.warn(
                f"the pictures of step {step} could not be kept: {error.strerror or error}",
                stacklevel=2,
            )
        return drawn

    def likeness(self, pictures: list[Image.Image]) -> dict[str, float]:
        """How like the prompt and the training images pictures are; empty where no judge is at hand."""
        if self.likes is None:
            return {}
        try:
            likes = [self.likes[row]["image"] for row in range(min(16, len(self.likes)))]
            return {
                "prompt_similarity": prompt_similarity(pictures, [self.prompt]).mean().item(),
                "image_similarity": image_similarity(pictures, likes).mean().item(),
            }
        except OSError as error:
            warnings.warn(f"similarities are not measured: {first_line(error)}", stacklevel=2)
            self.likes = None
            return {}

    def grid(self) -> ImageGrid | None:
        """A row a seed, a column a step; of many steps some, evenly."""
        if not self.steps:
            return None
        last = len(self.steps) - 1
        shown = sorted(
            {self.steps[round(i * last / (MOST_COLUMNS - 1))] for i in range(MOST_COLUMNS)}
        )
        rows = [
            [Image.open(self._path(step, seed)).convert("RGB") for step in shown]
            for seed in self.seeds
        ]
        return ImageGrid(
            rows,
            [f"step {step}" for step in shown],
            [f"seed {seed}" for seed in self.seeds],
            self.prompt,
        )

    def _path(self, step: int, seed: int) -> Path:
        return self.folder / f"step-{step:06}_seed-{seed}.png"
