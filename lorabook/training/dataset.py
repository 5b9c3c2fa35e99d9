"""Images and captions as the UNet sees them: encoded once where they stay the same, else at each step."""

import io
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import datasets
import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from lorabook.training.cache import Store, images_hash, key_of
from lorabook.training.devices import read_ahead, to_device
from lorabook.training.families import StableDiffusion
from lorabook.training.sampler import Batches, BatchIndex, BatchSampler

PROMPTS_AT_ONCE = 64


@dataclass(frozen=True)
class ImageTransform:
    """How images are brought to the training resolution."""

    resolution: int
    center_crop: bool = True
    random_flip: bool = False
    interpolation: str = "lanczos"


class TransformedImages(Dataset):
    """The pixels of a data set's images, resized, cropped and mirrored."""

    def __init__(self, images: datasets.Dataset, look: ImageTransform):
        self.images, self.look = images, look

    def __getitems__(self, chosen: BatchIndex) -> tuple[BatchIndex, Tensor]:
        """A batch with its pixels, as a DataLoader asks for it."""
        columns = zip(
            chosen.rows.tolist(), chosen.flips.tolist(), chosen.places.tolist(), strict=True
        )
        return chosen, torch.stack([self.pixels(*entry) for entry in columns])

    def pixels(
        self, row: int, flip: bool = False, place: tuple[float, float] = (0.5, 0.5)
    ) -> Tensor:
        """One image as (3, resolution, resolution), −1 to 1."""
        image, side = self.images[row]["image"], self.look.resolution
        width, height, top, left = self._cut(image.size, place)
        image = image.resize((width, height), Image.Resampling[self.look.interpolation.upper()])
        image = image.crop((left, top, left + side, top + side))
        if flip:
            image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        return torch.from_numpy(np.array(image)).permute(2, 0, 1) / 127.5 - 1

    def geometry(
        self, size: tuple[int, int], place: tuple[float, float], flip: bool = False
    ) -> tuple[int, int, int, int]:
        """Original height and width, top and left of the crop: what SDXL is told of an image of (width, height)."""
        width, _, top, left = self._cut(size, place)
        return size[1], size[0], top, width - self.look.resolution - left if flip else left

    def _cut(self, size: tuple[int, int], place: tuple[float, float]) -> tuple[int, int, int, int]:
        """Width and height after resizing, top and left of the crop; the shorter side becomes the resolution."""
        side = self.look.resolution
        width, height = (max(side, round(edge * side / min(size))) for edge in size)
        top, left = (
            int((edge - side) * 0.5)
            if self.look.center_crop
            else min(edge - side, int((edge - side + 1) * share))
            for edge, share in zip((height, width), place, strict=True)
        )
        return width, height, top, left


@dataclass
class Batch:
    """What one step learns from.

    Attributes:
        number: its number since the start of training.
        rows: the data set's rows, (rows,).
        moments: mean and deviation of the latents, (rows, 2, channels, height, width).
        captions: the numbers of the texts, for `EncodedImages.prompts`.
        prompts: their embeddings, or None where they are encoded at each step.
        geometry: (rows, 4), see `StableDiffusion.predict`.
    """

    number: int
    rows: Tensor
    moments: Tensor
    captions: Tensor
    prompts: tuple[Tensor, ...] | None
    geometry: Tensor


class EncodedImages:
    """A captioned data set, encoded.

    The VAE's mean and deviation are kept for each image and its mirror image, not one sample; a step samples from
    them, so that training sees the same distribution as without a cache. Where the crop is random and the images are
    not square, images are encoded anew; prompts are where a text encoder is trained.
    """

    def __init__(
        self,
        family: StableDiffusion,
        images: datasets.Dataset,
        look: ImageTransform,
        *,
        folder: Path | None,
        frozen_text: bool = True,
        progress: bool = True,
    ):
        """Encode what stays the same into stores below `folder`; None encodes everything at every step."""
        self.family, self.pictures, self.look = family, TransformedImages(images, look), look
        self.sizes, captions, numbers = image_sizes(images), images["text"], {"": 0}
        for text in captions:
            numbers.setdefault(text, len(numbers))
        self.texts, self.caption_of = (
            list(numbers),
            torch.tensor([numbers[text] for text in captions]),
        )
        fixed = look.center_crop or all(width == height for width, height in self.sizes)
        self.moments = self.embeddings = None
        try:
            self.moments = self._kept_moments(folder, progress) if folder and fixed else None
            self.embeddings = (
                self._kept_prompts(folder, progress) if folder and frozen_text else None
            )
        except OSError as error:
            warnings.warn(
                f"{folder} cannot keep what was encoded ({error.strerror or error}); images or prompts are "
                "encoded at every step, which takes longer: make room, or name another cache_dir",
                stacklevel=2,
            )

    def __len__(self):
        return len(self.sizes)

    def batches(
        self, order: BatchSampler, start: int, stop: int, *, workers: int = 0, dropout: float = 0.0
    ) -> Iterator[Batch]:
        """The batches from one number to another.

        Args:
            order: which rows they hold.
            workers: processes that read images, where latents are not kept.
            dropout: share of captions replaced by the empty one.
        """
        sampler = Batches(order, start, stop, self.look.random_flip)
        read = self._read(order, sampler, workers, dropout)
        device = self.family.device
        for batch in read_ahead(read, device):
            batch.moments, batch.geometry = (
                to_device(batch.moments, device),
                to_device(batch.geometry, device),
            )
            if batch.prompts:
                batch.prompts = tuple(to_device(part, device) for part in batch.prompts)
            if self.moments is None:  # so far it was pixels
                batch.moments = self.family.encode_images(batch.moments)
            yield batch

    def _read(
        self, order: BatchSampler, sampler: Batches, workers: int, dropout: float
    ) -> Iterator[Batch]:
        """The batches in the CPU's memory; where latents are not kept, with pixels in the place of moments."""
        if self.moments is not None:
            chosen = (
                (chosen, self.moments[chosen.rows + len(self) * chosen.flips]) for chosen in sampler
            )
        else:
            chosen = DataLoader(
                self.pictures, batch_sampler=sampler, num_workers=workers, collate_fn=_as_it_is
            )
        return (self._batch(order, *read, dropout) for read in chosen)

    @property
    def needs(self) -> set[str]:
        """The pipeline's parts that encode at each step."""
        return {
            *(("vae",) if self.moments is None else ()),
            *(self.family.text_encoders if self.embeddings is None else ()),
        }

    def plain_moments(self, rows: Tensor) -> Tensor:
        """Mean and deviation of images as they are, cropped in the middle, (rows, 2, channels, height, width)."""
        if self.moments is not None:
            return self.moments[rows].to(self.family.device)
        return self.family.encode_images(
            torch.stack([self.pictures.pixels(row) for row in rows.tolist()])
        )

    def prompts(self, numbers: Tensor) -> tuple[Tensor, ...]:
        """Embeddings of the texts of these numbers, as the family encodes them."""
        if self.embeddings is not None:
            return tuple(store[numbers].to(self.family.device) for store in self.embeddings)
        used, places = numbers.unique(return_inverse=True)
        return tuple(
            part[places]
            for part in self.family.encode_prompts([self.texts[number] for number in used])
        )

    def _batch(
        self, order: BatchSampler, chosen: BatchIndex, moments: Tensor, dropout: float
    ) -> Batch:
        numbers = self.caption_of[chosen.rows]
        if dropout:
            numbers = numbers.where(order.rng(chosen.number, purpose=1).uniform() >= dropout, 0)
        geometry = [
            self.pictures.geometry(self.sizes[row], place, flip)
            for row, place, flip in zip(
                chosen.rows.tolist(), chosen.places.tolist(), chosen.flips.tolist(), strict=True
            )
        ]
        prompts = tuple(store[numbers] for store in self.embeddings) if self.embeddings else None
        return Batch(chosen.number, chosen.rows, moments, numbers, prompts, torch.tensor(geometry))

    def _kept_moments(self, folder: Path, progress: bool) -> Store:
        """A store of moments: all images, then all mirrored."""
        count, flips = len(self), 1 + self.look.random_flip
        size = max(
            1, min(32, 2**18 // self.look.resolution**2)
        )  # one of 512 x 512: less memory than a step of training

        def encode(start: int, stop: int) -> Tensor:
            return self.family.encode_images(
                torch.stack(
                    [self.pictures.pixels(row % count, row >= count) for row in range(start, stop)]
                )
            )

        vae = self.family.pipe.vae
        key = key_of(
            "moments",
            images_hash(self.pictures.images),
            vae,
            vae.config.scaling_factor,
            vars(self.look),
        )
        return Store(
            folder, key, count * flips, size, encode, label="encoding images", progress=progress
        )

    def _kept_prompts(self, folder: Path, progress: bool) -> list[Store]:
        """A store for each part of the prompt embeddings."""
        pipe = self.family.pipe
        encoders = [getattr(pipe, name) for name in self.family.text_encoders]
        mask = [getattr(encoder.config, "use_attention_mask", None) for encoder in encoders]
        tokenizers = [
            getattr(pipe, name.replace("text_encoder", "tokenizer"))
            for name in self.family.text_encoders
        ]
        tokens = [(t.model_max_length, sorted(t.get_vocab().items())) for t in tokenizers]
        key = key_of("prompts", *self.texts, *encoders, *mask, *tokens)
        texts = self.texts

        @torch.no_grad()
        def encode(start: int, stop: int) -> tuple[Tensor, ...]:
            return self.family.encode_prompts(texts[start:stop])

        parts = len(encode(0, 1))
        return [
            Store(
                folder,
                f"{key}-{part}",
                len(texts),
                PROMPTS_AT_ONCE,
                lambda a, b, part=part: encode(a, b)[part],
                label="encoding prompts",
                progress=progress,
            )
            for part in range(parts)
        ]


def image_sizes(images: datasets.Dataset) -> list[tuple[int, int]]:
    """Width and height of each image, read from its header alone."""
    stored = images.select_columns("image").cast_column("image", datasets.Image(decode=False))
    sizes = []
    for row in stored:
        with Image.open(
            io.BytesIO(row["image"]["bytes"]) if row["image"]["bytes"] else row["image"]["path"]
        ) as image:
            sizes.append(image.size)
    return sizes


def _as_it_is(batch):
    return batch
