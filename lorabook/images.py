"""Captioned images, from folders, the Hub or memory, as a `datasets.Dataset` of plain RGB pictures and their text."""
import io
import os
import re
import warnings
from pathlib import Path

import datasets
import numpy as np
from PIL import ExifTags, Image, ImageOps

from lorabook.captions import as_caption, beside, find_caption_column, first_line, listed, metadata_file, some
from lorabook.worlds import DATA, bundled, world

RETIRED = {"lambdalabs/pokemon-blip-captions": "reach-vb/pokemon-blip-captions"}
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
    return _load(source, image_column, caption_column, config_name, max_samples, None, kwargs)


def load_instance_images(source, prompt: str = "", *, caption_column: str | None = None, image_column: str | None = None,
                         config_name: str | None = None, **kwargs) -> datasets.Dataset:
    """Pictures of one subject, or of one class, for DreamBooth: `image` (PIL, RGB) and `text` (str).

    Args:
        source: a folder, a bundled name ("subjects/patch_cat"), a Hub id or a Dataset; hidden files and folders are
            passed over.
        prompt: the text of every image.
        caption_column: gives each image a text of its own instead, as in `load_captioned_images`.
        image_column, config_name, **kwargs: as in `load_captioned_images`.
    Returns: the Dataset, by file name.
    Raises: FileNotFoundError for a missing folder, or one without images; ValueError if no image can be read.
    """
    if source is None:
        raise ValueError("no folder of images was given")
    return _load(source, image_column, caption_column, config_name, None, None if caption_column else prompt, kwargs)


def image_files(folder: Path) -> list[Path]:
    """The image files below a folder, by name; nothing hidden."""
    return [path for path, _ in beside(folder, _IMAGE_ENDINGS, captions=False)]


def _load(source, image_column: str | None, caption_column: str | None, config_name: str | None, max_samples: int | None,
          prompt: str | None, kwargs: dict) -> datasets.Dataset:
    """Images with their captions, or all with one prompt where that is given."""
    if isinstance(source, datasets.DatasetDict):
        raise ValueError(f"a DatasetDict was given; pass one of its splits: {', '.join(source)}")
    if isinstance(source, datasets.Dataset):
        return _from_dataset(source, "the data set", image_column, caption_column, max_samples, prompt)
    name = os.fspath(source) if source is not None else world().data
    for folder in (Path(name).expanduser(), bundled(name)):
        if folder is not None and folder.exists():
            return _from_folder(folder, image_column, caption_column, max_samples, prompt)
    name = RETIRED.get(name, name)
    if not re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", name):
        raise FileNotFoundError(f"image folder {name!r} not found: no folder {Path(name).absolute()}, none in the "
                                f"bundled {DATA}, and it is not a Hub id of the form owner/name")
    try:
        found = datasets.load_dataset(name, config_name, split="train", **kwargs)
    except (OSError, datasets.exceptions.DatasetNotFoundError) as error:
        raise FileNotFoundError(f"data set {name!r} not found: no folder {Path(name).absolute()}, and the Hub did not "
                                f"give it: {first_line(error)}") from error
    return _from_dataset(found, name, image_column, caption_column, max_samples, prompt)


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
    deep = image.mode.startswith("I;16") or (image.mode == "I" and image.format in ("PPM", "PNG")) or values.max() > 255
    top = 65535 if deep else 1 if image.mode == "F" and values.max() <= 1 else 255
    return Image.fromarray((values.clip(0, top) * (255 / top)).round().astype(np.uint8))


def _from_folder(folder: Path, image_column: str | None, caption_column: str | None, max_samples: int | None,
                 prompt: str | None) -> datasets.Dataset:
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder} is a file; give the folder that holds the images")
    if not metadata_file(folder) and (folder / "train").is_dir():
        folder = folder / "train"
    metadata = metadata_file(folder)
    if not metadata and any(folder.rglob("*.parquet")):  # a data set as the Hub keeps it
        found = datasets.load_dataset(str(folder), split="train")
        return _from_dataset(found, str(folder), image_column, caption_column, max_samples, prompt)
    if prompt is not None:
        pairs = [(path, prompt) for path in image_files(folder)]
    else:
        pairs = listed(folder, metadata, caption_column) if metadata else beside(folder, _IMAGE_ENDINGS)
    return _readable(pairs[:max_samples], folder)


def _readable(pairs: list[tuple[Path, str]], folder: Path) -> datasets.Dataset:
    """The images that can be read, with their texts."""
    if not pairs:
        raise FileNotFoundError(f"folder {folder} has no images; it needs .png, .jpg, .webp or the like")
    rows, unread = [], []
    for path, text in pairs:
        try:
            rows.append({"image": _stored(path), "text": text})
        except Exception as error:  # a damaged file can make Pillow raise nearly anything
            unread.append(f"{path.relative_to(folder)} ({first_line(error, 60)})")
    _report_unread(unread, len(rows), folder)
    return datasets.Dataset.from_list(rows, features=FEATURES)


def _from_dataset(dataset: datasets.Dataset, name: str, image_column: str | None, caption_column: str | None,
                  max_samples: int | None, prompt: str | None) -> datasets.Dataset:
    dataset, columns = dataset.with_format(None), dataset.column_names
    pictures = [c for c, feature in dataset.features.items() if isinstance(feature, datasets.Image)]
    if not pictures or (image_column and image_column not in pictures):
        raise ValueError(f"{name} has no column of images{f' {image_column!r}' if image_column else ''}; its columns are: "
                         f"{', '.join(columns[:12])}")
    images = image_column or pictures[0]
    if max_samples is not None:
        dataset = dataset.select(range(min(max_samples, len(dataset))))
    if not len(dataset):
        raise ValueError(f"{name} is empty")
    texts = find_caption_column([c for c in columns if c != images], caption_column, name) if prompt is None else None
    raw, kept, found, unread = dataset.cast_column(images, datasets.Image(decode=False)), [], [], []
    for number, row in enumerate(raw):
        text = as_caption(row[texts], f"{name}, row {number}") if prompt is None else prompt
        value = row[images] or {}
        try:
            stored = _stored(value.get("path"), value.get("bytes"))
        except Exception as error:
            unread.append(f"row {number} ({first_line(error, 60)})")
            continue
        kept.append(number)
        found.append((text, None if stored["bytes"] is value.get("bytes") else stored["bytes"]))  # not what it holds
    _report_unread(unread, len(kept), name)
    plain = dataset.select(kept).select_columns(images)
    return _as_found(plain if images == "image" else plain.rename_column(images, "image"), found)


def _as_found(dataset: datasets.Dataset, found: list[tuple[str, bytes | None]]) -> datasets.Dataset:
    """A Dataset of images with their texts; those that had to be made plain are replaced by their new content."""
    dataset = dataset.add_column("text", [text for text, _ in found])
    if all(content is None for _, content in found):
        return dataset.cast(FEATURES)
    raw = dataset.cast_column("image", datasets.Image(decode=False))
    rows = [{"image": {"path": None, "bytes": content} if content else row["image"], "text": row["text"]}
            for row, (_, content) in zip(raw, found, strict=True)]
    return datasets.Dataset.from_list(rows, features=FEATURES)


def _stored(path: str | os.PathLike | None, content: bytes | None = None) -> dict:
    """What a Dataset keeps of an image: its file as it is where that is plain RGB, else its plain RGB as PNG."""
    with Image.open(io.BytesIO(content) if content is not None else path or "no image") as image:
        image.load()
        plain = image.mode == "RGB" and "transparency" not in image.info and not _turned(image)
        if plain:
            return {"path": os.path.abspath(path) if path and content is None else None, "bytes": content}
        encoded = io.BytesIO()
        plain_rgb(image).save(encoded, "PNG")
        return {"path": None, "bytes": encoded.getvalue()}


def _turned(image: Image.Image) -> bool:
    return image.getexif().get(ExifTags.Base.Orientation, 1) != 1


def _report_unread(unread: list[str], read: int, where) -> None:
    if unread and not read:
        raise ValueError(f"none of the {len(unread)} images in {where} can be read: {some(unread)}")
    if unread:
        warnings.warn(f"{len(unread)} image(s) in {where} cannot be read and are left out: {some(unread, 20)}",
                      stacklevel=5)
