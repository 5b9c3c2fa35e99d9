"""Pictures given in memory: lists, dictionaries, tables, streams and torch's data sets, row by row."""

import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import datasets
import numpy as np
from PIL import Image

from lorabook.images.caption_files import text_beside
from lorabook.images.caption_words import as_caption, find_caption_column
from lorabook.images.pixels import as_png, profile_of, stored

LONGEST_STREAM = 10_000  # rows of something without a length, which may have no end
_NAMES = ("image", "img", "picture", "photo", "pixel_values", "file_name", "file", "path")


@dataclass(frozen=True)
class Wanted:
    """What is asked of a source; a prompt stands for all captions, `allow_empty` is None where a warning will do."""

    image_column: str | None
    caption_column: str | None
    config_name: str | None
    max_samples: int | None = None
    allow_empty: bool | None = None
    prompt: str | None = None

    def column_of_captions(self, columns: list[str], name: str) -> str | None:
        """The column of captions; None where there is none and none is needed. Raises: ValueError where one is."""
        try:
            return find_caption_column(columns, self.caption_column, name)
        except ValueError:
            if self.allow_empty and not self.caption_column:
                return None
            raise


def rows_of(source, max_samples: int | None) -> Iterator | None:
    """The rows of what holds pictures in memory; None where it is no such thing.

    Args:
        source: a picture, a list of pictures or of rows, a dictionary of columns, a table (`pandas.DataFrame`, …), a
            streaming data set, one of torch's, or whatever else gives rows one by one.
    """
    if isinstance(source, str | bytes | os.PathLike):
        return None
    if isinstance(source, Image.Image):
        source = [source]
    elif isinstance(source, datasets.IterableDataset):
        source = _undecoded(source)
    elif isinstance(source, Mapping):
        source = _of_columns(source)
    elif hasattr(source, "to_pylist") or hasattr(source, "to_dicts"):
        source = source.to_pylist() if hasattr(source, "to_pylist") else source.to_dicts()
    elif hasattr(source, "columns") and hasattr(source, "to_dict"):
        source = source.to_dict("records")
    elif (
        not isinstance(source, Iterable)
        and hasattr(source, "__getitem__")
        and hasattr(source, "__len__")
    ):  # torch's
        source = map(source.__getitem__, range(len(source)))
    elif not isinstance(source, Iterable):
        return None
    return (
        islice(source, max_samples)
        if max_samples is not None or hasattr(source, "__len__")
        else _with_an_end(source)
    )


def _with_an_end(rows: Iterable) -> Iterator:
    for number, row in enumerate(rows):
        if number == LONGEST_STREAM:
            raise ValueError(
                f"the stream of images has more than {LONGEST_STREAM} rows, perhaps no end; give a "
                "part of it, as with take(…) or max_samples"
            )
        yield row


def parts_of(row, number: int, wanted: Wanted) -> tuple:
    """The picture of a row and its caption: the prompt, where there is one, and "" where rows of this kind have none.

    Args:
        row: a picture, its file, which may have a text beside it, a pair of a picture and a text, or a dictionary.
        number: of the row, for what an error says.
        wanted: the columns, and the prompt where that stands for all captions.
    Raises: ValueError for a dictionary without a picture, or a caption that is not text.
    """
    if isinstance(row, tuple | list) and len(row) == 2:
        text_first = isinstance(row[0], str) and not isinstance(row[1], str)
        row = dict(zip(("text", "image") if text_first else ("image", "text"), row, strict=True))
    if isinstance(row, str | os.PathLike):
        return row, text_beside(Path(row).expanduser()) if wanted.prompt is None else wanted.prompt
    if not isinstance(row, Mapping) or {"bytes", "path"} >= set(row):
        return row, wanted.prompt or ""
    asked = wanted.image_column
    names = (
        [asked]
        if asked
        else [*(n for n in _NAMES if n in row), *(n for n in row if _is_picture(row[n]))]
    )
    if not names or names[0] not in row:
        raise ValueError(
            f"row {number} has no picture{f' {asked!r}' if asked else ''}; it has: "
            f"{', '.join(map(str, row))[:160]}"
        )
    others = [name for name in row if name != names[0]]
    if wanted.prompt is not None or not others and not wanted.caption_column:
        return row[names[0]], wanted.prompt or ""
    text = row.get(wanted.column_of_captions(others, f"row {number}"))
    return row[names[0]], "" if text is None else as_caption(text, f"row {number}")


def _is_picture(value) -> bool:
    return isinstance(value, Image.Image | bytes) or (
        isinstance(value, Mapping) and "bytes" in value
    )


def kept(picture) -> tuple[dict, str]:
    """A picture, its file or its content as a Dataset keeps it, and a word on its colour profile, as `stored` has it."""
    if isinstance(picture, Mapping):
        return stored(picture.get("path"), picture.get("bytes"))
    if isinstance(picture, str | os.PathLike):
        return stored(os.path.expanduser(picture))
    if isinstance(picture, bytes):
        return stored(None, picture)
    picture = picture if isinstance(picture, Image.Image) else _from_numbers(picture)
    return as_png(picture), profile_of(picture)[1]


def _from_numbers(values) -> Image.Image:
    """Numbers of (height, width), (height, width, channels) or (channels, height, width), whole or from 0 to 1."""
    values = np.asarray(values)
    if values.ndim == 3 and values.shape[-1] not in (1, 3, 4):
        values = values.transpose(1, 2, 0)
    if values.ndim not in (2, 3) or values.dtype.kind not in "fiu":
        raise ValueError(f"not a picture: {values.dtype} of shape {values.shape}")
    top = 1 if values.dtype.kind == "f" else 255
    if values.min() < 0 or values.max() > top:
        raise ValueError(f"numbers from {values.min():.4g} to {values.max():.4g}; give 0 to {top}")
    values = (values * (255 / top)).round().astype(np.uint8)
    return Image.fromarray(values[..., 0] if values.shape[-1] == 1 and values.ndim == 3 else values)


def _undecoded(stream: datasets.IterableDataset) -> datasets.IterableDataset:
    """The stream with pictures as they are stored, so that one that is damaged does not end it."""
    stream = stream.with_format(None)
    for name, feature in (stream.features or {}).items():
        if isinstance(feature, datasets.Image):
            stream = stream.cast_column(name, datasets.Image(decode=False))
    return stream


def _of_columns(columns: Mapping) -> list[dict]:
    """Rows of a dictionary of columns."""
    sizes = {
        name: len(column) for name, column in columns.items() if isinstance(column, list | tuple)
    }
    if not sizes or len(sizes) < len(columns) or len(set(sizes.values())) > 1:
        raise ValueError(
            f"a dictionary of images needs a list for each column, all of one length, as in {{'image': […], "
            f"'text': […]}}; it has: {', '.join(map(str, columns))[:160]}"
        )
    return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]
