"""Captioned images from folders, the Hub or memory, as a Dataset of RGB images and text."""

import os
import re
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import datasets
from PIL import UnidentifiedImageError

from lorabook.checks import first_line
from lorabook.images.caption_files import FolderCaptions, image_files
from lorabook.images.captions import as_caption, holds_images, some
from lorabook.images.pixels import ENDINGS, stored
from lorabook.images.rows import Wanted, rows_of
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

    Rotation from EXIF is applied, colour profiles are brought to sRGB, transparency is laid on
    white, and grey, palette, CMYK and 16-bit images become 8-bit RGB. Files that are no images are
    passed over; images that cannot be read are named in a warning, and so are images without a
    caption, and captions that contradict each other.

    Args:
        source: A folder, a bundled name ("creatures"), a Hub id, a Dataset, streaming or not, or
            images in memory: a list of images, of pairs or of dictionaries with image and text, a
            dictionary of columns, a DataFrame, a data set of torch; None is this machine's
            default. A folder's captions are in metadata.jsonl, .csv or .parquet, there or in
            folders below, in another list that names the images (captions.csv, sd-scripts'
            meta_cap.json …), or in a .txt, .caption or .json beside each image; or it is one that
            `save_to_disk` wrote.
        caption_column: The column of captions; None finds it.
        image_column: The column of images in a Dataset or in rows; None finds it.
        config_name: The Hub data set's configuration.
        max_samples: Take only the first ones.
        allow_empty_captions: True says that images without a caption are meant; False makes it an
            error where no image has one; None warns.
        **kwargs: Passed on to `datasets.load_dataset` (revision, cache_dir, token …).

    Returns:
        The Dataset, in the source's order (files without metadata: by name).

    Raises:
        FileNotFoundError: For a missing or empty folder or file that metadata names.
        ValueError: For captions that cannot be found or are not text, or if no image can be read.
    """
    source = world().data if source is None else source
    wanted = Wanted(image_column, caption_column, max_samples, allow_empty_captions)
    return _Loader(wanted, config_name, kwargs)(source)


def load_instance_images(
    source,
    prompt: str = "",
    *,
    caption_column: str | None = None,
    image_column: str | None = None,
    config_name: str | None = None,
    **kwargs,
) -> datasets.Dataset:
    """Images of one subject, or of one class, for DreamBooth: `image` (PIL, RGB) and `text` (str).

    Args:
        source: A folder, a bundled name ("subjects/patch_cat"), a Hub id, a Dataset or images in
            memory, as in `load_captioned_images`; hidden files and folders are passed over.
        prompt: The text of every image.
        caption_column: Gives each image a text of its own instead.
        image_column, config_name, **kwargs: As in `load_captioned_images`.

    Returns:
        The Dataset, by file name.

    Raises:
        FileNotFoundError: For a missing folder, or one without images.
        ValueError: If no image can be read.
    """
    if source is None:
        raise ValueError("no folder of images was given")
    prompt = None if caption_column else prompt
    wanted = Wanted(image_column, caption_column, allow_empty=False, prompt=prompt)
    return _Loader(wanted, config_name, kwargs)(source)


@dataclass
class _Loader:
    """Reads a source of any kind; `notes` are sentences to warn of when that is done."""

    wanted: Wanted
    config_name: str | None
    kwargs: dict
    notes: list[str] = field(default_factory=list)

    def __call__(self, source) -> datasets.Dataset:
        try:
            return self._load(source)
        finally:
            for note in self.notes:
                warnings.warn(note, stacklevel=3)

    def _load(self, source) -> datasets.Dataset:
        if isinstance(source, datasets.DatasetDict | datasets.IterableDatasetDict):
            raise ValueError(
                f"{type(source).__name__} was given; pass one of its splits: "
                f"{', '.join(map(str, source))}"
            )
        if isinstance(source, datasets.Dataset):
            return self._from_dataset(source, "the data set")
        if isinstance(source, str | os.PathLike):
            return self._from_name(os.fspath(source))
        return self._from_rows(rows_of(source, self.wanted.max_samples))

    def _from_name(self, name: str) -> datasets.Dataset:
        for folder in (Path(name).expanduser(), bundled(name)):
            if folder is not None and folder.exists():
                return self._from_folder(folder)
        name = RETIRED.get(name, name)
        if not re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", name):
            raise FileNotFoundError(
                f"image folder {name!r} not found: no folder {Path(name).absolute()}, none in the "
                f"bundled {DATA}, and it is not a Hub id of the form owner/name"
            )
        try:
            dataset = datasets.load_dataset(name, self.config_name, split="train", **self.kwargs)
        except (OSError, datasets.exceptions.DatasetNotFoundError) as error:
            raise FileNotFoundError(
                f"data set {name!r} not found: no folder {Path(name).absolute()}, and the Hub did "
                f"not give it: {first_line(error)}"
            ) from error
        return self._from_dataset(dataset, name)

    def _from_folder(self, folder: Path) -> datasets.Dataset:
        if not folder.is_dir():
            raise FileNotFoundError(f"{folder} is a file; give the folder that holds the images")
        if any((folder / name).is_file() for name in ("state.json", "dataset_dict.json")):
            dataset = datasets.load_from_disk(folder)
            splits = dataset if isinstance(dataset, datasets.DatasetDict) else {}
            return self._load(splits.get("train", dataset))
        parquet = next(folder.rglob("*.parquet"), None)
        if parquet and (holds_images(parquet) or not image_files(folder)):  # as the Hub keeps it
            dataset = datasets.load_dataset(str(folder), split="train")
            return self._from_dataset(dataset, str(folder))
        parts = (folder / "train", folder / "training")
        part = next((part for part in parts if part.is_dir() and image_files(part)), None)
        if part and not FolderCaptions(folder).lists_images():
            folder = part
        if self.wanted.prompt is None:
            captions = FolderCaptions(folder)
            pairs = captions.find(self.wanted.caption_column)[: self.wanted.max_samples]
            self.notes += captions.notes
            texts = {os.path.relpath(path, folder): text for path, text in pairs}
            self._check_captions(texts, folder, captions.look_alikes)
        else:
            pairs = [(path, self.wanted.prompt) for path in image_files(folder)]
        if not pairs:
            names = some(sorted(path.name for path in folder.iterdir()))
            raise FileNotFoundError(
                f"folder {folder} has no images; it needs .png, .jpg, .webp or the like; "
                f"it has: {names}"
            )
        images = ((os.path.relpath(path, folder), path) for path, _ in pairs)
        contents = [content for _, content in self._stored(images, folder)]
        return _dataset(contents, [text for _, text in pairs])

    def _from_rows(self, rows: Iterable) -> datasets.Dataset:
        """From images in memory."""
        texts = []

        def images() -> Iterator[tuple]:
            for number, row in enumerate(rows):
                image, text = self.wanted.image_and_text(row, number)
                texts.append(text)
                yield f"row {number}", image

        contents = [content for _, content in self._stored(images(), "what was given")]
        if not texts:
            raise ValueError("what was given is empty; it needs at least one picture")
        self._check_captions(_by_row(texts), "what was given")
        return _dataset(contents, texts)

    def _from_dataset(self, dataset: datasets.Dataset, name: str) -> datasets.Dataset:
        """From a Dataset, whose images stay stored where they are if they are plain RGB."""
        dataset = _with_images(dataset.with_format(None))
        columns = dataset.column_names
        images = [c for c, kind in dataset.features.items() if isinstance(kind, datasets.Image)]
        column = self.wanted.image_column or next(iter(images), None)
        if column not in images:
            asked = f" {self.wanted.image_column!r}" if self.wanted.image_column else ""
            raise ValueError(
                f"{name} has no column of images{asked}; its columns are: {', '.join(columns[:12])}"
            )
        if self.wanted.max_samples is not None:
            dataset = dataset.select(range(min(self.wanted.max_samples, len(dataset))))
        if not len(dataset):
            raise ValueError(f"{name} is empty")
        texts = [self.wanted.prompt or ""] * len(dataset)
        if self.wanted.prompt is None and (
            text := self.wanted.column_of_captions(columns, column, name)
        ):
            texts = [as_caption(t, f"{name}, row {n}") for n, t in enumerate(dataset[text])]
            self._check_captions(_by_row(texts), name)
        raw = dataset.select_columns(column).cast_column(column, datasets.Image(decode=False))
        raw = raw if column == "image" else raw.rename_column(column, "image")
        values = ((f"row {number}", row["image"] or {}) for number, row in enumerate(raw))
        stored_anew, readable = {}, []
        for number, (value, content) in enumerate(self._stored(values, name)):
            if content:
                readable.append(number)
            if content and content["bytes"] is not value["bytes"]:
                stored_anew[number] = content
        texts = [texts[number] for number in readable]
        if not stored_anew:
            return raw.select(readable).add_column("text", texts).cast(FEATURES)
        return _dataset([stored_anew.get(n) or raw[n]["image"] for n in readable], texts)

    def _stored(self, images: Iterable[tuple], where) -> Iterator[tuple]:
        """Each labelled image with what a Dataset stores of it, or None; then the notes."""
        count, unread, odd = 0, [], []
        for label, image in images:
            count, content = count + 1, None
            try:
                content, problem = stored(image)
                odd += [f"{label} ({problem})"] * bool(problem)
            except UnidentifiedImageError:
                unread.append(f"{label} (Pillow cannot open it; save it as PNG)")
            except Exception as error:  # a damaged file can make Pillow raise nearly anything
                unread.append(f"{label} ({first_line(error, 60)})")
            yield image, content
        if unread and len(unread) == count:
            raise ValueError(f"none of the {count} images in {where} can be read: {some(unread)}")
        if unread:
            self.notes.append(
                f"{len(unread)} image(s) in {where} cannot be read and are left out: "
                f"{some(unread, 20)}"
            )
        if odd:
            self.notes.append(
                f"{len(odd)} image(s) in {where} are taken with their colours as they are: "
                f"{some(odd)}"
            )

    def _check_captions(self, texts: dict[str, str], where, look_alikes=()) -> None:
        """Name the images without a caption, and the files that may hold captions."""
        empty, count = [label for label, text in texts.items() if not text.strip()], len(texts)
        if not empty or self.wanted.allow_empty or self.wanted.prompt is not None:
            return
        remedy = "write metadata.jsonl, or a .txt beside each, or say allow_empty_captions"
        if look_alikes and len(empty) == count:
            remedy += f"; these files look like captions: {some(look_alikes, 5)}"
        if len(empty) == count and self.wanted.allow_empty is not None:
            sentence = f"none of the {count} images in {where} has a caption; {remedy}"
            raise ValueError(sentence[:400])
        self.notes.append(
            f"{len(empty)} of {count} images in {where} have no caption and get an empty one: "
            f"{some(sorted(empty))}; {remedy}"
        )


def _by_row(texts: list[str]) -> dict[str, str]:
    return {f"row {number}": text for number, text in enumerate(texts)}


def _dataset(contents: Iterable[dict | None], texts: Iterable[str]) -> datasets.Dataset:
    """The images that can be read, with their texts."""
    pairs = zip(contents, texts, strict=True)
    rows = [{"image": content, "text": text} for content, text in pairs if content]
    return datasets.Dataset.from_list(rows, features=FEATURES)


def _with_images(dataset: datasets.Dataset) -> datasets.Dataset:
    """The data set; where it has no images, with its first column of files as images."""
    if not len(dataset) or any(isinstance(f, datasets.Image) for f in dataset.features.values()):
        return dataset
    for name, value in dataset[0].items():
        ending = os.path.splitext(value)[1].lower() if isinstance(value, str) else ""
        if ending in ENDINGS and os.path.isfile(value):
            return dataset.cast_column(name, datasets.Image())
    return dataset
