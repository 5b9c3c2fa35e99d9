"""One picture by an ordinary call of the pipeline, and what suits the pipeline."""

from contextlib import contextmanager

import torch

from lorabook.live.locks import locked
from lorabook.worlds import BUNDLED, HUB


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


def world_of(pipe):
    """The defaults that suit a pipeline, by the size of image it was made for."""
    size = (
        pipe.unet.config.sample_size * pipe.vae_scale_factor
        if hasattr(pipe, "unet")
        else HUB.resolution
    )
    return BUNDLED if size == BUNDLED.resolution else HUB
