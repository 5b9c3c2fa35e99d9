"""Images in memory: lists, dictionaries, tables, streams and torch's data sets, row by row."""

import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import datasets
from PIL import Image

from lorabook.images.caption_files import text_beside
from lorabook.images.captions import as_caption, find_caption_column

LONGEST_STREAM = 10_000  # rows of something without a length, which may have no end
IMAGE_COLUMNS = ["image", "img", "picture", "photo", "pixel_values", "file_name", "file", "path"]


@dataclass(frozen=True)
class Wanted:
    """What is asked of a source."""

    image_column: str | None
    caption_column: str | None
    max_samples: int | None = None
    allow_empty: bool | None = None  # as `load_captioned_images` has it
    prompt: str | None = None  # stands for all captions

    def image_and_text(self, row, number: int) -> tuple:
        """The image of a row and its caption: the prompt, or "" where rows of this kind have none.

        A row is an image, its file, which may have a text beside it, a pair of an image and a
        text, or a dictionary.
        """
        if isinstance(row, tuple | list) and len(row) == 2:
            text_first = isinstance(row[0], str) and not isinstance(row[1], str)
            row = dict(zip(("image", "text"), reversed(row) if text_first else row, strict=True))
        if isinstance(row, str | os.PathLike) and self.prompt is None:
            return row, text_beside(Path(row).expanduser())
        if not isinstance(row, Mapping) or {"bytes", "path"} >= set(row):
            return row, self.prompt or ""
        names = [name for name in IMAGE_COLUMNS if name in row]
        names += [name for name in row if _holds_image(row[name])]
        column = self.image_column or next(iter(names), None)
        if column not in row:
            asked = f" {self.image_column!r}" if self.image_column else ""
            raise ValueError(
                f"row {number} has no picture{asked}; it has: {', '.join(map(str, row))[:160]}"
            )
        if self.prompt is not None or len(row) == 1 and not self.caption_column:
            return row[column], self.prompt or ""
        text = row.get(self.column_of_captions(row, column, f"row {number}"))
        return row[column], "" if text is None else as_caption(text, f"row {number}")

    def column_of_captions(self, columns: Iterable[str], image: str, source: str) -> str | None:
        """The column of captions; None where there is none and none is needed."""
        try:
            others = [column for column in columns if column != image]
            return find_caption_column(others, self.caption_column, source)
        except ValueError:
            if self.allow_empty and not self.caption_column:
                return None
            raise


def rows_of(source, max_samples: int | None) -> Iterable:
    """The rows of what holds images in memory, in whatever form a library has them."""
    rows = _rows(source)
    if max_samples is not None:
        return islice(rows, max_samples)
    return rows if hasattr(source, "__len__") else _with_an_end(rows)


def _rows(source) -> Iterable:
    if isinstance(source, Image.Image):
        return [source]
    if isinstance(source, datasets.IterableDataset):
        source = source.with_format(None)
        for name, kind in (source.features or {}).items():
            if isinstance(kind, datasets.Image):  # a damaged image is not to end the stream
                source = source.cast_column(name, datasets.Image(decode=False))
        return source
    if isinstance(source, Mapping):
        return _rows_of_columns(source)
    for method in ("to_pylist", "to_dicts"):  # pyarrow's and polars' tables
        if hasattr(source, method):
            return getattr(source, method)()
    if hasattr(source, "columns") and hasattr(source, "to_dict"):
        return source.to_dict("records")
    if isinstance(source, Iterable):
        return source
    if hasattr(source, "__getitem__") and hasattr(source, "__len__"):  # torch's data sets
        return map(source.__getitem__, range(len(source)))
    raise ValueError(
        f"images cannot be read from {type(source).__name__}; give a folder, a Hub id, a Dataset, "
        "or a list of pictures or of dictionaries with image and text"
    )


def _rows_of_columns(columns: Mapping) -> list[dict]:
    sizes = [len(c) if isinstance(c, list | tuple) else None for c in columns.values()]
    if None in sizes or len(set(sizes)) != 1:
        raise ValueError(
            "a dictionary of images needs a list for each column, all of one length, as in "
            f"{{'image': […], 'text': […]}}; it has: {', '.join(map(str, columns))[:160]}"
        )
    return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]


def _with_an_end(rows: Iterable) -> Iterator:
    for number, row in enumerate(rows):
        if number == LONGEST_STREAM:
            raise ValueError(
                f"the stream of images has more than {LONGEST_STREAM} rows, perhaps no end; give a "
                "part of it, as with take(…) or max_samples"
            )
        yield row


def _holds_image(value) -> bool:
    mapping = isinstance(value, Mapping) and "bytes" in value
    return mapping or isinstance(value, Image.Image | bytes)
