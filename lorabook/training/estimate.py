"""What a run will take, told before it begins."""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import nn

from lorabook.training.devices import components_on
from lorabook.training.families import StableDiffusion

ADAM_BYTES = 12  # a gradient and two moments in float32, beside each weight that learns


@dataclass(frozen=True)
class Estimate:
    """What a run will take: `parameters` that learn, `file_bytes` of the adapter, `gpu_bytes` of memory on a GPU."""

    images: int
    steps: int
    batch: int
    epochs: float
    parameters: int
    file_bytes: int
    gpu_bytes: int

    def __str__(self):
        return (
            f"{self.images} images, {self.steps} steps of {self.batch} ({self.epochs:.1f} epochs); "
            f"{self.parameters:,} parameters learn, an adapter of {self.file_bytes / 1e6:.1f} MB; about "
            f"{self.gpu_bytes / 2**30:.1f} GiB of memory on a GPU; minutes are told after the first steps"
        )


def memory_on_a_gpu(
    family: StableDiffusion,
    learning: list[nn.Parameter],
    resolution: int,
    batch: int,
    parts: Iterable[str],
) -> int:
    """Bytes of weights, gradients, the optimiser's state and what the UNet keeps for its backward pass.

    Args:
        parts: of the pipeline, which are on the device beside the UNet.
    """
    models = [family.pipe.unet, *(getattr(family.pipe, part) for part in parts)]
    weights = sum(
        tensor.nbytes for model in models for tensor in (*model.parameters(), *model.buffers())
    )
    return (
        weights
        + ADAM_BYTES * sum(p.numel() for p in learning)
        + batch * _kept_by_forward(family, resolution)
    )


def _kept_by_forward(family: StableDiffusion, resolution: int) -> int:
    """Bytes that one image leaves for the backward pass, counted on a forward pass."""
    pipe, seen = family.pipe, {}
    side = resolution // pipe.vae_scale_factor
    own = {parameter.untyped_storage().data_ptr() for parameter in pipe.unet.parameters()}

    def count(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            seen[storage.data_ptr()] = storage.nbytes()
        return tensor

    noisy = torch.zeros(1, pipe.unet.config.in_channels, side, side, device=family.device)
    with torch.no_grad():
        prompts = family.encode_prompts([""])
    dtype = pipe.unet.conv_in.weight.dtype
    with (
        components_on(family, family.encoders, "cpu"),
        torch.autocast(family.device.type, dtype, dtype != torch.float32),
        torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor),
    ):
        family.predict(
            noisy,
            torch.zeros(1, dtype=torch.long, device=family.device),
            prompts,
            torch.zeros(1, 4, device=family.device),
        )
    return sum(seen.values())
