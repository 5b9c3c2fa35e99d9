"""Adapter files: found, checked before anything is changed, and written whole or not at all."""
import json
import os
import re
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import NamedTuple

import torch
from peft import LoraConfig
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from lorabook.adapters.address import fetch_adapter, shareable_address
from lorabook.adapters.file_kind import opened
from lorabook.adapters.layers import COMPONENTS
from lorabook.adapters.pickles import PICKLES, read_pickle
from lorabook.adapters.repository import Folder, Repository, hub_file
from lorabook.worlds import bundled

WEIGHT_NAME, PEFT_NAME = "pytorch_lora_weights.safetensors", "adapter_model.safetensors"
CONFIG_NAME = "adapter_config.json"  # PEFT's, beside its weights
METADATA_KEY = "lora_adapter_metadata"  # where diffusers keeps rank, alpha and target modules


class Place(NamedTuple):
    """Where an adapter's files lie: which folder or repository, where `inside` it, and the `file` that was named, if any."""

    files: Folder | Repository
    inside: str = ""
    file: str | None = None

    def beside(self, name: str) -> str:
        """The name of a file beside the adapter's own, by that of the folder or repository."""
        return (PurePosixPath(self.inside) / name).as_posix()


def find_adapter(source, *, weight_name: str | None = None, subfolder: str | None = None, allow_pickle: bool = False,
                 **hub) -> Path:
    """The local file of an adapter, downloaded where need be.

    Args:
        source: a .safetensors file, a folder with one, a bundled name ("creatures"), a Hub id, an https address, or
            anything with an `adapter` path, as a TrainingRun.
        weight_name, subfolder: which file, where there are several; inside the folder.
        allow_pickle: take an old .bin, .pt or .ckpt too.
        **hub: revision, token, cache_dir, local_files_only for `hf_hub_download`.
    Raises: FileNotFoundError, saying what was looked for and where; ValueError for a pickle file, several files, or a
        name that climbs out of its folder.
    """
    check_inside(path_of(source), weight_name)
    place = place_of(source, subfolder=subfolder, allow_pickle=allow_pickle, **hub)
    return place.files.get(weights_in(place, weight_name, allow_pickle))


def place_of(source, *, subfolder: str | None = None, allow_pickle: bool = False, **hub) -> Place:
    """Where an adapter's files lie; the arguments are those of `find_adapter`. A file with an address is fetched."""
    name = path_of(source)
    check_inside(name, subfolder)
    if "://" in name:
        kept = {key: hub[key] for key in ("token", "cache_dir", "local_files_only") if hub.get(key)}
        path = fetch_adapter(name, allow_pickle=allow_pickle, **kept)
        if asked := hub_file(name):
            files = Repository(asked["repo_id"], revision=asked["revision"], kept_first=True, **kept)
            return Place(files, PurePosixPath(asked["filename"]).parent.as_posix(), asked["filename"])
        return Place(Folder(path.parent), file=path.name)
    ready = bundled(f"adapters/{name}")
    for path in (Path(name).expanduser(), ready):
        if path is not None and path.is_file():
            return Place(Folder(path.parent), file=path.name)
        if path is not None and path.is_dir():
            place = Place(Folder(path), subfolder or "")
            if path == ready or ready is None or parts_in(place) or _weights(place.files.list(place.inside)):
                return place
    if not is_on_hub(name):
        path = brief(Path(shareable_address(name)).absolute())
        raise FileNotFoundError(f"adapter {brief(name)!r} not found: no file or folder {path}, no "
                                "bundled adapter of that name, and it is not a Hub id of the form owner/name")
    return Place(Repository(name, **hub), subfolder or "")


def weights_in(place: Place, weight_name: str | None = None, allow_pickle: bool = False) -> str:
    """The one adapter file of a place, by its name in the folder or repository."""
    if place.file:
        _no_pickle(Path(place.file), allow_pickle)
        return place.file
    where = brief(f"{place.files}/{place.inside}".strip("/") if place.inside else place.files)
    return place.beside(_choose(place.files.list(place.inside), weight_name, where, place, allow_pickle))


def parts_in(place: Place) -> dict[str, str]:
    """PEFT's files by component, where the place has a folder for each."""
    found = {part: place.beside(f"{part}/{PEFT_NAME}") for part in COMPONENTS
             if CONFIG_NAME in (names := place.files.list(place.beside(part))) and PEFT_NAME in names}
    return {} if place.file else found


def is_on_hub(name: str) -> bool:
    """Whether a name is that of a repository, and of no file or bundled adapter here."""
    return bool(re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", name)) and not (Path(name).exists() or bundled(f"adapters/{name}"))


def path_of(source) -> str:
    """The path, id or address that a source is, or that its `adapter` is. Raises ValueError for anything else."""
    try:
        return os.fsdecode(getattr(source, "adapter", source))
    except TypeError:
        raise ValueError(f"an adapter comes from a file, folder, Hub id, address, TrainingRun or weights by key, not from "
                         f"{source!r:.80}") from None


def check_inside(name: str, *inner: str | None) -> None:
    """Raise ValueError for a file or folder that is not inside the one it is looked for in."""
    for part in inner:
        if part and (Path(part).is_absolute() or ".." in Path(part).parts):
            raise ValueError(f"{brief(part)!r} climbs out of {brief(name)}; give a name inside it")


def brief(path, letters: int = 90) -> str:
    """A path or address for an error message: of a long one its end, of an address no query."""
    text = shareable_address(str(path))
    return text if len(text) <= letters else f"…{text[1 - letters:]}"


def _choose(names: list[str], asked: str | None, where: str, place: Place, pickles: bool = False) -> str:
    """The one adapter file among file names."""
    weights = _weights(names)
    if asked or WEIGHT_NAME in weights:
        chosen = asked or WEIGHT_NAME
        _no_pickle(Path(chosen), pickles)
        if chosen not in names and place.files.get(place.beside(chosen)) is None:
            raise FileNotFoundError(f"{where} has no file {chosen}; it has: {', '.join(sorted(names)[:8]) or 'none'}")
        return chosen
    if pickles and not weights:
        weights = sorted(n for n in names if n.endswith(PICKLES))
    if len(weights) == 1:
        return weights[0]
    if weights:
        raise ValueError(f"{where} has several adapter files, say which with weight_name: {', '.join(weights[:8])}")
    for name in names:
        _no_pickle(Path(name))
    raise FileNotFoundError(f"{where} has no .safetensors file")


def _weights(names: list[str]) -> list[str]:
    return sorted(name for name in names if name.endswith(".safetensors"))


def _no_pickle(path: Path, allowed: bool = False) -> Path:
    if path.suffix.lower() in PICKLES and not allowed:
        raise ValueError(f"{brief(path)} is a pickle file, which can run code when it is opened; get it as .safetensors, or "
                         "give allow_pickle=True to read its weights and nothing else")
    return path


def read_adapter(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The weights of an adapter file and its metadata; of a pickle, where one was allowed, its weights alone.

    Raises: ValueError if the file is none or damaged, or a weight is not finite.
    """
    if path.suffix.lower() in PICKLES:
        weights, metadata = read_pickle(path), {}
    else:
        with opened(path, brief(path)) as file:
            weights = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
            metadata = file.metadata() or {}
    return checked(weights, brief(path)), metadata


def checked(weights: Mapping[str, Tensor], where: str) -> dict[str, Tensor]:
    """The weights, those of 8 bits as floats, which can be computed with; ValueError if one is NaN, infinite or none."""
    if strange := [key for key, value in weights.items() if not isinstance(value, Tensor)]:
        raise ValueError(f"{where} holds something that is no tensor, for example {strange[0]!r:.80}")
    weights = {key: value.float() if value.is_floating_point() and value.element_size() == 1 else value
               for key, value in weights.items()}
    broken = [key for key, value in weights.items() if not value.isfinite().all()]
    if broken:
        raise ValueError(f"{where} has weights that are not finite (NaN or infinite), for example {broken[0]:.120}; "
                         "its training failed, use an earlier checkpoint")
    return weights


def write_adapter(path: str | os.PathLike, weights: Mapping[str, Tensor], *, config: dict, about: dict) -> Path:
    """Write an adapter file in diffusers' form; it appears whole or not at all.

    Args:
        path: the file.
        weights: tensors by diffusers key ("unet.….lora_A.weight").
        config: PEFT's LoraConfig by component, as {"unet": {"r": 4, "lora_alpha": 4, …}}; empty where the keys say it.
        about: what else the file should tell (base model, trigger words, training settings); kept as JSON.
    Returns: the path.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    flat = {f"{part}.{key}": value for part, settings in config.items() for key, value in _needed(settings).items()}
    metadata = {"format": "pt"} | ({METADATA_KEY: json.dumps(flat, sort_keys=True)} if flat else {})
    metadata |= {key: value if isinstance(value, str) else json.dumps(value) for key, value in about.items()}
    unfinished = path.with_name(path.name + ".part")
    try:
        save_tensors(unfinished, weights, metadata)
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)
    return path


def save_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: dict[str, str]) -> None:
    """Write a safetensors file; a disk that is full is an OSError, as with any other file."""
    try:
        save_file({key: value.detach().to("cpu").contiguous() for key, value in tensors.items()}, path, metadata)
    except SafetensorError as error:
        raise OSError(f"{path.name} cannot be written: {error}") from error


def _needed(settings: Mapping) -> dict:
    """The settings that differ from PEFT's defaults, and what diffusers looks for: an older PEFT refuses names it lacks."""
    usual = LoraConfig().to_dict()
    return {key: _plain(value) for key, value in settings.items() if key != "peft_version"
            and (key in ("r", "lora_alpha", "target_modules", "peft_type") or value != usual.get(key))}


def _plain(value):
    """The value as JSON knows it."""
    if isinstance(value, (set, frozenset)):
        return sorted(value)
    if isinstance(value, torch.dtype):
        return str(value)
    return getattr(value, "value", value)
