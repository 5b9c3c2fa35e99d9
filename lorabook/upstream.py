"""What other libraries keep to themselves, as far as it needs no adapter: each thing in one place.

Each says why there is no public way, and the version where that was seen. tests/test_upstream.py
has a test of each that fails with a sentence when upstream has changed.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from diffusers import DiffusionPipeline
from torch import nn


def execution_device(pipe: DiffusionPipeline) -> torch.device:
    """The device on which a pipeline computes; its models may wait on the CPU until they are used.

    diffusers 0.42.1 has no public name for it: `pipe.device` is where the weights wait.
    Source: https://github.com/huggingface/diffusers/blob/v0.42.1/src/diffusers/pipelines/pipeline_utils.py
    """
    return pipe._execution_device


@contextmanager
def without_progress_bar(pipe: DiffusionPipeline) -> Iterator[None]:
    """Let a pipeline show no progress bar within a block.

    diffusers 0.42.1 sets the bar's arguments by `set_progress_bar_config` and tells them to nobody.
    """
    before = getattr(pipe, "_progress_bar_config", {})
    pipe.set_progress_bar_config(disable=True)
    try:
        yield
    finally:
        pipe.set_progress_bar_config(**before)


def uncompiled(model: nn.Module) -> nn.Module:
    """The model beneath a `torch.compile`, or the model itself.

    torch 2.13.0 has no public name for it.
    Source: https://docs.pytorch.org/docs/stable/generated/torch.compile.html
    """
    return getattr(model, "_orig_mod", model)
