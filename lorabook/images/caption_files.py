"""The captions of a folder of images: in files that list them, or in a text beside each image."""

import json
import os
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path

from lorabook.images.captions import (
    READERS,
    as_caption,
    find_caption_column,
    read_list,
    read_text,
    some,
)
from lorabook.images.pixels import ENDINGS

METADATA = ("metadata.jsonl", "metadata.csv", "metadata.parquet")  # as datasets' imagefolder
BESIDE = (".txt", ".caption", ".json")  # the first that is there holds an image's caption
_OTHERS = ".cap .tags .ndjson .xlsx .xls .ods .arrow .yaml .yml .toml .xml .html .md .rtf .docx"
_TEXTS = {*READERS, *BESIDE, *_OTHERS.split(), ".zip", ".tar"}  # what may hold captions
_NO_CAPTIONS = ("readme", "license", "licence", "dataset_info", "dataset_dict", "state.json")


def image_files(folder: Path) -> list[Path]:
    """The image files below a folder, by name; nothing hidden."""
    return [path for path in _visible(folder) if path.suffix.lower() in ENDINGS]


def text_beside(image: Path) -> str:
    """The caption in a text beside an image, or ""."""
    texts = (_text_of(path) for path in _names_beside(image) if path.is_file())
    return next(filter(None, texts), "")


class FolderCaptions:
    """The images below a folder with their captions.

    A `metadata.jsonl`, `.csv` or `.parquet` (the first of them in each folder) decides alone for
    its folder and what is below, as `datasets` has it: what it does not list is left out.
    Elsewhere any list that names the images is read, then the text beside an image.

    `notes` are sentences on captions that contradict each other, on images left out and on files
    that are not there; `look_alikes` may hold captions and were not read as such, and why.
    """

    def __init__(self, folder: Path):
        self.folder, self.files = folder, _visible(folder)
        self.images = [path for path in self.files if path.suffix.lower() in ENDINGS]
        self.notes: list[str] = []
        self.look_alikes: list[str] = []
        self._texts: dict[Path, str] = {}
        self._sources: dict[Path, str] = {}
        self._clashes: dict[tuple[str, str], list[str]] = defaultdict(list)
        self._by_path, self._by_name = {}, defaultdict(set)
        for image in reversed(self.images):
            for name in (image, image.with_suffix("")):
                self._by_path[os.path.normpath(name)] = image
                self._by_name[name.name].add(image)

    def lists_images(self) -> bool:
        """Whether a list directly in the folder names images, so that it is about all of it."""
        paths = [path for path in self.files if path.parent == self.folder]
        if any(path.name in METADATA for path in paths):
            return True
        return any(self._read(path, None)[0] for path in paths if path.suffix.lower() in READERS)

    def find(self, asked: str | None) -> list[tuple[Path, str]]:
        """Images with their captions, or "": those of lists in their order, the others by name."""
        used, images = self._take_metadata(asked)
        problems = {}
        for path in self.files:
            if path.suffix.lower() in READERS and path not in used and images:
                problems[path] = self._take_list(path, asked, images)
        used |= {path for path, problem in problems.items() if not problem}
        order = dict.fromkeys([*self._texts, *images])
        used |= self._take_texts_beside(images, used)
        self.notes += [
            f"{len(names)} image(s) in {self.folder} have two captions; that of {source} is taken, "
            f"not that of {other}: {some(names)}"
            for (source, other), names in self._clashes.items()
        ]
        self.look_alikes = [
            self._name(path) + problems.get(path, "")
            for path in sorted(self.files, key=lambda path: path.suffix.lower() not in READERS)
            if path.suffix.lower() in _TEXTS
            and path not in used
            and not path.name.lower().startswith(_NO_CAPTIONS)
        ]
        return [(image, self._texts.get(image, "")) for image in order]

    def _take_metadata(self, asked: str | None) -> tuple[set[Path], dict[Path, None]]:
        """Add the captions of metadata; returns these, and the images not left out."""
        first = {}
        for name in reversed(METADATA):
            first |= {path.parent: path for path in self.files if path.name == name}
        metadata = sorted(first.values(), key=lambda path: (len(path.parts), path))
        for path in metadata:
            self._take(_read_metadata(path, asked), self._name(path))
        below = (image for image in self.images if not first.keys().isdisjoint(image.parents))
        out = {image: None for image in below if image not in self._texts}
        if out:
            self.notes.append(
                f"{len(out)} image(s) in {self.folder} are not listed in "
                f"{some(map(self._name, metadata))} and are left out: {some(map(self._name, out))}"
            )
        return set(metadata), {image: None for image in self.images if image not in out}

    def _take_list(self, path: Path, asked: str | None, images: dict[Path, None]) -> str:
        """Add the captions of a list; returns why it has none."""
        captions, missing, problem = self._read(path, asked)
        if not captions:
            return f" ({problem or 'names none of the images'})"
        self._take({i: text for i, text in captions.items() if i in images}, self._name(path))
        if missing:
            self.notes.append(
                f"{path} names {len(missing)} file(s) that are not there: {some(missing)}"
            )
        return ""

    def _name(self, path: Path) -> str:
        return os.path.relpath(path, self.folder)

    def _take(self, captions: dict[Path, str], source: str) -> None:
        """Add captions; of two for one image the first one stays."""
        for image, text in captions.items():
            if image not in self._texts:
                self._texts[image], self._sources[image] = text, source
            elif self._texts[image].split() != text.split():
                self._clashes[self._sources[image], source].append(self._name(image))

    def _read(self, path: Path, asked: str | None) -> tuple[dict[Path, str], list[str], str]:
        """Captions by image, the names that are no image's, and why the file cannot be read."""
        try:
            names, texts = read_list(path, asked)
        except (ValueError, OSError) as error:
            problem = str(error).removeprefix(str(path)).lstrip(", ")
            return {}, [], " ".join(problem.split())[:90]
        captions, missing = {}, []
        for name, text in zip(names, texts, strict=True):
            image = self._find(name.replace("\\", "/"), path.parent)
            if image is None:
                missing.append(name)
            elif text and isinstance(text[0] if isinstance(text, list) else text, str):
                captions.setdefault(image, as_caption(text, f"{path}, {name}"))
        return captions, missing, ""

    def _find(self, name: str, folder: Path) -> Path | None:
        """The image of this path, with or without its ending; else the only one of this name."""
        same = self._by_name.get(name.rsplit("/", 1)[-1], ())
        only = next(iter(same)) if len(same) == 1 else None
        return self._by_path.get(os.path.normpath(folder / name), only)

    def _take_texts_beside(self, images: Iterable[Path], used: set[Path]) -> set[Path]:
        """Add the captions in texts beside images; returns these texts."""
        paths = [path for path in self.files if path.suffix.lower() in BESIDE and path not in used]
        known = {str(path).casefold(): path for path in paths}
        known |= {str(path): path for path in paths}
        taken = set()
        for image in images:
            for name in map(str, _names_beside(image)):
                path = known.get(name) or known.get(name.casefold())
                if path and (text := _text_of(path)):
                    self._take({image: text}, f"the {path.suffix} beside it")
                    taken.add(path)
        return taken


def _visible(folder: Path) -> list[Path]:
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    return [p for p in paths if not any(s.startswith(".") for s in p.relative_to(folder).parts)]


def _names_beside(image: Path) -> list[Path]:
    return [
        path for e in BESIDE for path in (image.with_suffix(e), image.with_name(image.name + e))
    ]


def _text_of(path: Path) -> str:
    """The caption in an image's own text or JSON; "" in JSON that holds none."""
    text = read_text(path).strip()
    if path.suffix.lower() != ".json":
        return text
    try:
        entry = json.loads(text)
        return as_caption(entry[find_caption_column(entry, None, path)], str(path))
    except (ValueError, TypeError, KeyError):
        return ""


def _read_metadata(path: Path, asked: str | None) -> dict[Path, str]:
    """Captions by image; every image must be there and have a text."""
    names, texts = read_list(path, asked)
    missing = [name or "None" for name in names if not name or not (path.parent / name).is_file()]
    if missing:
        raise FileNotFoundError(
            f"{path} names {len(missing)} missing file(s): {some(missing)}; put them beside it or "
            "delete their lines"
        )
    return {
        path.parent / os.path.normpath(name): as_caption(text, f"{path}, {name}")
        for name, text in zip(names, texts, strict=True)
    }
