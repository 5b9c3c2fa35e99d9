"""Captioned images, from folders, the Hub or memory, as a `datasets.Dataset` of plain RGB pictures and their text."""

import os
import re
import warnings
from collections.abc import Iterable
from pathlib import Path

import datasets

from lorabook.images import caption_files
from lorabook.images.caption_files import find_captions
from lorabook.images.caption_lists import holds_pictures
from lorabook.images.caption_words import as_caption, first_line, some
from lorabook.images.given import Wanted, kept, parts_of, rows_of
from lorabook.images.pixels import ENDINGS, stored
from lorabook.images.problems import Problems, report_empty
from lorabook.worlds import DATA, bundled, world

RETIRED = {"lambdalabs/pokemon-blip-captions": "reach-vb/pokemon-blip-captions"}
FEATURES = datasets.Features({"image": datasets.Image(), "text": datasets.Value("string")})


def load_captioned_images(
    source=None,
    *,
    caption_column: str | None = None,
    image_column: str | None = None,
    config_name: str | None = None,
    max_samples: int | None = None,
    allow_empty_captions: bool | None = None,
    **kwargs,
) -> datasets.Dataset:
    """Images and captions as a Dataset with the columns `image` (PIL, RGB) and `text` (str).

    Rotation from EXIF is applied, colour profiles are brought to sRGB, transparency is laid on white, and grey, palette,
    CMYK and 16-bit images become 8-bit RGB. Files that are no images are passed over; images that cannot be read are named
    in a warning, and so are images without a caption, and captions that contradict each other.

    Args:
        source: a folder, a bundled name ("creatures"), a Hub id, a Dataset, streaming or not, or pictures in memory: a list
            of pictures, of pairs or of dictionaries with image and text, a dictionary of columns, a DataFrame, a data set
            of torch; None is this machine's default. A folder's captions are in metadata.jsonl, .csv or .parquet, there or
            in folders below, in another list that names the images (captions.csv, sd-scripts' meta_cap.json …), or in a
            .txt, .caption or .json beside each image; or it is one that `save_to_disk` wrote.
        caption_column: the column of captions; None finds it.
        image_column: the column of images in a Dataset or in rows; None finds it.
        config_name: the Hub data set's configuration.
        max_samples: take only the first ones.
        allow_empty_captions: True says that images without a caption are meant; False makes it an error where no image
            has one; None warns.
        **kwargs: passed on to `datasets.load_dataset` (revision, cache_dir, token …).
    Returns: the Dataset, in the source's order (files without metadata: by name).
    Raises: FileNotFoundError for a missing or empty folder or a file that metadata names but is not there;
        ValueError for captions that cannot be found or are not text, or if no image can be read.
    """
    return _load(
        source,
        Wanted(image_column, caption_column, config_name, max_samples, allow_empty_captions),
        kwargs,
    )


def load_instance_images(
    source,
    prompt: str = "",
    *,
    caption_column: str | None = None,
    image_column: str | None = None,
    config_name: str | None = None,
    **kwargs,
) -> datasets.Dataset:
    """Pictures of one subject, or of one class, for DreamBooth: `image` (PIL, RGB) and `text` (str).

    Args:
        source: a folder, a bundled name ("subjects/patch_cat"), a Hub id, a Dataset or pictures in memory, as in
            `load_captioned_images`; hidden files and folders are passed over.
        prompt: the text of every image.
        caption_column: gives each image a text of its own instead, as in `load_captioned_images`.
        image_column, config_name, **kwargs: as in `load_captioned_images`.
    Returns: the Dataset, by file name.
    Raises: FileNotFoundError for a missing folder, or one without images; ValueError if no image can be read.
    """
    if source is None:
        raise ValueError("no folder of images was given")
    wanted = Wanted(
        image_column,
        caption_column,
        config_name,
        allow_empty=False,
        prompt=None if caption_column else prompt,
    )
    return _load(source, wanted, kwargs)


def image_files(folder: Path) -> list[Path]:
    """The image files below a folder, by name; nothing hidden."""
    return caption_files.image_files(folder, ENDINGS)


def _load(source, wanted: Wanted, kwargs: dict) -> datasets.Dataset:
    """Images with their captions, or all with one prompt where that is given."""
    source = world().data if source is None else _one_split(source)
    if isinstance(source, datasets.Dataset):
        return _from_dataset(source, "the data set", wanted)
    rows = rows_of(source, wanted.max_samples)
    if rows is not None:
        return _from_rows(rows, wanted)
    if not isinstance(source, str | os.PathLike):
        raise ValueError(
            f"images cannot be read from {type(source).__name__}; give a folder, a Hub id, a Dataset, or a "
            "list of pictures or of dictionaries with image and text"
        )
    name = os.fspath(source)
    for folder in (Path(name).expanduser(), bundled(name)):
        if folder is not None and folder.exists():
            return _from_folder(folder, wanted)
    name = RETIRED.get(name, name)
    if not re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", name):
        raise FileNotFoundError(
            f"image folder {name!r} not found: no folder {Path(name).absolute()}, none in the "
            f"bundled {DATA}, and it is not a Hub id of the form owner/name"
        )
    try:
        found = datasets.load_dataset(name, wanted.config_name, split="train", **kwargs)
    except (OSError, datasets.exceptions.DatasetNotFoundError) as error:
        raise FileNotFoundError(
            f"data set {name!r} not found: no folder {Path(name).absolute()}, and the Hub did not "
            f"give it: {first_line(error)}"
        ) from error
    return _from_dataset(found, name, wanted)


def _one_split(source):
    """What was given, where it is one data set."""
    if isinstance(source, datasets.DatasetDict | datasets.IterableDatasetDict):
        raise ValueError(
            f"{type(source).__name__} was given; pass one of its splits: {', '.join(map(str, source))}"
        )
    return source


def _from_folder(folder: Path, wanted: Wanted) -> datasets.Dataset:
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder} is a file; give the folder that holds the images")
    if (folder / "state.json").is_file() or (
        folder / "dataset_dict.json"
    ).is_file():  # written by save_to_disk
        found = datasets.load_from_disk(folder)
        found = (
            found["train"]
            if isinstance(found, datasets.DatasetDict) and "train" in found
            else _one_split(found)
        )
        return _from_dataset(found, str(folder), wanted)
    parquet = next(folder.rglob("*.parquet"), None)
    if parquet and (
        holds_pictures(parquet) or not image_files(folder)
    ):  # a data set as the Hub keeps it
        return _from_dataset(datasets.load_dataset(str(folder), split="train"), str(folder), wanted)
    train = next(
        (
            part
            for part in (folder / "train", folder / "training")
            if part.is_dir() and image_files(part)
        ),
        None,
    )
    if train and not caption_files.names_images(folder, ENDINGS):
        folder = train
    if wanted.prompt is not None:
        return _readable([(path, wanted.prompt) for path in image_files(folder)], folder)
    found = find_captions(folder, ENDINGS, wanted.caption_column)
    for note in found.notes:
        warnings.warn(note, stacklevel=4)
    pairs = found.pairs[: wanted.max_samples]
    empty = [os.path.relpath(path, folder) for path, text in pairs if not text.strip()]
    report_empty(empty, len(pairs), folder, wanted.allow_empty, found.look_alikes)
    return _readable(pairs, folder)


def _readable(pairs: list[tuple[Path, str]], folder: Path) -> datasets.Dataset:
    """The images that can be read, with their texts."""
    if not pairs:
        there = some(sorted(path.name for path in folder.iterdir()))
        raise FileNotFoundError(
            f"folder {folder} has no images; it needs .png, .jpg, .webp or the like"
            f"{'; it has: ' if there else ''}{there}"
        )
    problems = Problems(folder)
    rows = [
        {"image": problems.kept(os.path.relpath(path, folder), stored, path), "text": text}
        for path, text in pairs
    ]
    return _made(rows, problems)


def _from_rows(rows: Iterable, wanted: Wanted) -> datasets.Dataset:
    """Pictures given in memory."""
    problems, found = Problems("what was given"), []
    for number, row in enumerate(rows):
        picture, text = parts_of(row, number, wanted)
        found.append({"image": problems.kept(f"row {number}", kept, picture), "text": text})
    if not found:
        raise ValueError("what was given is empty; it needs at least one picture")
    if wanted.prompt is None:
        empty = [f"row {number}" for number, row in enumerate(found) if not row["text"].strip()]
        report_empty(empty, len(found), "what was given", wanted.allow_empty)
    return _made(found, problems)


def _made(rows: list[dict], problems: Problems) -> datasets.Dataset:
    read = [row for row in rows if row["image"] is not None]
    problems.report(len(read))
    return datasets.Dataset.from_list(read, features=FEATURES)


def _from_dataset(dataset: datasets.Dataset, name: str, wanted: Wanted) -> datasets.Dataset:
    dataset, columns = _with_pictures(dataset.with_format(None)), dataset.column_names
    pictures = [c for c, feature in dataset.features.items() if isinstance(feature, datasets.Image)]
    if not pictures or (wanted.image_column and wanted.image_column not in pictures):
        asked = f" {wanted.image_column!r}" if wanted.image_column else ""
        raise ValueError(
            f"{name} has no column of images{asked}; its columns are: {', '.join(columns[:12])}"
        )
    images = wanted.image_column or pictures[0]
    if wanted.max_samples is not None:
        dataset = dataset.select(range(min(wanted.max_samples, len(dataset))))
    if not len(dataset):
        raise ValueError(f"{name} is empty")
    texts = _texts(dataset, [c for c in columns if c != images], name, wanted)
    raw, rows, found, problems = (
        dataset.cast_column(images, datasets.Image(decode=False)),
        [],
        [],
        Problems(name),
    )
    for number, (row, text) in enumerate(zip(raw, texts, strict=True)):
        value = row[images] or {}
        made = problems.kept(f"row {number}", stored, value.get("path"), value.get("bytes"))
        if made:
            rows.append(number)
            found.append(
                (text, None if made["bytes"] is value.get("bytes") else made["bytes"])
            )  # not what it holds
    problems.report(len(rows))
    plain = dataset.select(rows).select_columns(images)
    return _as_found(plain if images == "image" else plain.rename_column(images, "image"), found)


def _with_pictures(dataset: datasets.Dataset) -> datasets.Dataset:
    """The data set; where it has no images, with its first column of files as images."""
    if len(dataset) and not any(
        isinstance(feature, datasets.Image) for feature in dataset.features.values()
    ):
        for name, value in dataset[0].items():
            if (
                isinstance(value, str)
                and os.path.splitext(value)[1].lower() in ENDINGS
                and os.path.isfile(value)
            ):
                return dataset.cast_column(name, datasets.Image())
    return dataset


def _texts(dataset: datasets.Dataset, others: list[str], name: str, wanted: Wanted) -> list[str]:
    """The caption of each row."""
    if wanted.prompt is not None:
        return [wanted.prompt] * len(dataset)
    column = wanted.column_of_captions(others, name)
    if column is None:
        return [""] * len(dataset)
    texts = [
        as_caption(text, f"{name}, row {number}") for number, text in enumerate(dataset[column])
    ]
    report_empty(
        [f"row {n}" for n, text in enumerate(texts) if not text.strip()],
        len(texts),
        name,
        wanted.allow_empty,
    )
    return texts


def _as_found(dataset: datasets.Dataset, found: list[tuple[str, bytes | None]]) -> datasets.Dataset:
    """A Dataset of images with their texts; those that had to be made plain are replaced by their new content."""
    dataset = dataset.add_column("text", [text for text, _ in found])
    if all(content is None for _, content in found):
        return dataset.cast(FEATURES)
    raw = dataset.cast_column("image", datasets.Image(decode=False))
    rows = [
        {
            "image": {"path": None, "bytes": content} if content else row["image"],
            "text": row["text"],
        }
        for row, (_, content) in zip(raw, found, strict=True)
    ]
    return datasets.Dataset.from_list(rows, features=FEATURES)
