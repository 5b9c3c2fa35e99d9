"""Images in numbers: similarity by a CLIP model, and what is equal to rounding."""

import os
from collections.abc import Sequence
from functools import lru_cache

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from transformers import AutoTokenizer, CLIPModel

from lorabook.pipelines import load_components
from lorabook.worlds import world

try:  # from transformers 5 on, the default image processor needs torchvision
    from transformers import CLIPImageProcessorPil as ImageProcessor
except ImportError:
    from transformers import CLIPImageProcessor as ImageProcessor

# Some steps of the number format. In float32 of a picture's 255.
_TOLERANCES = {torch.float16: 8e-3, torch.bfloat16: 3.2e-2}


def tolerance(dtype: torch.dtype) -> float:
    """How far results may lie apart that differ in rounding alone, as a share of the largest.

    A larger batch, a fused adapter, or a ΔW in one piece adds the same numbers in another order.
    Weights and outputs of a layer are the same to rounding within `tolerance(dtype)` of the
    largest. Two pictures are where the mean difference of their values, 0 to 255, is below
    `255 * tolerance(pipe.dtype)`: 0.1 in float32, 2 in float16, 8 in bfloat16.
    """
    return _TOLERANCES.get(dtype, 4e-4)


def prompt_similarity(
    images: Sequence[Image.Image], prompts: Sequence[str], *, model: str | os.PathLike | None = None
) -> Tensor:
    """How well images fit prompts.

    Args:
        images: PIL images.
        prompts: Texts, any number.
        model: A CLIPModel folder or Hub id. None is the bundled "tiny-clip" without a GPU and CLIP
            ViT-B/32 with one; tiny-clip knows the bundled world only.

    Returns:
        (images, prompts) cosine similarities, −1 to 1; only those of one model compare.

    Source: Radford et al. 2021, arXiv:2103.00020.
    """
    return image_features(images, model=model) @ text_features(prompts, model=model).T


def image_similarity(
    images: Sequence[Image.Image],
    others: Sequence[Image.Image],
    *,
    model: str | os.PathLike | None = None,
) -> Tensor:
    """How alike images are, to CLIP's eye: (images, others) cosine similarities, −1 to 1.

    Arguments as in `prompt_similarity`.
    """
    return image_features(images, model=model) @ image_features(others, model=model).T


@torch.no_grad()
def image_features(
    images: Sequence[Image.Image], *, model: str | os.PathLike | None = None
) -> Tensor:
    """CLIP's view of images as unit vectors, (images, width)."""
    if not images:
        raise ValueError("there are no images to look at")
    clip, _, processor = _load(_name_of(model))
    features = []
    for start in range(0, len(images), 64):
        batch = [image.convert("RGB") for image in images[start : start + 64]]
        features.append(_vectors(clip.get_image_features(**processor(batch, return_tensors="pt"))))
    return F.normalize(torch.cat(features), dim=-1)


@torch.no_grad()
def text_features(texts: Sequence[str], *, model: str | os.PathLike | None = None) -> Tensor:
    """CLIP's view of texts as unit vectors, (texts, width)."""
    clip, tokenizer, _ = _load(_name_of(model))
    cut = {"padding": True, "truncation": True, "max_length": 77}
    tokens = tokenizer(list(texts), return_tensors="pt", **cut)
    return F.normalize(_vectors(clip.get_text_features(**tokens)), dim=-1)


def _name_of(model: str | os.PathLike | None) -> str:
    return world().judge if model is None else os.fspath(model)


@lru_cache(maxsize=2)
def _load(model: str) -> tuple[CLIPModel, AutoTokenizer, ImageProcessor]:
    loaders = (CLIPModel, AutoTokenizer, ImageProcessor)
    clip, tokenizer, processor = load_components("CLIP model", model, *loaders)
    return clip.eval().requires_grad_(False), tokenizer, processor


def _vectors(output: Tensor | object) -> Tensor:
    """The projected features: a tensor up to transformers 4, an output object from 5 on."""
    return output if isinstance(output, Tensor) else output.pooler_output
