"""Files that list pictures with their captions: JSON lines, CSV, Parquet, JSON and sd-scripts' JSON."""

import csv
import io
import json
import re
from pathlib import Path

from lorabook.images.caption_words import find_caption_column

METADATA = (
    "metadata.jsonl",
    "metadata.csv",
    "metadata.parquet",
)  # what datasets' imagefolder reads, in any folder
LISTS = (".jsonl", ".csv", ".parquet", ".json", ".tsv")
_FILE_COLUMNS = (
    "filename",
    "imagefilename",
    "file",
    "image",
    "filepath",
    "imagepath",
    "imagefile",
    "imagename",
    "path",
    "img",
    "imgpath",
    "name",
)


def read_list(path: Path, asked: str | None) -> tuple[list[str], list]:
    """The names of the pictures that a file lists, and their captions, whatever they are.

    Args:
        asked: the column of captions; None finds it.
    Raises: ValueError, naming the file, if it cannot be read or has no such columns.
    """
    rows = _READERS[path.suffix.lower()](path)
    if not rows:
        raise ValueError(f"{path} lists no images")
    columns = list(dict.fromkeys(key for row in rows for key in row))
    named = {re.sub(r"[\W_]", "", str(column).lower()): column for column in reversed(columns)}
    files = next(
        (
            named[name]
            for name in (*_FILE_COLUMNS, *named)
            if name in named and (name in _FILE_COLUMNS or name.endswith("filename"))
        ),
        None,
    )
    if files is None:
        raise ValueError(
            f"{path} has no column file_name; its columns are: {', '.join(map(str, columns[:12]))}"
        )
    texts = find_caption_column([column for column in columns if column != files], asked, path)
    return [str(row.get(files) or "") for row in rows], [row.get(texts) for row in rows]


def read_text(path: Path) -> str:
    """A text file's content. Raises: ValueError if it is not UTF-8."""
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text; save it as UTF-8") from error


def holds_pictures(path: Path) -> bool:
    """Whether a Parquet file is a data set as the Hub keeps it: pictures in a column, not names of files."""
    import pyarrow
    import pyarrow.parquet

    return any(
        pyarrow.types.is_struct(field.type) and field.type.get_field_index("bytes") >= 0
        for field in pyarrow.parquet.read_schema(path)
    )


def _of_lines(path: Path) -> list[dict]:
    rows = []
    for number, line in enumerate(read_text(path).split("\n"), 1):
        if line.strip():
            try:
                row = json.loads(line)
            except ValueError as error:
                raise ValueError(f"{path}, line {number} is not JSON: {error}") from error
            if not isinstance(row, dict):
                raise ValueError(
                    f"{path}, line {number} is not a JSON object with file_name and a caption"
                )
            rows.append(row)
    return rows


def _of_table(path: Path) -> list[dict]:
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


def _of_parquet(path: Path) -> list[dict]:
    import pyarrow.parquet

    try:
        return pyarrow.parquet.read_table(path).to_pylist()
    except (pyarrow.ArrowException, OSError) as error:
        raise ValueError(f"{path} is not Parquet: {error}") from error


def _of_json(path: Path) -> list[dict]:
    """Rows of a list of objects, of {file: caption}, of sd-scripts' {file: {"caption": …, "tags": …}}, or of lines."""
    try:
        found = json.loads(read_text(path))
    except ValueError as error:
        if "Extra data" in str(error):
            return _of_lines(path)
        raise ValueError(f"{path} is not JSON: {error}") from error
    if isinstance(found, dict):
        found = [{"file_name": name, **_told(entry)} for name, entry in found.items()]
    if not isinstance(found, list) or not all(isinstance(row, dict) for row in found):
        raise ValueError(f"{path} is no list of objects with file_name and a caption")
    return found


def _told(entry) -> dict:
    """What sd-scripts' metadata says of a picture: it learns the caption and, after it, the tags."""
    if not isinstance(entry, dict):
        return {"caption": entry}
    parts = [
        entry[key] for key in ("caption", "tags") if isinstance(entry.get(key), str) and entry[key]
    ]
    return {**entry, **({"caption": ", ".join(parts)} if parts else {})}


_READERS = {
    ".jsonl": _of_lines,
    ".csv": _of_table,
    ".tsv": _of_table,
    ".parquet": _of_parquet,
    ".json": _of_json,
}
