"""Captioned images, from folders, the Hub or memory, as a `datasets.Dataset` of plain RGB pictures and their text."""
import csv
import io
import json
import os
import re
import warnings
from collections.abc import Iterable
from pathlib import Path

import datasets
import numpy as np
from PIL import ExifTags, Image, ImageOps

from lorabook.worlds import DATA, bundled, world

RETIRED = {"lambdalabs/pokemon-blip-captions": "reach-vb/pokemon-blip-captions"}
CAPTION_COLUMNS = ("text", "caption", "captions", "prompt", "en_text", "additional_feature")
FEATURES = datasets.Features({"image": datasets.Image(), "text": datasets.Value("string")})
# an image that Pillow may not open counts too, so that it is named as unreadable and not passed over
_IMAGE_ENDINGS = frozenset(Image.registered_extensions()) - {".pdf", ".mpg", ".mpeg"} | {".heic", ".heif", ".avif"}


def load_captioned_images(source=None, *, caption_column: str | None = None, image_column: str | None = None,
                          config_name: str | None = None, max_samples: int | None = None,
                          **kwargs) -> datasets.Dataset:
    """Images and captions as a Dataset with the columns `image` (PIL, RGB) and `text` (str).

    Rotation from EXIF is applied, transparency is laid on white, and grey, palette, CMYK and 16-bit images become
    8-bit RGB. Files that are no images are passed over; images that cannot be read are named in a warning.

    Args:
        source: a folder (with metadata.jsonl or .csv, with a .txt beside each image, or with neither, which gives
            empty captions), a bundled name ("creatures"), a Hub id, or a Dataset; None is this machine's default.
        caption_column: the column of captions; None finds it.
        image_column: the column of images in a Dataset; None finds it.
        config_name: the Hub data set's configuration.
        max_samples: take only the first ones.
        **kwargs: passed on to `datasets.load_dataset` (revision, cache_dir, token …).
    Returns: the Dataset, in the source's order (files without metadata: by name).
    Raises: FileNotFoundError for a missing or empty folder or a file that metadata names but is not there;
        ValueError for captions that cannot be found or are not text, or if no image can be read.
    """
    if isinstance(source, datasets.DatasetDict):
        raise ValueError(f"a DatasetDict was given; pass one of its splits: {', '.join(source)}")
    if isinstance(source, datasets.Dataset):
        return _from_dataset(source, "the data set", image_column, caption_column, max_samples)
    name = os.fspath(source) if source is not None else world().data
    for folder in (Path(name).expanduser(), bundled(name)):
        if folder is not None and folder.exists():
            return _from_folder(folder, image_column, caption_column, max_samples)
    name = RETIRED.get(name, name)
    if not re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", name):
        raise FileNotFoundError(f"image folder {name!r} not found: no folder {Path(name).absolute()}, none in the "
                                f"bundled {DATA}, and it is not a Hub id of the form owner/name")
    try:
        found = datasets.load_dataset(name, config_name, split="train", **kwargs)
    except (OSError, datasets.exceptions.DatasetNotFoundError) as error:
        raise FileNotFoundError(f"data set {name!r} not found: no folder {Path(name).absolute()}, and the Hub did not "
                                f"give it: {_first_line(error)}") from error
    return _from_dataset(found, name, image_column, caption_column, max_samples)


def plain_rgb(image: Image.Image) -> Image.Image:
    """The image upright, 8-bit RGB, transparency laid on white."""
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I") or image.mode == "F":
        image = _eight_bit(image)
    if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def _eight_bit(image: Image.Image) -> Image.Image:
    values = np.asarray(image).astype(np.float64)
    top = 1 if image.mode == "F" and values.max() <= 1 else 255 if values.max() <= 255 and image.mode != "I;16" else 65535
    return Image.fromarray((values.clip(0, top) * (255 / top)).round().astype(np.uint8))


def _from_folder(folder: Path, image_column: str | None, caption_column: str | None,
                 max_samples: int | None) -> datasets.Dataset:
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder} is a file; give the folder that holds the images")
    if not _metadata_file(folder) and (folder / "train").is_dir():
        folder = folder / "train"
    metadata = _metadata_file(folder)
    if not metadata and any(folder.rglob("*.parquet")):  # a data set as the Hub keeps it
        found = datasets.load_dataset(str(folder), split="train")
        return _from_dataset(found, str(folder), image_column, caption_column, max_samples)
    pairs = _listed(folder, metadata, caption_column) if metadata else _beside(folder)
    if not pairs:
        raise FileNotFoundError(f"folder {folder} has no images; it needs .png, .jpg, .webp or the like")
    rows, unread = [], []
    for path, text in pairs[:max_samples]:
        try:
            rows.append({"image": _stored(path), "text": text})
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
            unread.append(f"{path.name} ({_first_line(error, 60)})")
    _report_unread(unread, len(rows), folder)
    return datasets.Dataset.from_list(rows, features=FEATURES)


def _metadata_file(folder: Path) -> Path | None:
    return next((folder / n for n in ("metadata.jsonl", "metadata.csv") if (folder / n).is_file()), None)


def _listed(folder: Path, metadata: Path, caption_column: str | None) -> list[tuple[Path, str]]:
    """Image paths and captions as metadata.jsonl or metadata.csv lists them."""
    rows = _rows(metadata)
    if not rows:
        raise ValueError(f"{metadata} lists no images")
    columns = list(dict.fromkeys(key for row in rows for key in row))
    files = next((c for c in ("file_name", "image_file_name", "file", "image") if c in columns), None)
    if files is None:
        raise ValueError(f"{metadata} has no column file_name; its columns are: {', '.join(columns)}")
    others = [c for c in columns if c != files]
    texts = _caption_column({c: rows[0].get(c) for c in others}, caption_column, metadata)
    missing = [str(row.get(files)) for row in rows if not row.get(files) or not (folder / str(row[files])).is_file()]
    if missing:
        raise FileNotFoundError(f"{metadata} names {len(missing)} missing file(s): {_some(missing)}; put them beside "
                                "it or delete their lines")
    return [(folder / row[files], _caption(row.get(texts), f"{metadata}, {row[files]}")) for row in rows]


def _rows(metadata: Path) -> list[dict]:
    text = metadata.read_text(encoding="utf-8-sig")
    if metadata.suffix == ".csv":
        return list(csv.DictReader(io.StringIO(text)))
    rows = []
    for number, line in enumerate(text.splitlines(), 1):
        if line.strip():
            try:
                row = json.loads(line)
            except ValueError as error:
                raise ValueError(f"{metadata}, line {number} is not JSON: {error}") from error
            if not isinstance(row, dict):
                raise ValueError(f"{metadata}, line {number} is not a JSON object with file_name and a caption")
            rows.append(row)
    return rows


def _beside(folder: Path) -> list[tuple[Path, str]]:
    """All images below a folder, each with the text of the .txt of its name, or with no text."""
    paths = sorted(p for p in folder.rglob("*") if p.is_file() and p.suffix.lower() in _IMAGE_ENDINGS
                   and not any(part.startswith(".") for part in p.relative_to(folder).parts))
    without = [p.name for p in paths if not p.with_suffix(".txt").is_file()]
    if without:
        warnings.warn(f"{len(without)} of {len(paths)} images in {folder} have no caption and get an empty one: "
                      f"{_some(without)}; write metadata.jsonl, or a .txt beside each", stacklevel=4)
    return [(p, p.with_suffix(".txt").read_text(encoding="utf-8-sig").strip() if p.name not in without else "")
            for p in paths]


def _from_dataset(dataset: datasets.Dataset, name: str, image_column: str | None, caption_column: str | None,
                  max_samples: int | None) -> datasets.Dataset:
    columns = dataset.column_names
    pictures = [c for c, feature in dataset.features.items() if isinstance(feature, datasets.Image)]
    images = image_column if image_column in columns else pictures[0] if pictures else None
    if images is None:
        raise ValueError(f"{name} has no column of images; its columns are: {', '.join(columns)}")
    if max_samples is not None:
        dataset = dataset.select(range(min(max_samples, len(dataset))))
    if not len(dataset):
        raise ValueError(f"{name} is empty")
    others = [c for c in columns if c != images]
    texts = _caption_column({c: dataset[0][c] for c in others}, caption_column, name)
    raw, rows, unread = dataset.cast_column(images, datasets.Image(decode=False)), [], []
    for number, row in enumerate(raw):
        text = _caption(row[texts], f"{name}, row {number}")
        value = row[images] or {}
        try:
            rows.append({"image": _stored(value.get("path"), value.get("bytes")), "text": text})
        except (OSError, ValueError, TypeError, SyntaxError, Image.DecompressionBombError) as error:
            unread.append(f"row {number} ({_first_line(error, 60)})")
    _report_unread(unread, len(rows), name)
    return datasets.Dataset.from_list(rows, features=FEATURES)


def _stored(path: str | os.PathLike | None, content: bytes | None = None) -> dict:
    """What a Dataset keeps of an image: its file as it is where that is plain RGB, else its plain RGB as PNG."""
    with Image.open(io.BytesIO(content) if content is not None else path) as image:
        plain = image.mode == "RGB" and "transparency" not in image.info and not _turned(image)
        image.load()
        if plain:
            return {"path": os.path.abspath(path) if path and content is None else None, "bytes": content}
        encoded = io.BytesIO()
        plain_rgb(image).save(encoded, "PNG")
        return {"path": None, "bytes": encoded.getvalue()}


def _turned(image: Image.Image) -> bool:
    return image.getexif().get(ExifTags.Base.Orientation, 1) != 1


def _caption_column(first_row: dict, asked: str | None, name) -> str:
    """The column of captions: the one asked for, a usual name, or the only one that holds text."""
    if asked in first_row:
        return asked
    listed = ", ".join(first_row) or "none besides the image"
    if asked:
        raise ValueError(f"{name} has no column {asked!r}; its columns are: {listed}")
    for usual in CAPTION_COLUMNS:
        if usual in first_row:
            return usual
    texts = [c for c, value in first_row.items() if isinstance(value, str)]
    if len(texts) != 1:
        raise ValueError(f"{name} has no caption column that can be told from the others; its columns are: {listed}; "
                         "say which with caption_column")
    return texts[0]


def _caption(value, where: str) -> str:
    if isinstance(value, list) and value and all(isinstance(v, str) for v in value):
        value = value[0]
    if not isinstance(value, str):
        raise ValueError(f"the caption of {where} is not text but {type(value).__name__}: {str(value)[:60]!r}")
    return value


def _report_unread(unread: list[str], read: int, where) -> None:
    if unread and not read:
        raise ValueError(f"none of the {len(unread)} images in {where} can be read: {_some(unread)}")
    if unread:
        warnings.warn(f"{len(unread)} image(s) in {where} cannot be read and are left out: {', '.join(unread)}",
                      stacklevel=4)


def _some(names: Iterable[str], count: int = 3) -> str:
    names = list(names)
    return ", ".join(names[:count]) + (" …" if len(names) > count else "")


def _first_line(error: BaseException, length: int = 160) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:length]
