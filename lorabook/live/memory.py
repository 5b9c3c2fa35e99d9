"""Whether an error says that the memory ran out: each backend says it in its own words."""

import re

import torch

_WORDS = re.compile(
    "out of memory|can't allocate memory|not enough memory|alloc_failed|invalid buffer size",
    re.IGNORECASE,
)


def is_memory(error: BaseException) -> bool:
    """Whether an error says that the memory ran out: a GPU's, the machine's, or that of one of their libraries."""
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or (
        isinstance(error, RuntimeError) and bool(_WORDS.search(str(error)))
    )
