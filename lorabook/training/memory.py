"""Which parts of a pipeline take the training device's memory, and when."""

from collections.abc import Iterable
from contextlib import contextmanager

import torch
from diffusers.training_utils import free_memory, offload_models
from peft.tuners.lora import LoraLayer
from torch import nn

from lorabook.training.config import TrainingConfig
from lorabook.training.dataset import EncodedImages
from lorabook.training.families import StableDiffusion


@contextmanager
def placed(family: StableDiffusion, parts: Iterable[str], device: torch.device | str):
    """Parts of the pipeline are on a device inside the block, and where they were after it.

    What they leave is given back to the device, so that the step after it finds it.
    """
    give_back = free_memory if family.device.type != "cpu" else lambda: None
    with offload_models(*(getattr(family.pipe, part) for part in parts), device=device):
        give_back()
        yield
    give_back()


def idle_parts(
    family: StableDiffusion, config: TrainingConfig, *examples: EncodedImages | None
) -> list[str]:
    """The parts that training has no use for between validation pictures: all is encoded, and they do not learn."""
    busy = set(family.text_encoders) if config.train_text_encoder else set()
    busy.update(*(found.needs for found in examples if found))
    return [part for part in family.encoders if part not in busy]


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
