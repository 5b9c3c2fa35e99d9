"""Images and captions as the UNet sees them: encoded once, or at each step where they change."""

import io
import warnings
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import datasets
import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from lorabook.training.cache import (
    CachedRows,
    encode_once,
    fingerprint,
    images_hash,
    stored_images,
)
from lorabook.training.families import StableDiffusion
from lorabook.training.sampler import BatchIndex, BatchSampler

PROMPTS_AT_ONCE = 64
PIXELS_AT_ONCE = 2**18  # one image of 512 x 512, which takes less memory than a step of training
T = TypeVar("T")
MIDDLE = (0.5, 0.5)


@dataclass(frozen=True)
class ImageTransform:
    """How images are resized, cropped and mirrored; the shorter side becomes the resolution."""

    resolution: int
    center_crop: bool = True
    random_flip: bool = False
    interpolation: str = "lanczos"

    def __call__(
        self, image: Image.Image, flip: bool = False, crop: tuple[float, float] = MIDDLE
    ) -> Tensor:
        """An image as (3, resolution, resolution), −1 to 1; crops count from top and left."""
        width, height, top, left = self._cut(image.size, crop)
        image = image.resize((width, height), Image.Resampling[self.interpolation.upper()])
        image = image.crop((left, top, left + self.resolution, top + self.resolution))
        if flip:
            image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        return torch.from_numpy(np.array(image)).permute(2, 0, 1) / 127.5 - 1

    def geometry(
        self, size: tuple[int, int], flip: bool = False, crop: tuple[float, float] = MIDDLE
    ) -> tuple[int, int, int, int]:
        """An image's height and width, top and left of its crop: for SDXL."""
        width, _, top, left = self._cut(size, crop)
        return size[1], size[0], top, width - self.resolution - left if flip else left

    def _cut(self, size: tuple[int, int], crop: tuple[float, float]) -> tuple[int, int, int, int]:
        """Width and height after resizing, top and left of the crop."""
        side = self.resolution
        width, height = (max(side, round(edge * side / min(size))) for edge in size)
        if self.center_crop:
            return width, height, (height - side) // 2, (width - side) // 2
        top, left = (
            min(edge - side, int((edge - side + 1) * share))
            for edge, share in zip((height, width), crop, strict=True)
        )
        return width, height, top, left


class TransformedImages(Dataset):
    """A data set's images as pixels, a batch at a time, for a DataLoader."""

    def __init__(self, images: datasets.Dataset, transform: ImageTransform):
        self.images, self.transform = images, transform

    def __getitem__(self, index: BatchIndex) -> tuple[BatchIndex, Tensor]:
        return index, torch.stack([self.pixels(*entry) for entry in index])

    def pixels(self, row: int, flip: bool = False, crop: tuple[float, float] = MIDDLE) -> Tensor:
        """One image, see `ImageTransform`."""
        return self.transform(self.images[row]["image"], flip, crop)


@dataclass
class Batch:
    """What one step learns from."""

    number: int  # since the start of training
    rows: Tensor  # of the data set, (rows,)
    moments: Tensor  # mean and deviation of the latents, (rows, 2, channels, height, width)
    captions: Tensor  # the numbers of the texts, for `EncodedImages.prompts`
    prompts: tuple[Tensor, ...] | None  # None where they are encoded at each step
    geometry: Tensor  # (rows, 4), see `StableDiffusion.predict`


class EncodedImages:
    """A captioned data set, encoded.

    The VAE's mean and deviation are in the cache for each image and its mirror image, and not one
    sample of them: a step samples, so that training sees the same distribution as without a cache.
    Images that are not square and are cropped anywhere are encoded at each step, and so are
    prompts while a text encoder learns.

    Attributes:
        texts: All different captions, the empty one first; `caption_of` numbers each image's.
        moments, embeddings: From the cache, or None where they are encoded at each step.
    """

    def __init__(
        self,
        family: StableDiffusion,
        images: datasets.Dataset,
        transform: ImageTransform,
        *,
        folder: Path | None,
        frozen_text: bool = True,
    ):
        """Encode what stays the same into a cache folder; None encodes all at every step."""
        self.family, self.transform = family, transform
        self.transformed = TransformedImages(images, transform)
        self.sizes = [Image.open(io.BytesIO(content)).size for content in stored_images(images)]
        self.texts = list(dict.fromkeys(["", *images["text"]]))
        numbers = {text: number for number, text in enumerate(self.texts)}
        self.caption_of = torch.tensor([numbers[text] for text in images["text"]])
        square = all(width == height for width, height in self.sizes)
        self.moments = self.embeddings = None
        try:
            if folder and (transform.center_crop or square):
                self.moments = self._encode_images(folder)
            if folder and frozen_text:
                self.embeddings = self._encode_prompts(folder)
        except OSError as error:
            warnings.warn(
                f"{folder} cannot keep what was encoded ({error.strerror or error}); images or "
                "prompts are encoded at every step, which takes longer: make room, or name another "
                "cache_dir",
                stacklevel=2,
            )

    def __len__(self):
        return len(self.sizes)

    @property
    def encoders_in_use(self) -> set[str]:
        """The pipeline's components that encode at each step."""
        images = {"vae"} if self.moments is None else set()
        return images | set(self.family.text_encoders if self.embeddings is None else ())

    def batches(
        self, sampler: BatchSampler, start: int, stop: int, *, workers: int = 0, dropout: float = 0
    ) -> Iterator[Batch]:
        """The batches from one number to another, on the UNet's device.

        The workers read images which are not in the cache; `dropout` is the share of captions
        replaced by the empty one.
        """
        device = self.family.device
        for batch in read_ahead(self._read(sampler, start, stop, workers, dropout), device):
            batch.geometry = to_device(batch.geometry, device)
            batch.moments = to_device(batch.moments, device)
            if self.moments is None:  # so far it was pixels
                batch.moments = self.family.encode_images(batch.moments)
            if batch.prompts:
                batch.prompts = tuple(to_device(part, device) for part in batch.prompts)
            yield batch

    def _read(
        self, sampler: BatchSampler, start: int, stop: int, workers: int, dropout: float
    ) -> Iterator[Batch]:
        """The batches in the CPU's memory; pixels in the place of moments that are not cached."""
        indices = sampler.indices(start, stop, self.transform.random_flip)
        if self.moments is None:
            read = DataLoader(
                self.transformed, sampler=indices, batch_size=None, num_workers=workers
            )
        else:
            read = ((i, self.moments[i.rows][torch.arange(len(i.rows)), i.flips]) for i in indices)
        for index, values in read:
            captions = self.caption_of[index.rows]
            if dropout:
                stays = sampler.rng(index.number, purpose=1).uniform() >= dropout
                captions = captions.where(stays, 0)
            prompts = self.embeddings and tuple(part[captions] for part in self.embeddings)
            geometry = [self.transform.geometry(self.sizes[row], *more) for row, *more in index]
            geometry = torch.tensor(geometry)
            yield Batch(index.number, index.rows, values, captions, prompts, geometry)

    def plain(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Moments and geometry of images as they are, cropped in the middle; see `Batch`."""
        device, numbers = self.family.device, rows.tolist()
        geometry = torch.tensor([self.transform.geometry(self.sizes[row]) for row in numbers])
        if self.moments is not None:
            return self.moments[rows][:, 0].to(device), geometry.to(device)
        pixels = torch.stack([self.transformed.pixels(row) for row in numbers])
        return self.family.encode_images(pixels), geometry.to(device)

    def prompts(self, numbers: Tensor) -> tuple[Tensor, ...]:
        """Embeddings of the texts of these numbers, as the family encodes them."""
        if self.embeddings is not None:
            return tuple(to_device(part[numbers], self.family.device) for part in self.embeddings)
        used, places = numbers.unique(return_inverse=True)
        encoded = self.family.encode_prompts([self.texts[number] for number in used])
        return tuple(part[places] for part in encoded)

    def _encode_images(self, folder: Path) -> CachedRows:
        """Moments of image and mirror image, (images, 1 or 2, 2, channels, height, width)."""
        images, transform, vae = self.transformed.images, self.transform, self.family.pipe.vae
        flips = (False, True) if transform.random_flip else (False,)

        def encode(rows: list[int]) -> tuple[Tensor, ...]:
            pixels = [self.transformed.pixels(row, flip) for row in rows for flip in flips]
            moments = self.family.encode_images(torch.stack(pixels))
            return (moments.unflatten(0, (len(rows), len(flips))),)

        kind, config = type(self.family).__name__, vae.config  # each family scales in its own way
        scaling = config.scaling_factor, config.get("shift_factor")
        key = fingerprint("moments", images_hash(images), vae, kind, scaling, vars(transform))
        size = max(1, min(32, PIXELS_AT_ONCE // transform.resolution**2 // len(flips)))
        return encode_once("images", images, encode, folder / f"{key}.arrow", size)[0]

    def _encode_prompts(self, folder: Path) -> list[CachedRows]:
        """Each part of the prompt embeddings, a row a text."""
        pipe, names = self.family.pipe, self.family.text_encoders
        encoders = [getattr(pipe, name) for name in names]
        masks = [getattr(encoder.config, "use_attention_mask", None) for encoder in encoders]
        tokenizers = [getattr(pipe, name.replace("text_encoder", "tokenizer")) for name in names]
        tokens = [(t.model_max_length, sorted(t.get_vocab().items())) for t in tokenizers]

        @torch.no_grad()
        def encode(rows: list[int]) -> tuple[Tensor, ...]:
            return self.family.encode_prompts([self.texts[row] for row in rows])

        kind = type(self.family).__name__
        key = fingerprint("prompts", kind, self.texts, *encoders, masks, tokens)
        texts = datasets.Dataset.from_dict({"text": self.texts})
        return encode_once("prompts", texts, encode, folder / f"{key}.arrow", PROMPTS_AT_ONCE)


def to_device(values: Tensor, device: torch.device) -> Tensor:
    """The tensor on the device; to a GPU from pinned memory, so that nobody waits for the copy."""
    if device.type == "cuda":
        return values.pin_memory().to(device, non_blocking=True)
    return values.to(device)


def read_ahead(items: Iterator[T], device: torch.device) -> Iterator[T]:
    """The same items, each read by a thread while the device uses the one before it.

    A CPU that trains has no core free for that, so there they come as they are.
    """
    if device.type == "cpu":
        yield from items
        return
    end = object()
    with ThreadPoolExecutor(1, "reads-ahead") as reader:
        coming = reader.submit(next, items, end)
        while (item := coming.result()) is not end:
            coming = reader.submit(next, items, end)
            yield item
