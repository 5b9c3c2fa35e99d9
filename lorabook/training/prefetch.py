"""The next batch made ready while a GPU is busy with this one, and brought to it without waiting."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch
from torch import Tensor

T = TypeVar("T")


def reads_ahead(device: torch.device) -> bool:
    """Whether reading ahead helps; a CPU that learns has no hand free for it."""
    return device.type != "cpu"


def ahead(things: Iterator[T]) -> Iterator[T]:
    """The same things in the same order, each read by a second thread while the one before it is used."""
    end = object()
    with ThreadPoolExecutor(1, "reads-ahead") as reader:
        coming = reader.submit(next, things, end)
        while (thing := coming.result()) is not end:
            coming = reader.submit(next, things, end)
            yield thing


def sent(values: Tensor, device: torch.device) -> Tensor:
    """The tensor on the device; to a GPU from pinned memory, so that nobody waits for the copy."""
    return (
        values.pin_memory().to(device, non_blocking=True)
        if device.type == "cuda"
        else values.to(device)
    )
