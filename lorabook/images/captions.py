"""Captions in columns, and in files that list images: CSV, Parquet, JSON and lines of it."""

import csv
import io
import json
import re
from collections.abc import Iterable
from pathlib import Path

from lorabook.checks import listed

CAPTION_WORDS = ["text", "caption", "prompt", "description", "sentence"]
CAPTION_WORDS += ["additional_feature", "tags"]
_FILE_COLUMNS = ["filename", "imagefilename", "file", "image", "filepath", "imagepath", "imagefile"]
_FILE_COLUMNS += ["imagename", "path", "img", "imgpath", "name"]


def find_caption_column(columns: Iterable[str], asked: str | None, source) -> str:
    """The column of captions: the one asked for, or the first whose name says so."""
    columns = list(columns)
    if asked in columns:
        return asked
    names = ", ".join(map(str, columns[:12])) or "none besides the image"
    if asked:
        raise ValueError(f"{source} has no column {asked!r}; its columns are: {names}")
    by_length = sorted(map(str, columns), key=len)
    for word in CAPTION_WORDS:
        for column in by_length:
            if word in column.lower():
                return column
    raise ValueError(
        f"{source} has no caption column; its columns are: {names}; say which with caption_column"
    )


def as_caption(value, where: str) -> str:
    """A text, or the first of a list of texts; ValueError, saying where, for anything else."""
    if isinstance(value, list) and value and all(isinstance(entry, str) for entry in value):
        return value[0]
    if isinstance(value, str):
        return value
    raise ValueError(
        f"the caption of {where} is not text but {type(value).__name__}: {str(value)[:60]!r}"
    )


def some(names: Iterable[str], limit: int = 3) -> str:
    """The first names for a sentence, each cut to 80 characters."""
    return listed((name[:80] for name in names), limit)


def read_list(path: Path, asked: str | None) -> tuple[list[str], list]:
    """The names of the images that a file lists, and their captions, whatever they are.

    A file that cannot be read, or has no such columns, is a ValueError that names it.
    """
    rows = READERS[path.suffix.lower()](path)
    if not rows:
        raise ValueError(f"{path} lists no images")
    columns = list(dict.fromkeys(key for row in rows for key in row))
    squeezed = {re.sub(r"[\W_]", "", str(column).lower()): column for column in reversed(columns)}
    names = [name for name in _FILE_COLUMNS if name in squeezed]
    names += [name for name in squeezed if name.endswith("filename")]
    if not names:
        known = ", ".join(map(str, columns[:12]))
        raise ValueError(f"{path} has no column file_name; its columns are: {known}")
    files = squeezed[names[0]]
    texts = find_caption_column([column for column in columns if column != files], asked, path)
    return [str(row.get(files) or "") for row in rows], [row.get(texts) for row in rows]


def read_text(path: Path) -> str:
    """A text file's content; ValueError if it is not UTF-8."""
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text; save it as UTF-8") from error


def holds_images(path: Path) -> bool:
    """Whether a Parquet file is a data set as the Hub keeps it, and not a list of files' names."""
    import pyarrow
    import pyarrow.parquet

    return any(
        pyarrow.types.is_struct(field.type) and field.type.get_field_index("bytes") >= 0
        for field in pyarrow.parquet.read_schema(path)
    )


def _lines_of_json(path: Path) -> list[dict]:
    rows = []
    for number, line in enumerate(read_text(path).split("\n"), 1):
        if line.strip():
            try:
                rows.append(json.loads(line))
            except ValueError as error:
                raise ValueError(f"{path}, line {number} is not JSON: {error}") from error
            if not isinstance(rows[-1], dict):
                raise ValueError(
                    f"{path}, line {number} is not a JSON object with file_name and a caption"
                )
    return rows


def _table(path: Path) -> list[dict]:
    text = read_text(path)
    header = text.split("\n", 1)[0]
    try:
        rows = list(csv.DictReader(io.StringIO(text), delimiter=max(",;\t", key=header.count)))
    except csv.Error as error:
        raise ValueError(f"{path} is not CSV: {error}") from error
    for number, row in enumerate(rows, 2):
        if None in row:
            raise ValueError(
                f"{path}, line {number} has more cells than the header; quote captions with commas"
            )
    return rows


def _parquet(path: Path) -> list[dict]:
    import pyarrow.parquet

    try:
        return pyarrow.parquet.read_table(path).to_pylist()
    except (pyarrow.ArrowException, OSError) as error:
        raise ValueError(f"{path} is not Parquet: {error}") from error


def _json(path: Path) -> list[dict]:
    """Rows of a list of objects, of {file: caption}, of sd-scripts' {file: {…}}, or of lines."""
    try:
        rows = json.loads(read_text(path))
    except ValueError as error:
        if "Extra data" in str(error):
            return _lines_of_json(path)
        raise ValueError(f"{path} is not JSON: {error}") from error
    if isinstance(rows, dict):
        rows = [{"file_name": name, **_entry(entry)} for name, entry in rows.items()]
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise ValueError(f"{path} is no list of objects with file_name and a caption")
    return rows


def _entry(entry) -> dict:
    """A caption, or sd-scripts' entry of an image: it learns the caption and then the tags."""
    if not isinstance(entry, dict):
        return {"caption": entry}
    texts = [entry.get("caption"), entry.get("tags")]
    texts = [text for text in texts if isinstance(text, str) and text]
    return entry | ({"caption": ", ".join(texts)} if texts else {})


READERS = {  # of files that list images
    ".jsonl": _lines_of_json,
    ".csv": _table,
    ".tsv": _table,
    ".parquet": _parquet,
    ".json": _json,
}
