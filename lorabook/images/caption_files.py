"""The captions of a folder of pictures: in files that list them, or in a text beside each picture."""

import json
import os
from collections import defaultdict
from collections.abc import Container
from dataclasses import dataclass, field
from pathlib import Path

from lorabook.images.caption_lists import LISTS, METADATA, read_list, read_text
from lorabook.images.caption_words import as_caption, find_caption_column, first_line, some

BESIDE = (".txt", ".caption", ".json")  # the first that is there is a picture's caption
_TEXTS = (
    *LISTS,
    *BESIDE,
    ".cap",
    ".tags",
    ".ndjson",
    ".xlsx",
    ".xls",
    ".ods",
    ".arrow",
    ".yaml",
    ".yml",
    ".toml",
    ".xml",
    ".html",
    ".md",
    ".rtf",
    ".docx",
    ".tar",
    ".zip",
)
_NO_CAPTIONS = ("readme", "license", "licence", "dataset_info", "dataset_dict", "state.json")


@dataclass
class Captions:
    """What a folder says of its pictures.

    Attributes:
        pairs: pictures with their captions, those of lists in their order, the others by name; "" where there is none.
        notes: sentences on captions that contradict each other, on pictures left out, on files that are not there.
        look_alikes: files that may hold captions and were not read as such, with the reason where there is one.
    """

    pairs: list[tuple[Path, str]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    look_alikes: list[str] = field(default_factory=list)


def image_files(folder: Path, endings: Container[str]) -> list[Path]:
    """The files below a folder with such endings, by name; nothing hidden."""
    return [path for path in _visible(folder) if path.suffix.lower() in endings]


def names_images(folder: Path, endings: Container[str]) -> bool:
    """Whether a list directly in the folder names pictures, so that it is about the folder as a whole."""
    if any((folder / name).is_file() for name in METADATA):
        return True
    pictures = _Pictures(image_files(folder, endings))
    return any(
        _tolerant(path, pictures, None)[0]
        for path in sorted(folder.iterdir())
        if path.suffix.lower() in LISTS
    )


def text_beside(picture: Path) -> str:
    """The caption in a text beside a picture, or ""."""
    texts = (
        Path(name)
        for ending in BESIDE
        for name in (picture.with_suffix(ending), f"{picture}{ending}")
    )
    return next(filter(None, (_beside(text) for text in texts if text.is_file())), "")


def find_captions(folder: Path, endings: Container[str], asked: str | None) -> Captions:
    """The pictures below a folder with their captions.

    A `metadata.jsonl`, `.csv` or `.parquet` (the first of them in each folder) decides alone for its folder and what is
    below, as `datasets` has it: what it does not list is left out. Elsewhere any list that names the pictures is
    read, then the text beside a picture.

    Args:
        endings: of the files that are pictures.
        asked: the column of captions in lists; None finds it.
    Raises: FileNotFoundError for a file that metadata names but is not there; ValueError for metadata without captions.
    """
    files = _visible(folder)
    pictures = _Pictures([path for path in files if path.suffix.lower() in endings])
    search = _Search(folder, pictures)
    present = {
        path.parent: path for name in reversed(METADATA) for path in files if path.name == name
    }
    metadata = sorted(present.values(), key=lambda path: (len(path.parts), path))
    for path in metadata:
        search.take(_strict(path, asked), path)
    search.leave_out_unlisted(metadata)
    for path in files:
        if path.suffix.lower() in LISTS and path not in metadata and pictures.paths:
            search.take_list(path, asked)
    listed = dict(search.texts)
    search.take_beside([path for path in files if path not in search.read])
    rest = [path for path in pictures.paths if path not in search.left_out and path not in listed]
    used = {*metadata, *search.read}
    alike = [
        path
        for path in sorted(files, key=lambda path: path.suffix.lower() not in LISTS)
        if path.suffix.lower() in _TEXTS
        and path not in used
        and not path.name.lower().startswith(_NO_CAPTIONS)
    ]
    return Captions(
        [(path, search.texts.get(path, "")) for path in (*listed, *rest)],
        search.notes(),
        [search.named(path) + search.problems.get(path, "") for path in alike],
    )


class _Pictures:
    """The pictures of a folder, found by what lists call them."""

    def __init__(self, paths: list[Path]):
        self.paths, self._whole, self._last = paths, {}, defaultdict(set)
        for path in reversed(paths):
            for name in (path, path.with_suffix("")):
                self._whole[os.path.normpath(name)] = path
                self._last[name.name].add(path)

    def find(self, name: str, folder: Path) -> Path | None:
        """The picture of this path, with or without its ending; else the only one of this name in any folder."""
        name = name.replace("\\", "/")
        same = self._last.get(name.rsplit("/", 1)[-1], ())
        return self._whole.get(os.path.normpath(folder / name)) or (
            next(iter(same)) if len(same) == 1 else None
        )


class _Search:
    """Captions found so far; the first one found stays."""

    def __init__(self, folder: Path, pictures: _Pictures):
        self.folder, self.pictures, self.texts, self.left_out, self.read = (
            folder,
            pictures,
            {},
            set(),
            set(),
        )
        self.problems, self._of, self._clashes, self._notes = {}, {}, defaultdict(list), []

    def named(self, path: Path) -> str:
        return os.path.relpath(path, self.folder)

    def take(self, captions: dict[Path, str], source: Path, label: str = "") -> None:
        self.read.add(source)
        label = label or self.named(source)
        for picture, text in captions.items():
            if picture in self.texts and self.texts[picture].split() != text.split():
                self._clashes[self._of[picture], label].append(self.named(picture))
            elif picture not in self.left_out and picture not in self.texts:
                self.texts[picture], self._of[picture] = text, label

    def leave_out_unlisted(self, metadata: list[Path]) -> None:
        folders = {path.parent for path in metadata}
        out = [
            p
            for p in self.pictures.paths
            if p not in self.texts and not folders.isdisjoint(p.parents)
        ]
        self.left_out = set(out)
        if out:
            self._notes.append(
                f"{len(out)} image(s) in {self.folder} are not listed in "
                f"{some(map(self.named, metadata))} and are left out: {some(map(self.named, out))}"
            )

    def take_list(self, path: Path, asked: str | None) -> None:
        captions, missing, problem = _tolerant(path, self.pictures, asked)
        if not captions:
            self.problems[path] = f" ({problem or 'names none of the images'})"
            return
        self.take(captions, path)
        if missing:
            self._notes.append(
                f"{path} names {len(missing)} file(s) that are not there: {some(missing)}"
            )

    def take_beside(self, files: list[Path]) -> None:
        texts = {str(path).casefold(): path for path in files if path.suffix.lower() in BESIDE}
        texts |= {str(path): path for path in texts.values()}
        for ending in BESIDE:
            for picture in self.pictures.paths:
                for name in (f"{picture.with_suffix('')}{ending}", f"{picture}{ending}"):
                    path = texts.get(name) or texts.get(name.casefold())
                    text = _beside(path) if path else ""
                    if text:
                        self.take({picture: text}, path, f"the {path.suffix} beside it")

    def notes(self) -> list[str]:
        return self._notes + [
            f"{len(names)} image(s) in {self.folder} have two captions; that of {first} is taken, not "
            f"that of {other}: {some(names)}"
            for (first, other), names in self._clashes.items()
        ]


def _visible(folder: Path) -> list[Path]:
    return sorted(
        path
        for path in folder.rglob("*")
        if path.is_file()
        and not any(part.startswith(".") for part in path.relative_to(folder).parts)
    )


def _strict(metadata: Path, asked: str | None) -> dict[Path, str]:
    """Captions by picture; every picture must be there and have a text."""
    names, texts = read_list(metadata, asked)
    missing = [
        name or "None" for name in names if not name or not (metadata.parent / name).is_file()
    ]
    if missing:
        raise FileNotFoundError(
            f"{metadata} names {len(missing)} missing file(s): {some(missing)}; put them beside "
            "it or delete their lines"
        )
    return {
        metadata.parent / os.path.normpath(name): as_caption(text, f"{metadata}, {name}")
        for name, text in zip(names, texts, strict=True)
    }


def _tolerant(
    path: Path, pictures: _Pictures, asked: str | None
) -> tuple[dict[Path, str], list[str], str]:
    """Captions by picture, the names that are no picture's, and why there is nothing in the file."""
    try:
        names, texts = read_list(path, asked)
    except (ValueError, OSError) as error:
        return {}, [], first_line(error).removeprefix(f"{path} ").removeprefix(f"{path}, ")[:90]
    found, missing = {}, []
    for name, text in zip(names, texts, strict=True):
        picture = pictures.find(name, path.parent)
        if picture is None:
            missing.append(name)
        elif text and isinstance(text[0] if isinstance(text, list) else text, str):
            found.setdefault(picture, as_caption(text, f"{path}, {name}"))
    return found, missing, ""


def _beside(path: Path) -> str:
    """The caption in a text of a picture's own; "" in JSON that holds none."""
    text = read_text(path).strip()
    if path.suffix.lower() != ".json":
        return text
    try:
        told = json.loads(text)
        return as_caption(told[find_caption_column(told, None, path)], str(path))
    except (ValueError, TypeError, KeyError):
        return ""
