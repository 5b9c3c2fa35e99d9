"""Where an adapter's files lie: in a folder here, in a repository on the Hub, or at an address."""

import os
import re
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import NamedTuple
from urllib.parse import unquote, urlsplit

from huggingface_hub import (
    HfApi,
    constants,
    hf_hub_download,
    snapshot_download,
    try_to_load_from_cache,
)

from lorabook.checks import listed
from lorabook.lora.download import checked_address, fetch_adapter
from lorabook.lora.files import PICKLES, brief, check_no_pickle, shareable_address
from lorabook.lora.formats.keys import COMPONENTS, CONFIG_NAME, PEFT_NAME, WEIGHT_NAME
from lorabook.worlds import bundled

FIND = {"subfolder", "revision", "token", "cache_dir", "local_files_only"}
SECONDS = 10  # for the Hub to say what a repository holds
_HUB_FILE = re.compile(
    r"/([\w.-]+/[\w.-]+)/(?:resolve|blob)/(refs/(?:pr|convert)/[^/]+|[^/]+)/(.+)"
)


class Folder:
    """The files of a folder on this machine."""

    def __init__(self, path: Path):
        self.path = path

    def __str__(self) -> str:
        return str(self.path)

    def list(self, inside: str = "") -> list[str]:
        """The names of the files in a folder of it; not of those further down."""
        folder = self.path / inside
        paths = folder.iterdir() if folder.is_dir() else ()
        return sorted(path.name for path in paths if path.is_file())

    def get(self, name: str) -> Path | None:
        """The file of this name; None where there is none."""
        path = self.path / name
        return path if path.is_file() else None


class Repository:
    """The files of a repository on the Hub, or of its cached copy where the Hub is out of reach.

    The Hub is asked once and with a time limit for all that there is; its client alone would try
    each file for half a minute. With `cache_first` a file in the cache is not asked for at all.
    """

    def __init__(self, repo_id: str, *, cache_first: bool = False, **hub):
        self.repo_id, self.cache_first, self.hub = repo_id, cache_first, hub

    def __str__(self) -> str:
        return self.repo_id

    @cached_property
    def names(self) -> frozenset[str]:
        """All its files, with their folders."""
        try:
            if self.hub.get("local_files_only"):
                raise ConnectionError("local_files_only was given, and the cache does not have it")
            info = HfApi(token=self.hub.get("token")).model_info(
                self.repo_id, revision=self.hub.get("revision"), timeout=SECONDS
            )
            return frozenset(file.rfilename for file in info.siblings or ())
        except Exception as error:  # of whichever HTTP library huggingface_hub uses
            self.hub["local_files_only"] = True
            try:
                folder = Path(snapshot_download(self.repo_id, **self.hub))
            except Exception:
                raise _not_given(f"adapter {self.repo_id!r}", error) from None
            paths = (path for path in folder.rglob("*") if path.is_file())
            return frozenset(path.relative_to(folder).as_posix() for path in paths)

    def list(self, inside: str = "") -> list[str]:
        """As `Folder.list`."""
        start = f"{inside.strip('/')}/".removeprefix("/")
        names = (name.removeprefix(start) for name in self.names if name.startswith(start))
        return sorted(name for name in names if "/" not in name)

    def get(self, name: str) -> Path | None:
        """As `Folder.get`; it is downloaded where need be."""
        if self.cache_first:
            place = {key: self.hub.get(key) for key in ("cache_dir", "revision")}
            path = try_to_load_from_cache(self.repo_id, name, **place)
            if isinstance(path, str):
                return Path(path)
        if name not in self.names:
            return None
        try:
            return Path(hf_hub_download(self.repo_id, name, **self.hub))
        except Exception as error:
            raise _not_given(f"{name} of {self.repo_id}", error) from None


class Place(NamedTuple):
    """A folder or repository, where `inside` it an adapter lies, and the `file` if one is named."""

    files: Folder | Repository
    inside: str = ""
    file: str | None = None

    def beside(self, name: str) -> str:
        """The name in the folder or repository of what lies beside the adapter's own file."""
        return (PurePosixPath(self.inside) / name).as_posix()

    def get(self, name: str) -> Path:
        """The local file of a name in the folder or repository."""
        if path := self.files.get(name):
            return path
        raise _not_given(f"{name} of {self.files}", "no such file")

    def text(self, name: str) -> str | None:
        """The text of a file; None where there is none, or it is not to be had."""
        try:
            path = self.files.get(name)
        except FileNotFoundError:
            return None
        return path and path.read_text(encoding="utf-8", errors="replace")

    def card(self) -> str | None:
        """The adapter's model card."""
        return self.text(self.beside("README.md")) or self.text("README.md")


def path_of(source) -> str:
    """The path, id or address that a source is, or that its `adapter` is."""
    try:
        return os.fsdecode(getattr(source, "adapter", source))
    except TypeError:
        raise ValueError(
            "an adapter comes from a file, folder, Hub id, address, TrainingRun or weights by key, "
            f"not from {source!r:.80}"
        ) from None


def check_arguments(find: Mapping) -> None:
    """Raise TypeError for arguments that find no adapter."""
    if unknown := find.keys() - FIND:
        names = ", ".join(sorted({"weight_name", *FIND}))
        raise TypeError(f"unknown argument {min(unknown)!r}; an adapter is found by: {names}")


def place_of(
    source, weight_name: str | None, allow_pickle: bool = False, *, subfolder=None, **hub
) -> Place:
    """Where an adapter's files lie; a file with an address is fetched. See `find_adapter`."""
    check_arguments(hub)
    name = path_of(source)
    for inner in (weight_name, subfolder):
        if inner and (Path(inner).is_absolute() or ".." in Path(inner).parts):
            raise ValueError(f"{brief(inner)!r} climbs out of {brief(name)}; give a name inside it")
    if "://" in name:
        hub.pop("revision", None)  # an address has its own
        if file := hub_file(checked_address(name)):
            repo_id, revision, file = file
            repository = Repository(repo_id, revision=revision, cache_first=True, **hub)
            return Place(repository, PurePosixPath(file).parent.as_posix(), file)
        path = fetch_adapter(name, allow_pickle=allow_pickle, **hub)
        return Place(Folder(path.parent), file=path.name)
    ready = bundled(f"adapters/{name}")
    for path in filter(None, (Path(name).expanduser(), ready)):
        if path.is_file():
            return Place(Folder(path.parent), file=path.name)
        if path.is_dir():
            place = Place(Folder(path), subfolder or "")
            weights = [n for n in place.files.list(place.inside) if n.endswith(".safetensors")]
            # a folder without weights does not hide a bundled adapter of its name
            if ready in (None, path) or weights or files_by_component(place):
                return place
    if not re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", name) or Path(name).exists():
        path = brief(os.path.abspath(shareable_address(name)))
        raise FileNotFoundError(
            f"adapter {brief(name)!r} not found: no file or folder {path}, no bundled adapter of "
            "that name, and it is not a Hub id of the form owner/name"
        )
    return Place(Repository(name, **hub), subfolder or "")


def file_in(place: Place, weight_name: str | None = None, allow_pickle: bool = False) -> str:
    """The one adapter file of a place, by its name in the folder or repository."""
    if place.file:
        check_no_pickle(place.file, brief(f"{place.files}/{place.file}"), allow_pickle)
        return place.file
    where = brief(f"{place.files}/{place.inside}" if place.inside else str(place.files))
    names = place.files.list(place.inside)
    weights = [name for name in names if name.endswith(".safetensors")]
    if name := weight_name or (WEIGHT_NAME if WEIGHT_NAME in weights else None):
        check_no_pickle(name, brief(name), allow_pickle)
        if name not in names and place.files.get(place.beside(name)) is None:
            raise FileNotFoundError(
                f"{where} has no file {name}; it has: {', '.join(names[:8]) or 'none'}"
            )
        return place.beside(name)
    if allow_pickle and not weights:
        weights = [name for name in names if name.endswith(PICKLES)]
    if len(weights) > 1:
        raise ValueError(
            f"{where} has several adapter files, say which with weight_name: {listed(weights, 8)}"
        )
    for name in () if weights else names:
        check_no_pickle(name, name, allow_pickle)
    if not weights:
        raise FileNotFoundError(f"{where} has no .safetensors file")
    return place.beside(weights[0])


def files_by_component(place: Place) -> dict[str, str]:
    """PEFT's files by component, where the place has a folder for each."""
    files = {}
    for component in () if place.file else COMPONENTS:
        if {CONFIG_NAME, PEFT_NAME} <= {*place.files.list(place.beside(component))}:
            files[component] = place.beside(f"{component}/{PEFT_NAME}")
    return files


def hub_file(url: str) -> tuple[str, str, str] | None:
    """Repository, revision and file of a file's or its page's address on the Hub, else None."""
    parts = urlsplit(url)
    match = _HUB_FILE.fullmatch(parts.path)
    hosts = ("huggingface.co", "hf.co", urlsplit(constants.ENDPOINT).netloc)
    if not match or parts.netloc not in hosts:
        return None
    repo_id, revision, name = map(unquote, match.groups())
    return repo_id, revision, name


def _not_given(name: str, error: Exception | str) -> FileNotFoundError:
    reason = " ".join(str(error).split())[:160] or type(error).__name__
    return FileNotFoundError(f"{name} not found: the Hub did not give it: {reason}")
