"""What is encoded once: files of `datasets`, found again by a fingerprint of all that they hold."""

import hashlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import datasets
import numpy as np
import pyarrow
import torch
from torch import Tensor, nn


def cache_folder(cache_dir: str | None = None) -> Path:
    """Where encoded images and prompts are: below `cache_dir`, else in the user's cache folder."""
    if cache_dir:
        return Path(cache_dir).expanduser() / "lorabook-arrays"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "lorabook" / "arrays"


class CachedRows:
    """The rows of a column, all of one shape, in a file that is mapped into memory."""

    def __init__(self, column: pyarrow.ChunkedArray):
        self.rows = [row for chunk in column.chunks for row in _array(chunk)]

    def __getitem__(self, numbers: Tensor) -> Tensor:
        """The rows of these numbers, copied into memory."""
        return torch.from_numpy(np.stack([self.rows[number] for number in numbers.tolist()]))


def encode_once(
    name: str,
    inputs: datasets.Dataset,
    encode: Callable[[list[int]], tuple[Tensor, ...]],
    path: Path,
    batch_size: int,
) -> list[CachedRows]:
    """What `encode` returns for all rows of a data set, from a file or written into one.

    The file appears whole or not at all; one that cannot be read is written anew. Its name is the
    fingerprint of what it holds; `encode` makes tensors with a row each from the numbers of rows.
    """

    def arrays(numbers: list[int]) -> dict[str, np.ndarray]:
        return {str(place): _numpy(part) for place, part in enumerate(encode(numbers))}

    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        encoded = datasets.Dataset.from_file(str(path))
    except (OSError, ValueError):  # not there, cut short or damaged
        path.unlink(missing_ok=True)
        encoded = inputs.map(
            arrays,
            with_indices=True,
            input_columns=[],  # `encode` reads what it needs, so that one large image is in memory
            batched=True,
            batch_size=batch_size,
            remove_columns=inputs.column_names,
            cache_file_name=str(path),
            new_fingerprint=path.stem,
            desc=f"encoding {name}",
        )
    return [CachedRows(encoded.data.column(name)) for name in encoded.column_names]


def fingerprint(*values) -> str:
    """A key for what is computed from plain values and from modules, whose weights count."""
    digest = hashlib.sha256()
    for value in values:
        if isinstance(value, nn.Module):
            for name, tensor in sorted(value.state_dict().items()):
                digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
                digest.update(tensor.cpu().contiguous().flatten().view(torch.uint8).numpy())
        else:
            digest.update(f"{value!r}\n".encode())
    return digest.hexdigest()[:32]


def stored_images(images: datasets.Dataset) -> Iterator[bytes]:
    """The content of each image's file."""
    for row in images.select_columns("image").cast_column("image", datasets.Image(decode=False)):
        content = row["image"]["bytes"]
        yield Path(row["image"]["path"]).read_bytes() if content is None else content


def images_hash(images: datasets.Dataset) -> str:
    """A hash of the content of a Dataset's images, in their order."""
    digest = hashlib.sha256()
    for content in stored_images(images):
        digest.update(hashlib.sha256(content).digest())
    return digest.hexdigest()


def _numpy(values: Tensor) -> np.ndarray:
    values = values.detach().cpu()
    return (values.float() if values.dtype == torch.bfloat16 else values).numpy()


def _array(chunk: pyarrow.ListArray) -> np.ndarray:
    """A chunk of nested lists as one array, without a copy."""
    shape, values = np.shape(chunk[0].as_py()), chunk
    while pyarrow.types.is_list(values.type):
        values = values.flatten()
    return values.to_numpy().reshape(len(chunk), *shape)
