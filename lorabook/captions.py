"""Where the captions of an image folder are: in metadata.jsonl or .csv, or in a .txt beside each image."""
import csv
import io
import json
import warnings
from collections.abc import Container, Iterable
from pathlib import Path

CAPTION_WORDS = ("text", "caption", "prompt", "description", "sentence", "additional_feature")


def metadata_file(folder: Path) -> Path | None:
    """The folder's metadata.jsonl or metadata.csv, or None."""
    return next((folder / n for n in ("metadata.jsonl", "metadata.csv") if (folder / n).is_file()), None)


def listed(folder: Path, metadata: Path, caption_column: str | None) -> list[tuple[Path, str]]:
    """Image paths and captions as metadata.jsonl or metadata.csv lists them."""
    rows = _rows(metadata)
    if not rows:
        raise ValueError(f"{metadata} lists no images")
    columns = list(dict.fromkeys(key for row in rows for key in row))
    files = next((c for c in ("file_name", "image_file_name", "file", "image") if c in columns), None)
    if files is None:
        raise ValueError(f"{metadata} has no column file_name; its columns are: {', '.join(columns)}")
    others = [c for c in columns if c != files]
    texts = find_caption_column(others, caption_column, metadata)
    missing = [str(row.get(files)) for row in rows if not row.get(files) or not (folder / str(row[files])).is_file()]
    if missing:
        raise FileNotFoundError(f"{metadata} names {len(missing)} missing file(s): {some(missing)}; put them beside "
                                "it or delete their lines")
    return [(folder / row[files], as_caption(row.get(texts), f"{metadata}, {row[files]}")) for row in rows]


def _rows(metadata: Path) -> list[dict]:
    text = _read(metadata)
    if metadata.suffix == ".csv":
        return _csv_rows(metadata, text)
    rows = []
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            try:
                row = json.loads(line)
            except ValueError as error:
                raise ValueError(f"{metadata}, line {number} is not JSON: {error}") from error
            if not isinstance(row, dict):
                raise ValueError(f"{metadata}, line {number} is not a JSON object with file_name and a caption")
            rows.append(row)
    return rows


def _csv_rows(metadata: Path, text: str) -> list[dict]:
    try:
        rows = list(csv.DictReader(io.StringIO(text)))
    except csv.Error as error:
        raise ValueError(f"{metadata} is not CSV: {error}") from error
    for number, row in enumerate(rows, 2):
        if None in row:
            raise ValueError(f"{metadata}, line {number} has more cells than the header; quote captions with commas")
    return rows


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text; save it as UTF-8") from error


def beside(folder: Path, endings: Container[str], captions: bool = True) -> list[tuple[Path, str]]:
    """All files below a folder with such endings, each with the text of the .txt of its name, or with no text."""
    paths = sorted(p for p in folder.rglob("*") if p.is_file() and p.suffix.lower() in endings
                   and not any(part.startswith(".") for part in p.relative_to(folder).parts))
    if not captions:
        return [(p, "") for p in paths]
    without = {p for p in paths if not p.with_suffix(".txt").is_file()}
    if without:
        names = some(str(p.relative_to(folder)) for p in sorted(without))
        warnings.warn(f"{len(without)} of {len(paths)} images in {folder} have no caption and get an empty one: {names}; "
                      "write metadata.jsonl, or a .txt beside each", stacklevel=5)
    return [(p, "" if p in without else _read(p.with_suffix(".txt")).strip()) for p in paths]


def find_caption_column(columns: Iterable[str], asked: str | None, name) -> str:
    """The column of captions: the one asked for, or the first whose name says so.

    Raises: ValueError, listing the columns, if there is none.
    """
    columns = list(columns)
    if asked in columns:
        return asked
    told = ", ".join(columns[:12]) or "none besides the image"
    if asked:
        raise ValueError(f"{name} has no column {asked!r}; its columns are: {told}")
    found = [column for word in CAPTION_WORDS for column in sorted(columns, key=len) if word in column.lower()]
    if not found:
        raise ValueError(f"{name} has no caption column; its columns are: {told}; say which with caption_column")
    return found[0]


def as_caption(value, where: str) -> str:
    """The value where it is text, its first where it is a list of texts; else a ValueError that says where."""
    if isinstance(value, list) and value and all(isinstance(v, str) for v in value):
        value = value[0]
    if not isinstance(value, str):
        raise ValueError(f"the caption of {where} is not text but {type(value).__name__}: {str(value)[:60]!r}")
    return value


def some(names: Iterable[str], count: int = 3) -> str:
    """The first names, and dots where there are more."""
    names = list(names)
    return ", ".join(name[:80] for name in names[:count]) + (" …" if len(names) > count else "")


def first_line(error: BaseException, length: int = 160) -> str:
    """What an error says first, shortened."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:length]
