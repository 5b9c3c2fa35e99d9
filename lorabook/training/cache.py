"""Images and captions as the UNet sees them: encoded once where they stay the same, else at each step."""
import datasets
import numpy as np
import torch
from PIL import Image
from torch import Tensor
from tqdm.auto import tqdm

from lorabook.training.families import StableDiffusion


class Examples:
    """Latents and prompt embeddings of a captioned data set.

    The VAE's mean and deviation are kept for each image and its mirror image; a step samples from them, so that
    training sees the same distribution as without a cache. Where the crop is random, images are encoded anew.
    """

    def __init__(self, family: StableDiffusion, dataset: datasets.Dataset, *, resolution: int, center_crop: bool,
                 random_flip: bool, interpolation: str, progress: bool = True):
        self.family, self.images, self.random_flip = family, dataset, random_flip
        self.resolution, self.interpolation = resolution, Image.Resampling[interpolation.upper()]
        self.center_crop = center_crop
        fixed = center_crop or all(image.width == image.height for image in dataset["image"])
        self.moments = self._all_moments(progress) if fixed else None
        texts = sorted(set(dataset["text"])) + [""]
        self.embeddings = torch.cat([family.encode_prompts(texts[i:i + 64]) for i in range(0, len(texts), 64)])
        numbers = {text: number for number, text in enumerate(texts)}
        self.caption_of = torch.tensor([numbers[text] for text in dataset["text"]])

    def __len__(self):
        return len(self.images)

    def latents(self, chosen: Tensor, generator: torch.Generator) -> Tensor:
        """Sampled latents of the chosen images, (batch, channels, height, width)."""
        flips = torch.randint(0, 2, (len(chosen),), generator=generator) * self.random_flip
        if self.moments is None:
            pixels = [self.pixels(i, bool(f), generator) for i, f in zip(chosen.tolist(), flips.tolist(), strict=True)]
            mean, deviation = self.family.encode_images(torch.stack(pixels))
        else:
            mean, deviation = (kept[flips, chosen] for kept in self.moments)
        return mean + deviation * torch.randn(mean.shape, generator=generator).to(mean.device, mean.dtype)

    def prompts(self, chosen: Tensor, dropout: float, generator: torch.Generator) -> Tensor:
        """Prompt embeddings of the chosen images; a share of `dropout` is the empty prompt's."""
        numbers = self.caption_of[chosen]
        if dropout:
            numbers = torch.where(torch.rand(len(chosen), generator=generator) < dropout, len(self.embeddings) - 1, numbers)
        return self.embeddings[numbers]

    def pixels(self, index: int, flip: bool, generator: torch.Generator | None = None) -> Tensor:
        """One image resized, cropped, mirrored if `flip`, as (3, resolution, resolution), −1 to 1."""
        image, side = self.images[index]["image"], self.resolution
        ratio = side / min(image.size)
        image = image.resize([max(side, round(edge * ratio)) for edge in image.size], self.interpolation)
        spare = [edge - side for edge in image.size]
        left, top = ([s // 2 for s in spare] if self.center_crop or generator is None else
                     [int(torch.randint(0, s + 1, (1,), generator=generator)) for s in spare])
        image = image.crop((left, top, left + side, top + side))
        if flip:
            image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        return torch.from_numpy(np.array(image)).permute(2, 0, 1) / 127.5 - 1

    def _all_moments(self, progress: bool) -> tuple[Tensor, Tensor]:
        """(mirrored, images, channels, height, width) of means, and of deviations."""
        size = max(1, min(32, 2**20 // self.resolution**2))  # four images of 512 x 512: what a small GPU holds
        rounds = []
        for flip in range(1 + self.random_flip):
            batches = range(0, len(self), size)
            encoded = [self.family.encode_images(torch.stack([self.pixels(i, bool(flip)) for i in
                                                              range(start, min(start + size, len(self)))]))
                       for start in tqdm(batches, desc="encoding images", disable=not progress, leave=False)]
            rounds.append([torch.cat(part) for part in zip(*encoded, strict=True)])
        mean, deviation = (torch.stack(part) for part in zip(*rounds, strict=True))
        return mean, deviation
