"""Adapters from anywhere, read into the neutral form before any pipeline is touched."""

import hashlib
import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from torch import Tensor

from lorabook.lora.adapter import Adapter
from lorabook.lora.files import (
    PICKLES,
    brief,
    open_safetensors,
    read_pickle,
    read_settings,
    shareable_address,
)
from lorabook.lora.find import (
    Folder,
    Repository,
    check_arguments,
    file_in,
    files_by_component,
    path_of,
    place_of,
)
from lorabook.lora.formats.keys import CONFIG_NAME, METADATA_KEY, PEFT_NAME, WEIGHT_NAME
from lorabook.lora.formats.read import parse
from lorabook.lora.metadata import base_model_in, can_load, parse_json, trigger_words_in


class Source(NamedTuple):
    """An adapter, where it came from (None for weights in memory), and what it may be called."""

    adapter: Adapter
    path: Path | None
    name: str
    weights: Mapping[str, Tensor]


def read_source(
    source, *, layers_per_block: int = 2, weight_name=None, allow_pickle: bool = False, **find
) -> Source:
    """Read an adapter from wherever it is; `find` is as in `find_adapter`.

    The source may also be PEFT's folder of several components, weights by key, or an Adapter.
    ValueError for a pickle, a damaged file, weights that are not finite, or none of a LoRA.
    """
    check_arguments(find)
    if isinstance(source, Adapter):
        return Source(replace(source, source=None), None, "adapter", {})  # it may have changed
    if isinstance(source, Mapping):
        weights = checked(source, "the state dict")
        adapter = parse(weights, layers_per_block=layers_per_block, where="the state dict")
        return Source(adapter, None, "adapter", weights)
    place = place_of(source, weight_name, allow_pickle, **find)
    file_of = {} if weight_name else files_by_component(place)
    weights, metadata, configs = {}, {}, {}
    for component, name in (file_of or {None: file_in(place, weight_name, allow_pickle)}).items():
        path = place.get(name)
        tensors, about = read_adapter(path)
        metadata |= about
        # a file that says its own strength is not told it by what lies beside it
        config = place.files.get(PurePosixPath(name).with_name(CONFIG_NAME).as_posix())
        if METADATA_KEY not in about and not any(key.endswith(".alpha") for key in tensors):
            configs |= {component: read_settings(config)} if config else {}
        if component:  # which the keys of such a file do not say
            bare = {key.removeprefix("base_model.model."): value for key, value in tensors.items()}
            tensors = {f"{component}.{key}": value for key, value in bare.items()}
        weights |= tensors
    path = path.parent.parent if file_of else path
    adapter = parse(
        weights, metadata, configs=configs, layers_per_block=layers_per_block, where=brief(path)
    )
    config = next(iter(configs.values()), None)
    base = base_model_in(metadata, config)
    files = place.files.list() if place.file and isinstance(place.files, Folder) else []
    is_shelf = sum(name.endswith(".safetensors") for name in files) > 1  # whose README is no card
    card = None if base or is_shelf else place.card()
    about = {
        "format": "PEFT" if configs else adapter.format,
        "base_model": base or base_model_in(metadata, config, card),
        "trigger_words": trigger_words_in(metadata, card),
        "source": shareable_address(path_of(source)),
    }
    name = path.stem
    if path.is_dir() or path.name in (WEIGHT_NAME, PEFT_NAME):  # which say nothing
        folder = path if path.is_dir() else path.parent
        is_on_hub = folder.parent.name == "snapshots"
        name = path_of(source).split("/")[-1] if is_on_hub else folder.name
    return Source(Adapter(**vars(adapter) | about), path, name, weights)


def find_adapter(source, *, weight_name=None, allow_pickle: bool = False, **find) -> Path:
    """The local file of an adapter, downloaded where need be.

    Args:
        source: A .safetensors file, a folder with one, a bundled name ("creatures"), a Hub id, an
            https address, or anything with an `adapter` path, as a TrainingRun.
        weight_name: Which file, where there are several.
        allow_pickle: Take an old .bin, .pt or .ckpt too, its weights only.
        **find: subfolder, revision, token, cache_dir, local_files_only, as in `from_pretrained`.
    """
    place = place_of(source, weight_name, allow_pickle, **find)
    return place.get(file_in(place, weight_name, allow_pickle))


def base_model_of(source, *, weight_name: str | None = None, **find) -> str:
    """The model that an adapter was made for, to give to `load_pipeline`.

    Args:
        source: A file, a folder (PEFT's too), a bundled name, a Hub id, an address, or a
            TrainingRun. Of a Hub repository that says it in its card no weights are fetched.
        weight_name: Which file, where there are several.
        **find: As in `load_adapter`.

    Returns:
        A bundled name, a folder or a Hub id where there is one; else the name of a checkpoint.

    Raises:
        ValueError: Where nothing says it.
        FileNotFoundError: If there is no such adapter.
    """
    place = place_of(source, weight_name, **find)
    if weight_name:
        folder, weight_name = os.path.split(weight_name)
        place = place._replace(inside=place.beside(folder))
    card = place.card()
    name = base_model_in({}, None, card)
    if isinstance(place.files, Repository) and name and can_load(name):
        return name
    names = (CONFIG_NAME, f"unet/{CONFIG_NAME}", f"transformer/{CONFIG_NAME}")
    configs = (parse_json(place.text(place.beside(name))) for name in names)
    config = next(filter(None, configs), {})
    metadata: Mapping[str, str] = {}
    try:
        path = place.get(file_in(place, weight_name))
    except (ValueError, FileNotFoundError):
        if not base_model_in({}, config, card):
            raise
    else:
        with open_safetensors(path) as file:
            metadata = file.metadata() or {}
    if name := base_model_in(metadata, config, card):
        return name
    raise ValueError(
        f"adapter {brief(path_of(source))} does not say which model it was made for, neither in "
        "its metadata nor in adapter_config.json or README.md; give load_pipeline that model"
    )


def read_adapter(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The weights of an adapter file and its metadata, which a pickle has none of."""
    if path.suffix.lower() in PICKLES:
        return checked(read_pickle(path), brief(path)), {}
    with open_safetensors(path) as file:
        weights = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        return checked(weights, brief(path)), file.metadata() or {}


def checked(weights: Mapping[str, Tensor], where: str) -> dict[str, Tensor]:
    """The weights, those of 8 bits as floats; ValueError for what is not finite, or no tensor."""
    if others := [key for key, value in weights.items() if not isinstance(value, Tensor)]:
        raise ValueError(f"{where} holds something that is no tensor: {others[0]!r:.80}")
    weights = {
        key: value.float() if value.is_floating_point() and value.element_size() == 1 else value
        for key, value in weights.items()
    }
    if broken := [key for key, value in weights.items() if not value.isfinite().all()]:
        raise ValueError(
            f"{where} has weights that are not finite (NaN or infinite), for example "
            f"{broken[0]:.120}; its training failed, use an earlier checkpoint"
        )
    return weights


def sha256_of(path: Path) -> str:
    """The SHA-256 of a file's content, as CivitAI and the Hub show it beside a file."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
