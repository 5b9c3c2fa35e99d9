"""One picture by an ordinary call of the pipeline, and what suits the pipeline."""
from contextlib import contextmanager

import torch
from torch import Tensor

from lorabook.adapters.locks import locked
from lorabook.worlds import BUNDLED, HUB

_EMBEDDINGS = ("prompt_embeds", "negative_prompt_embeds", "pooled_prompt_embeds", "negative_pooled_prompt_embeds")


@locked
def draw(pipe, *, seed: int, **call):
    """One image by an ordinary call of the pipeline, from the noise of this seed, without a progress bar."""
    with without_bar(pipe):
        return pipe(**call, generator=torch.Generator("cpu").manual_seed(seed)).images[0]


@contextmanager
def without_bar(pipe):
    """Let a pipeline show no progress bar within a block."""
    bar = getattr(pipe, "_progress_bar_config", {})
    pipe.set_progress_bar_config(disable=True)
    try:
        yield
    finally:
        pipe.set_progress_bar_config(**bar)


@torch.no_grad()
def encoded(pipe, prompt: str, negative_prompt: str | None, guided: bool, **more) -> dict[str, Tensor]:
    """A prompt's embeddings as Stable Diffusion's or SDXL's call takes them.

    Args:
        guided: whether the guidance scale asks for the negative prompt's too.
        **more: clip_skip, lora_scale, as `encode_prompt` takes them.
    """
    made = pipe.encode_prompt(prompt=prompt, negative_prompt=negative_prompt, device=pipe._execution_device,
                              num_images_per_prompt=1, do_classifier_free_guidance=guided, **more)
    return {name: value for name, value in zip(_EMBEDDINGS, made, strict=False) if value is not None}


def world_of(pipe):
    """The defaults that suit a pipeline, by the size of image it was made for."""
    size = pipe.unet.config.sample_size * pipe.vae_scale_factor if hasattr(pipe, "unet") else HUB.resolution
    return BUNDLED if size == BUNDLED.resolution else HUB
