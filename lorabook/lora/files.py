"""Files opened for weights or settings; what holds something else is called what it is."""

import json
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from lorabook.lora.formats.unread import other_kind

PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
_LONGEST_HEADER = 100_000_000  # bytes; safetensors takes no longer one

# What a file begins with, and what it then is; the first that fits counts.
_BY_BYTES = (
    (
        rb"version https://git-lfs",
        "a Git LFS pointer, which only stands for the file: run `git lfs pull`, or take the file "
        "from its page",
    ),
    (rb"<(!doctype|html|head|body)", "a web page (HTML), as a site gives to who is not logged in"),
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


def brief(path: str | os.PathLike, letters: int = 90) -> str:
    """A path or address for an error message: of a long one its end, of an address no query."""
    text = shareable_address(os.fspath(path))
    return text if len(text) <= letters else f"…{text[1 - letters :]}"


def shareable_address(text: str) -> str:
    """An address without user, query and fragment, which may hold a token; other text as it is."""
    address = re.match(r"\s*([a-z][a-z0-9+.-]+:/+)(?:[^/?#]*@)?([^?#]*)", text, re.IGNORECASE)
    if address:
        return f"{address[1]}{address[2].strip()}"
    is_without_scheme = re.match(r"\s*[\w-]+(\.[\w-]+)+(:\d+)?/[^?]*\?", text)
    return text.partition("?")[0] if is_without_scheme else text


def check_no_pickle(name: str, where: str, allowed: bool) -> None:
    """Raise ValueError for a file name that is a pickle's; `where` is what the error calls it."""
    if Path(name).suffix.lower() in PICKLES and not allowed:
        file = "" if where.endswith(name) else f" ({name})"
        raise ValueError(
            f"{where} is a pickle file{file}, which can run code when it is opened; get it as "
            ".safetensors, or give allow_pickle=True to read its weights and nothing else"
        )


@contextmanager
def open_safetensors(path: Path) -> Iterator:
    """Open a safetensors file for its keys, tensors and metadata; ValueError for what is none."""
    try:
        with safe_open(path, "pt") as file:
            yield file
    except (SafetensorError, OSError) as error:
        if not path.is_file():
            raise
        raise ValueError(
            f"{brief(path)} cannot be read as safetensors: it is {kind_of(path)}; fetch it anew"
        ) from error


def read_settings(path: Path) -> dict:
    """The settings in a JSON file, as PEFT's adapter_config.json; ValueError for what is none."""
    try:
        settings = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise ValueError(
            f"{brief(path)} is no JSON that can be read: it is {kind_of(path)}; fetch it anew"
        ) from error
    if not isinstance(settings, dict):
        raise ValueError(
            f"{brief(path)} holds no settings by name but {json.dumps(settings):.60}; fetch it anew"
        )
    return settings


def read_pickle(path: str | os.PathLike) -> dict[str, Tensor]:
    """The weights in an old .bin, .pt or .ckpt file, on the CPU; no code in it is run.

    They may stand below "state_dict". ValueError if it holds anything else, or is damaged.
    """
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise
    except Exception as error:  # of any class; torch's own advice would be to run what is inside
        raise ValueError(
            f"{path} cannot be opened as weights alone ({type(error).__name__}): it is damaged or "
            "holds other things, which could run code; get it as .safetensors"
        ) from error
    if isinstance(content, Mapping) and isinstance(content.get("state_dict"), Mapping):
        content = content["state_dict"]
    items = content.items() if isinstance(content, Mapping) else ()
    weights = {
        key: value.detach()
        for key, value in items
        if isinstance(key, str) and isinstance(value, Tensor)
    }
    if not weights:
        raise ValueError(
            other_kind(_nested(content), brief(path))
            or f"{path} holds no weights by name but a {type(content).__name__}; get the adapter "
            "as .safetensors"
        )
    others = [key for key, value in items if not isinstance(value, (Tensor, int, float))]
    if others:
        raise ValueError(
            f"{path} holds other things than weights, for example {str(others[0])[:80]!r}; get it "
            "as .safetensors"
        )
    return weights


def kind_of(path: Path) -> str:
    """What a file is by its first bytes and its size: "a web page …", "cut short, …" and so on."""
    size = path.stat().st_size
    with open(path, "rb") as file:
        start = file.read(4096)
        length = int.from_bytes(start[:8], "little")
        if start[8:9] == b"{" and length <= _LONGEST_HEADER:  # as safetensors files begin
            file.seek(8)
            whole = 8 + length + _end_of_weights(file.read(length))
            return f"cut short, {size:,} of {whole:,} bytes" if size < whole else "damaged"
    if not start.strip(b"\0"):
        return "empty" if not size else "cut short or damaged, it begins with zeros"
    text = start.removeprefix(b"\xef\xbb\xbf").lstrip()
    for pattern, kind in _BY_BYTES:
        if re.match(pattern, text, re.IGNORECASE | re.DOTALL):
            return kind
    words = " ".join(text[:100].decode(errors="replace").split())
    if not words.isprintable() or "\ufffd" in words[:-1]:
        return "cut short or damaged"
    return f"{'JSON' if text[:1] in b'{[' else 'a text'}, which says {words:.90}"


def _nested(content) -> dict[str, Tensor]:
    """Tensors one or two levels down, as in A1111's embeddings, IP-Adapters and hypernetworks."""
    weights = {}
    groups = [("", content)] if isinstance(content, Mapping) else []
    for _ in range(3):
        items = [
            (f"{name}.{key}".removeprefix("."), value)
            for name, group in groups
            for key, value in (group.items() if isinstance(group, Mapping) else enumerate(group))
        ]
        weights |= {name: value for name, value in items if isinstance(value, Tensor)}
        groups = [(name, value) for name, value in items if isinstance(value, (Mapping, list))]
    return weights


def _end_of_weights(header: bytes) -> int:
    """Where a safetensors file's last tensor ends, counted from the header's end."""
    try:
        entries = json.loads(header)
        entries.pop("__metadata__", None)
        return max((entry["data_offsets"][1] for entry in entries.values()), default=0)
    except (ValueError, TypeError, KeyError, IndexError, AttributeError, RecursionError):
        return 0
