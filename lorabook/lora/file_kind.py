"""What a file is that should hold weights or settings and holds something else."""

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError, safe_open

LONGEST_HEADER = 100_000_000  # bytes; safetensors takes no longer one

# what a file begins with, and what it then is; the first that fits counts
_KINDS = [
    (re.compile(pattern, re.IGNORECASE | re.DOTALL), kind)
    for pattern, kind in (
        (
            rb"version https://git-lfs",
            "a Git LFS pointer, which only stands for the file: run `git lfs pull`, or take the file "
            "from its page",
        ),
        (
            rb"<(!doctype|html|head|body)",
            "a web page (HTML), as a site gives to who is not logged in",
        ),
        (rb"<[?\w!]", "a web page or XML, as a site gives in place of a file"),
        (
            rb"PK\x03\x04.*data\.pkl",
            "a PyTorch checkpoint (a pickle): name it .ckpt and give allow_pickle=True, or get it as "
            ".safetensors",
        ),
        (rb"PK[\x03\x05]", "a zip archive; unpack it"),
        (rb"\x1f\x8b", "a gzip archive; unpack it"),
        (rb"7z\xbc\xaf|Rar!", "a 7z or RAR archive; unpack it"),
        (rb".{257}ustar", "a tar archive; unpack it"),
        (
            rb"\x80[\x02-\x05].",
            "a pickle: name it .ckpt and give allow_pickle=True, or get it as .safetensors",
        ),
        (rb"GGUF", "a GGUF file"),
        (rb"\x89PNG|\xff\xd8\xff|GIF8|RIFF", "a picture"),
        (rb"%PDF", "a PDF"),
    )
]


def kind_of(path: Path) -> str:
    """What a file is, by its first bytes and its size, to say in an error: a web page, cut short, a pickle …"""
    size = path.stat().st_size
    with open(path, "rb") as file:
        start = file.read(4096)
        length = int.from_bytes(start[:8], "little")
        if start[8:9] == b"{" and length <= LONGEST_HEADER:  # a safetensors file's own beginning
            file.seek(8)
            wanted = 8 + length + _weights_end(file.read(length))
            return f"cut short, {size:,} of {wanted:,} bytes" if size < wanted else "damaged"
    if not start.strip(b"\0"):
        return "empty" if not size else "cut short or damaged, it begins with zeros"
    text = start.removeprefix(b"\xef\xbb\xbf").lstrip()
    if found := next((kind for pattern, kind in _KINDS if pattern.match(text)), None):
        return found
    said = " ".join(text[:100].decode(errors="replace").split())
    if not said.isprintable() or "\ufffd" in said[:-1]:
        return "cut short or damaged"
    return f"{'JSON' if text[:1] in b'{[' else 'a text'}, which says {said:.90}"


@contextmanager
def opened(path: Path, shown: str | None = None) -> Iterator:
    """A safetensors file, opened for its keys, tensors and metadata.

    Args:
        shown: what to call it in errors; None is its path.
    Raises: ValueError for what is none, saying what it is.
    """
    try:
        with safe_open(path, "pt") as file:
            yield file
    except (SafetensorError, OSError) as error:
        if not path.is_file():
            raise
        raise ValueError(
            f"{shown or path} cannot be read as safetensors: it is {kind_of(path)}; fetch it anew"
        ) from error


def read_settings(path: Path, shown: str | None = None) -> dict:
    """The settings in a JSON file, as PEFT's adapter_config.json; `shown` as in `opened`.

    Raises: ValueError for what is no JSON, saying what it is, or JSON of another shape.
    """
    try:
        told = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise ValueError(
            f"{shown or path} is no JSON that can be read: it is {kind_of(path)}; fetch it anew"
        ) from error
    if not isinstance(told, dict):
        raise ValueError(
            f"{shown or path} holds no settings by name but {json.dumps(told):.60}; fetch it anew"
        )
    return told


def _weights_end(header: bytes) -> int:
    """Where a safetensors file's last tensor ends, counted from the header's end."""
    try:
        ends = [
            told["data_offsets"][1]
            for key, told in json.loads(header).items()
            if key != "__metadata__"
        ]
        return max(ends, default=0)
    except (ValueError, TypeError, KeyError, IndexError, AttributeError, RecursionError):
        return 0
