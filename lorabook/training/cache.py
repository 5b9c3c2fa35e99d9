"""Arrays on disk: computed once, memory-mapped, finished where they were cut short, rebuilt where they do not fit."""

import hashlib
import json
import mmap
import os
import shutil
import zlib
from collections.abc import Callable, Iterable
from pathlib import Path

import datasets
import numpy as np
import torch
from filelock import FileLock
from torch import Tensor, nn
from tqdm.auto import tqdm

FORMAT = 1
DROP_EVERY = (
    16  # reads after which the mapped pages are given back, so that memory stays flat on large data
)


def cache_folder(cache_dir: str | None = None) -> Path:
    """Where arrays are kept: below `cache_dir`, else below the user's cache folder."""
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return (
        Path(cache_dir).expanduser() / "lorabook-arrays"
        if cache_dir
        else home / "lorabook" / "arrays"
    )


class Store:
    """Rows of one shape on disk.

    Rows are computed and written in chunks of fixed borders, each with its checksum: a store that was cut short is
    finished chunk by chunk, to the same bits as in one go; a damaged chunk is computed anew.
    """

    def __init__(
        self,
        folder: Path,
        key: str,
        count: int,
        chunk: int,
        compute: Callable[[int, int], Tensor],
        *,
        label: str,
        progress: bool = True,
    ):
        """Open the store `folder/key`, computing what it lacks with `compute(start, stop)`, a tensor of rows."""
        self.folder, self.count, self.chunk = folder / key, count, chunk
        self.folder.mkdir(parents=True, exist_ok=True)
        with FileLock(folder / f"{key}.lock"):  # another run may be writing the same rows
            done = self._whole_chunks()
            starts = [start for start in range(0, count, chunk) if start // chunk not in done]
            for start in tqdm(starts, desc=label, disable=not progress or not starts, leave=False):
                self._write(start, compute(start, min(start + chunk, count)))
        about = self._about()
        self.shape, self.dtype, self.reads = tuple(about["shape"]), np.dtype(about["dtype"]), 0
        with open(self.folder / "rows.bin", "rb") as file:
            self.map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        self.rows = np.frombuffer(self.map, self.dtype, count * int(np.prod(self.shape))).reshape(
            count, *self.shape
        )

    def __getitem__(self, numbers: Tensor) -> Tensor:
        """The rows of these numbers, copied into memory."""
        self.reads += 1
        found = torch.from_numpy(self.rows[numbers.numpy()])
        if self.reads % DROP_EVERY == 0 and hasattr(mmap, "MADV_DONTNEED"):
            self.map.madvise(mmap.MADV_DONTNEED)
        return found

    def _about(self) -> dict:
        return json.loads((self.folder / "about.json").read_text())

    def _write(self, start: int, rows: Tensor) -> None:
        """Write one chunk, then its checksum; so a chunk without a checksum is one that was cut short."""
        values = rows.detach().cpu().contiguous()
        values = (
            values if values.dtype in (torch.float16, torch.float32) else values.float()
        ).numpy()
        about = self.folder / "about.json"
        if not about.exists():
            about.with_suffix(".part").write_text(
                json.dumps({"shape": values.shape[1:], "dtype": str(values.dtype)})
            )
            os.replace(about.with_suffix(".part"), about)
        content = values.tobytes()
        with open(os.open(self.folder / "rows.bin", os.O_RDWR | os.O_CREAT, 0o644), "r+b") as file:
            file.seek(start * values[0].nbytes)
            file.write(content)
        with open(self.folder / "done.txt", "a") as file:
            file.write(f"{start // self.chunk} {zlib.crc32(content)}\n")

    def _whole_chunks(self) -> set[int]:
        """The chunks whose bytes are those that were written; a folder that is not understood is emptied."""
        try:
            about = self._about()
            size = int(np.prod(about["shape"])) * np.dtype(about["dtype"]).itemsize
            lines = (self.folder / "done.txt").read_text().splitlines()
            sums = dict(map(int, line.split()) for line in lines if line.count(" ") == 1)
            with open(self.folder / "rows.bin", "rb") as file:
                return {
                    number
                    for number, checksum in sorted(sums.items())
                    if zlib.crc32(self._bytes_of(file, number, size)) == checksum
                }
        except (OSError, ValueError, KeyError, TypeError):
            shutil.rmtree(self.folder)
            self.folder.mkdir(parents=True)
            return set()

    def _bytes_of(self, file, number: int, size: int) -> bytes:
        start = number * self.chunk
        file.seek(start * size)
        return file.read((min(start + self.chunk, self.count) - start) * size)


def key_of(*parts) -> str:
    """A key for what was computed from `parts`: plain values, modules (their weights count) or hashes."""
    told = [
        weights_hash(part) if isinstance(part, nn.Module) else str(part)
        for part in (FORMAT, *parts)
    ]
    return hashlib.sha256("\n".join(told).encode()).hexdigest()[:32]


@torch.no_grad()
def weights_hash(module: nn.Module) -> str:
    """A hash of a module's weights and buffers."""
    sha = hashlib.sha256()
    for name, value in sorted(module.state_dict().items()):
        sha.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        sha.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return sha.hexdigest()


def images_hash(images: datasets.Dataset) -> str:
    """A hash of the content of a Dataset's images, in their order."""
    return hashes(
        _content(row["image"])
        for row in images.select_columns("image").cast_column("image", datasets.Image(decode=False))
    )


def hashes(contents: Iterable[bytes]) -> str:
    """One hash of many byte strings."""
    sha = hashlib.sha256()
    for content in contents:
        sha.update(hashlib.sha256(content).digest())
    return sha.hexdigest()


def _content(value: dict) -> bytes:
    return value["bytes"] if value["bytes"] is not None else Path(value["path"]).read_bytes()
