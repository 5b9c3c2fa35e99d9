"""Adapters from anywhere, read into the neutral form before any pipeline is touched."""

from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from torch import Tensor

from lorabook.lora.adapter import Adapter
from lorabook.lora.download import sha256_of  # noqa: F401
from lorabook.lora.file_kind import read_settings
from lorabook.lora.files import (  # noqa: F401
    Place,
    brief,
    check_inside,
    checked,
    find_adapter,
    parts_in,
    path_of,
    place_of,
    read_adapter,
    weights_in,
)
from lorabook.lora.formats.keys import CONFIG_NAME, METADATA_KEY, PEFT_NAME, WEIGHT_NAME
from lorabook.lora.formats.read import parse
from lorabook.lora.metadata import base_model_in, card_of, trigger_words_in

FIND = {"weight_name", "subfolder", "revision", "token", "cache_dir", "local_files_only"}


class Source(NamedTuple):
    """An adapter, the file or folder it came from (None for weights in memory), and what it may be called."""

    adapter: Adapter
    path: Path | None
    name: str
    weights: Mapping[str, Tensor]


def read_source(source, *, layers_per_block: int = 2, allow_pickle: bool = False, **find) -> Source:
    """Read an adapter from wherever it is.

    Args:
        source: a file, a folder (PEFT's too, with one component or several), a bundled name, a Hub id, an address,
            anything with an `adapter` path as a TrainingRun, weights by key, or an Adapter.
        layers_per_block: of the UNet; see `parse`.
        allow_pickle: read an old .bin, .pt or .ckpt too, its weights only.
        **find: weight_name, subfolder, revision, token, cache_dir, local_files_only.
    Raises: FileNotFoundError if there is no such adapter; ValueError for a pickle, a damaged file, weights that are not
        finite, or none of a LoRA.
    """
    if unknown := find.keys() - FIND:
        raise TypeError(
            f"unknown argument {min(unknown)!r}; an adapter is found by: {', '.join(sorted(FIND))}"
        )
    if isinstance(source, Adapter):
        return Source(source, None, "adapter", {})
    if isinstance(source, Mapping):
        source = checked(source, "the state dict")
        return Source(
            parse(source, layers_per_block=layers_per_block, where="the state dict"),
            None,
            "adapter",
            source,
        )
    weight_name = find.pop("weight_name", None)
    check_inside(path_of(source), weight_name)
    place = place_of(source, allow_pickle=allow_pickle, **find)
    parts = {} if weight_name else parts_in(place)
    files = parts or {None: weights_in(place, weight_name, allow_pickle)}
    weights, metadata, configs = {}, {}, {}
    for part, name in files.items():
        file = place.files.get(name)
        found, about = read_adapter(file)
        # the files of a folder by component do not say in their keys which one they are for
        weights |= (
            {f"{part}.{k.removeprefix('base_model.model.')}": v for k, v in found.items()}
            if part
            else found
        )
        metadata |= about
        if config := _config(place, name, found, about):
            configs[part] = config
    path = file.parent.parent if parts else file
    adapter = parse(
        weights, metadata, configs=configs, layers_per_block=layers_per_block, where=brief(path)
    )
    first = next(iter(configs.values()), None)
    base = base_model_in(metadata, first)
    card = None if base else card_of(place)
    adapter = Adapter(
        **vars(adapter)
        | {
            "format": "PEFT" if configs else adapter.format,
            "base_model": base or base_model_in(metadata, first, card),
            "trigger_words": trigger_words_in(metadata, card),
        }
    )
    return Source(adapter, path, _name_of(path_of(source), path), weights)


def _config(
    place: Place, name: str, weights: Mapping[str, Tensor], metadata: Mapping[str, str]
) -> dict | None:
    """PEFT's settings beside a file; None where there are none, or the file tells its own."""
    if METADATA_KEY in metadata or any(key.endswith(".alpha") for key in weights):
        return None
    file = place.files.get(PurePosixPath(name).with_name(CONFIG_NAME).as_posix())
    return read_settings(file, brief(file)) if file else None


def _name_of(source: str, path: Path) -> str:
    """The file's name; where that says nothing, the folder's or the Hub repository's."""
    if path.is_file() and path.name not in (WEIGHT_NAME, PEFT_NAME):
        return path.stem
    folder = path.parent if path.is_file() else path
    return folder.name if folder.parent.name != "snapshots" else source.split("/")[-1]
