"""What training asks of the machine: memory on the device, batches ahead, a process put back."""

import random
import signal
import threading
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import TypeVar

import numpy as np
import torch
from diffusers.training_utils import free_memory, offload_models
from torch import Tensor, nn

from lorabook.training.families import StableDiffusion
from lorabook.upstream import separate_accelerator

T = TypeVar("T")


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


@contextmanager
def components_on(
    family: StableDiffusion, components: Iterable[str], device: torch.device | str
) -> Iterator[None]:
    """Have components of the pipeline on a device inside the block, and back after it.

    The memory that they leave is given back to the device, so that the next step finds it.
    """
    models = [getattr(family.pipe, component) for component in components]
    on_gpu = family.device.type != "cpu"
    with offload_models(*models, device=device):
        if on_gpu:
            free_memory()
        yield
    if on_gpu:
        free_memory()


def activation_bytes(family: StableDiffusion, resolution: int) -> int:
    """The memory that one image leaves for the backward pass, counted on a forward pass."""
    pipe, device = family.pipe, family.device
    side = resolution // pipe.vae_scale_factor
    noisy = torch.zeros(1, pipe.unet.config.in_channels, side, side, device=device)
    timestep = torch.zeros(1, dtype=torch.long, device=device)
    geometry = torch.zeros(1, 4, device=device)
    weights = {parameter.untyped_storage().data_ptr() for parameter in pipe.unet.parameters()}
    sizes: dict[int, int] = {}

    def count(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            sizes[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.no_grad():
        prompts = family.encode_prompts([""])
    dtype = pipe.unet.conv_in.weight.dtype
    with (
        components_on(family, family.encoders, "cpu"),
        torch.autocast(device.type, dtype, dtype != torch.float32),
        torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor),
    ):
        family.predict(noisy, timestep, prompts, geometry)
    return sum(sizes.values())


@contextmanager
def input_casts(models: Iterable[nn.Module], enabled: bool) -> Iterator[None]:
    """Choose whether LoRA layers bring their input to float32 inside the block.

    Under autocast the cast costs two passes over the activations and changes nothing, since the
    products bring them back to half precision. PEFT's `disable_input_dtype_casting` can only
    disable, and images generated on the way need it enabled again.
    """
    layers = [
        layer
        for model in models
        for layer in model.modules()
        if hasattr(layer, "cast_input_dtype_enabled")
    ]
    before = [layer.cast_input_dtype_enabled for layer in layers]
    for layer in layers:
        layer.cast_input_dtype_enabled = enabled
    try:
        yield
    finally:
        for layer, value in zip(layers, before, strict=True):
            layer.cast_input_dtype_enabled = value


@contextmanager
def process_state() -> Iterator[None]:
    """Put back after the block what a run changes in the process.

    That is Python's, numpy's and torch's random generators, TF32, and a user's own Accelerator.
    """
    python, arrays = random.getstate(), np.random.get_state()
    tf32 = torch.backends.cuda.matmul.allow_tf32
    gpus = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ()
    with torch.random.fork_rng(list(gpus)), separate_accelerator():
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(arrays)
            torch.backends.cuda.matmul.allow_tf32 = tf32


class StopButton:
    """Ctrl-C or a notebook's stop button inside a `with` block.

    It raises KeyboardInterrupt at once, but not while `held` is true: `release` raises it then.
    Python drops the exception of an interrupt that meets a destructor or a callback; it is raised
    by the next `release`. A handler of one's own and other threads are left alone.
    """

    held = pressed = False

    def __enter__(self) -> "StopButton":
        self.before = signal.getsignal(signal.SIGINT)
        main = threading.current_thread() is threading.main_thread()
        self.active = main and self.before is signal.default_int_handler
        if self.active:
            signal.signal(signal.SIGINT, self._press)
        return self

    def __exit__(self, *error) -> None:
        if self.active:
            signal.signal(signal.SIGINT, self.before)

    def release(self) -> None:
        """Let interrupts through again; raise KeyboardInterrupt if there was one."""
        self.held = False
        if self.pressed:
            raise KeyboardInterrupt

    def _press(self, number, frame) -> None:
        self.pressed = True
        if not self.held:
            raise KeyboardInterrupt
