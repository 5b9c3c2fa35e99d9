"""What stands on the training device, and when, and how batches get there."""

from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import TypeVar

import torch
from diffusers.training_utils import free_memory, offload_models
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from lorabook.training.families import StableDiffusion

T = TypeVar("T")


def to_device(values: Tensor, device: torch.device) -> Tensor:
    """The tensor on the device; to a GPU from pinned memory, so that nobody waits for the copy."""
    if device.type == "cuda":
        return values.pin_memory().to(device, non_blocking=True)
    return values.to(device)


def read_ahead(items: Iterator[T], device: torch.device) -> Iterator[T]:
    """The same items in the same order, each read by a thread while the device uses the one before it.

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


@contextmanager
def components_on(family: StableDiffusion, parts: Iterable[str], device: torch.device | str):
    """Parts of the pipeline are on a device inside the block, and where they were after it.

    What they leave is given back to the device, so that the step after it finds it.
    """
    give_back = free_memory if family.device.type != "cpu" else lambda: None
    with offload_models(*(getattr(family.pipe, part) for part in parts), device=device):
        give_back()
        yield
    give_back()


@contextmanager
def input_casts(models: Iterable[nn.Module], enabled: bool):
    """Whether LoRA layers bring their input to float32 first, inside the block.

    Under autocast that is two passes over the activations for nothing: the products bring it back to half precision.
    """
    before = {
        layer: layer.cast_input_dtype_enabled
        for model in models
        for layer in model.modules()
        if isinstance(layer, LoraLayer)
    }
    for layer in before:
        layer.cast_input_dtype_enabled = enabled
    try:
        yield
    finally:
        for layer, was in before.items():
            layer.cast_input_dtype_enabled = was
