"""Images in numbers: similarity by a CLIP model, the bundled tiny one or any folder or Hub id; equality to rounding."""

import os
import re
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from transformers import AutoTokenizer, CLIPModel

from lorabook.pipelines import whole_weights
from lorabook.upstream import quiet
from lorabook.worlds import DATA, bundled, world

try:  # https://github.com/huggingface/transformers: the default image processor needs torchvision from version 5 on
    from transformers import CLIPImageProcessorPil as ImageProcessor
except ImportError:
    from transformers import CLIPImageProcessor as ImageProcessor


_TOLERANCE = {
    torch.float16: 8e-3,
    torch.bfloat16: 3.2e-2,
}  # some steps of the number format; float32: of a picture's 255


def tolerance(dtype: torch.dtype) -> float:
    """How far results may lie apart that differ in rounding alone, as a share of their largest value.

    A larger batch, a fused adapter, or a ΔW in one piece adds the same numbers in another order. Weights and outputs of a
    layer are the same to rounding within `tolerance(dtype)` of the largest; two pictures where the mean difference of
    their values, 0 to 255, is below `255 * tolerance(pipe.dtype)`: 0.1 in float32, 2 in float16, 8 in bfloat16.
    """
    return _TOLERANCE.get(dtype, 4e-4)


@lru_cache(maxsize=2)
def _judge(model: str) -> tuple[CLIPModel, AutoTokenizer, ImageProcessor]:
    found = str(bundled(model) or model)
    looked = f"CLIP model {model!r} not found: no folder {Path(model).absolute()}, none in the bundled {DATA}, and"
    if not Path(found).is_dir() and not re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", model):
        raise FileNotFoundError(f"{looked} it is not a Hub id of the form owner/name")
    with whole_weights(found):
        return _read(found, looked)


def _read(found: str, looked: str) -> tuple[CLIPModel, AutoTokenizer, ImageProcessor]:
    try:
        with quiet():
            return (
                CLIPModel.from_pretrained(found).eval().requires_grad_(False),
                AutoTokenizer.from_pretrained(found),
                ImageProcessor.from_pretrained(found),
            )
    except OSError as error:
        raise FileNotFoundError(
            f"{looked} the Hub did not give it: {' '.join(str(error).split())[:120]}"
        ) from error


def _named(model: str | os.PathLike | None) -> str:
    return os.fspath(model) if model is not None else world().judge


@torch.no_grad()
def image_features(
    images: Sequence[Image.Image], *, model: str | os.PathLike | None = None
) -> Tensor:
    """CLIP's view of images as unit vectors, (images, width)."""
    if not images:
        raise ValueError("there are no images to look at")
    clip, _, processor = _judge(_named(model))
    batches = [images[i : i + 64] for i in range(0, len(images), 64)]
    outputs = [
        clip.get_image_features(**processor([i.convert("RGB") for i in batch], return_tensors="pt"))
        for batch in batches
    ]
    return F.normalize(torch.cat([_vectors(o) for o in outputs]), dim=-1)


@torch.no_grad()
def text_features(texts: Sequence[str], *, model: str | os.PathLike | None = None) -> Tensor:
    """CLIP's view of texts as unit vectors, (texts, width)."""
    clip, tokenizer, _ = _judge(_named(model))
    tokens = tokenizer(
        list(texts), padding=True, truncation=True, max_length=77, return_tensors="pt"
    )
    return F.normalize(_vectors(clip.get_text_features(**tokens)), dim=-1)


def _vectors(output) -> Tensor:
    """The projected features: a tensor up to transformers 4, an output object from 5 on."""
    return output if isinstance(output, Tensor) else output.pooler_output


def prompt_similarity(
    images: Sequence[Image.Image], prompts: Sequence[str], *, model: str | os.PathLike | None = None
) -> Tensor:
    """How well images fit prompts.

    Args:
        images: PIL images.
        prompts: texts, any number.
        model: a CLIPModel folder or Hub id; None is the bundled "tiny-clip" without a GPU, CLIP ViT-B/32 with one.
            tiny-clip knows the bundled world only.
    Returns: (images, prompts) cosine similarities, −1 to 1; only those of one model compare.
    Source: Radford et al. 2021, arXiv:2103.00020.
    """
    return image_features(images, model=model) @ text_features(prompts, model=model).T


def image_similarity(
    images: Sequence[Image.Image],
    others: Sequence[Image.Image],
    *,
    model: str | os.PathLike | None = None,
) -> Tensor:
    """How alike images are, to CLIP's eye; arguments as in `prompt_similarity`.

    Returns: (images, others) cosine similarities, −1 to 1.
    """
    return image_features(images, model=model) @ image_features(others, model=model).T


def closest_prompt(
    images: Sequence[Image.Image], prompts: Sequence[str], *, model: str | os.PathLike | None = None
) -> list[int]:
    """For each image the index of the prompt that fits it best (zero-shot classification)."""
    return prompt_similarity(images, prompts, model=model).argmax(1).tolist()
