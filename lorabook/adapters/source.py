"""Adapters from anywhere, read into the neutral form before any pipeline is touched."""
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from huggingface_hub import HfApi, hf_hub_download, snapshot_download
from torch import Tensor

from lorabook.adapters.about import base_model_in, is_on_hub, reader_beside, trigger_words_in
from lorabook.adapters.adapter import Adapter
from lorabook.adapters.files import WEIGHT_NAME, brief, check_finite, check_inside, find_adapter, path_of, read_adapter
from lorabook.adapters.formats.keys import take_apart
from lorabook.adapters.formats.read import parse
from lorabook.adapters.layers import COMPONENTS

CONFIG_NAME = "adapter_config.json"
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
        raise TypeError(f"unknown argument {min(unknown)!r}; an adapter is found by: {', '.join(sorted(FIND))}")
    if isinstance(source, Adapter):
        return Source(source, None, "adapter", {})
    if isinstance(source, Mapping):
        check_finite(source, "the state dict")
        return Source(parse(source, layers_per_block=layers_per_block, where="the state dict"), None, "adapter", source)
    source = path_of(source)
    check_inside(source, find.get("subfolder"), find.get("weight_name"))
    parts = _parts(source, find)
    path = next(iter(parts.values())).parent.parent if parts else find_adapter(source, allow_pickle=allow_pickle, **find)
    weights, metadata, configs = {}, {}, {}
    for part, file in (parts or {None: path}).items():
        found, about = read_adapter(file)
        config = _config(file.parent)
        # the files of a folder by component do not say in their keys which one they are for
        weights |= {f"{part}.{k.removeprefix('base_model.model.')}": v for k, v in found.items()} if part else found
        metadata |= about
        if config:
            configs[part or _component(found)] = config
    adapter = parse(weights, metadata, configs=configs or None, layers_per_block=layers_per_block, where=brief(path))
    first = next(iter(configs.values()), None)
    base = base_model_in(metadata, first)
    card = None if base or "://" in source else _card(source, find)
    adapter = Adapter(**vars(adapter) | {
        "format": "PEFT" if configs else adapter.format, "base_model": base or base_model_in(metadata, first, card),
        "trigger_words": trigger_words_in(metadata, card)})
    return Source(adapter, path, _name_of(source, path), weights)


def _card(source: str, find: Mapping) -> str | None:
    """The model card beside it; a README in a folder of many adapters is none."""
    folder = Path(source).expanduser().parent
    if Path(source).expanduser().is_file() and len(list(folder.glob("*.safetensors"))) > 1:
        return None
    hub = {key: find.get(key) for key in ("token", "revision", "cache_dir", "local_files_only")}
    return reader_beside(source, hub)("README.md")


def _parts(source: str, find: Mapping) -> dict[str, Path]:
    """PEFT's files by component, where a folder or repository holds a folder for each."""
    if find.get("weight_name"):
        return {}
    folder = Path(source).expanduser() / (find.get("subfolder") or "")
    if not folder.exists() and is_on_hub(source) and not find.get("subfolder"):
        folder = _peft_snapshot(source, find) or folder
    found = {part: folder / part / "adapter_model.safetensors" for part in COMPONENTS
             if (folder / part / CONFIG_NAME).is_file()}
    return {part: file for part, file in found.items() if file.is_file()}


def _peft_snapshot(repo_id: str, find: Mapping) -> Path | None:
    """The Hub's copy of PEFT's files by component, or None where there are none or the Hub is out of reach."""
    hub = {key: find.get(key) for key in ("revision", "token", "cache_dir", "local_files_only")}
    try:
        if hub["local_files_only"]:
            return Path(snapshot_download(repo_id, **hub))
        info = HfApi(token=hub["token"]).model_info(repo_id, revision=hub["revision"], timeout=10)
        wanted = [name for name in (file.rfilename for file in info.siblings)
                  if re.fullmatch(rf"({'|'.join(COMPONENTS)})/adapter_(config\.json|model\.safetensors)", name)]
        files = [Path(hf_hub_download(repo_id, name, **hub)) for name in wanted]
        return files[0].parent.parent if files else None
    except Exception:  # whatever is wrong, finding the single file says it better
        return None


def _config(folder: Path) -> dict | None:
    try:
        return json.loads((folder / CONFIG_NAME).read_text()) if (folder / CONFIG_NAME).is_file() else None
    except ValueError as error:
        raise ValueError(f"{folder / CONFIG_NAME} is no JSON ({error}); fetch it anew") from error


def _component(weights: Mapping[str, Tensor]) -> str:
    return next((apart.component for key in weights if (apart := take_apart(key))), "unet")


def _name_of(source: str, path: Path) -> str:
    """The file's name; where that says nothing, the folder's or the Hub repository's."""
    if path.is_file() and path.name not in (WEIGHT_NAME, "adapter_model.safetensors"):
        return path.stem
    folder = path.parent if path.is_file() else path
    return folder.name if folder.parent.name != "snapshots" else source.split("/")[-1]
