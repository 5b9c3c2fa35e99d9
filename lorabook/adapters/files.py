"""Adapter files: found, checked before anything is changed, and written whole or not at all."""
import json
import os
import re
from collections.abc import Mapping
from pathlib import Path

import torch
from huggingface_hub import hf_hub_download, list_repo_files
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from lorabook.worlds import bundled

WEIGHT_NAME = "pytorch_lora_weights.safetensors"
METADATA_KEY = "lora_adapter_metadata"  # where diffusers keeps rank, alpha and target modules
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")


def find_adapter(source, *, weight_name: str | None = None, subfolder: str | None = None, **hub) -> Path:
    """The local file of an adapter, downloaded where need be.

    Args:
        source: a .safetensors file, a folder with one, a bundled name ("creatures"), a Hub id, or anything with an
            `adapter` path, as a TrainingRun.
        weight_name, subfolder: which file, where there are several.
        **hub: revision, token, cache_dir, local_files_only for `hf_hub_download`.
    Raises: FileNotFoundError, saying what was looked for and where; ValueError for a pickle file or several files.
    """
    name = os.fspath(getattr(source, "adapter", source))
    for path in (Path(name).expanduser(), bundled(f"adapters/{name}")):
        if path is not None and path.is_file():
            return _no_pickle(path)
        if path is not None and path.is_dir():
            folder = path / (subfolder or "")
            names = [p.name for p in folder.iterdir() if p.is_file()] if folder.is_dir() else []
            return folder / _choose(names, weight_name, folder)
    if not re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", name):
        raise FileNotFoundError(f"adapter {name!r} not found: no file or folder {Path(name).absolute()}, no bundled "
                                "adapter of that name, and it is not a Hub id of the form owner/name")
    return _from_hub(name, weight_name, subfolder, hub)


def _from_hub(repo_id: str, weight_name: str | None, subfolder: str | None, hub: dict) -> Path:
    try:
        if weight_name is None:
            asked = {key: hub[key] for key in ("revision", "token") if key in hub}
            inside = f"{subfolder}/" if subfolder else ""
            names = [n.removeprefix(inside) for n in list_repo_files(repo_id, **asked) if n.startswith(inside)]
            weight_name = _choose([n for n in names if "/" not in n], None, repo_id)
        return _no_pickle(Path(hf_hub_download(repo_id, weight_name, subfolder=subfolder, **hub)))
    except OSError as error:
        raise FileNotFoundError(f"adapter {repo_id!r} not found: no file or folder {Path(repo_id).absolute()}, and the "
                                f"Hub did not give it: {str(error).strip().splitlines()[0][:160]}") from error


def _choose(names: list[str], asked: str | None, where) -> str:
    """The one adapter file among file names."""
    weights = sorted(n for n in names if n.endswith(".safetensors"))
    if asked or WEIGHT_NAME in weights:
        chosen = asked or WEIGHT_NAME
        if chosen not in names:
            raise FileNotFoundError(f"{where} has no file {chosen}; it has: {', '.join(sorted(names)) or 'none'}")
        _no_pickle(Path(chosen))
        return chosen
    if len(weights) == 1:
        return weights[0]
    if weights:
        raise ValueError(f"{where} has several adapter files, say which with weight_name: {', '.join(weights)}")
    for name in names:
        _no_pickle(Path(name))
    raise FileNotFoundError(f"{where} has no .safetensors file")


def _no_pickle(path: Path) -> Path:
    if path.suffix in PICKLES:
        raise ValueError(f"{path} is a pickle file, which can run code when it is opened; get it as .safetensors")
    return path


def read_adapter(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The weights of an adapter file and its metadata.

    Raises: ValueError if the file is damaged or a weight is not finite.
    """
    try:
        with safe_open(path, "pt") as file:
            weights, metadata = {key: file.get_tensor(key) for key in file.keys()}, file.metadata() or {}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} cannot be read as safetensors ({error}); it may be cut short: fetch it anew") from error
    broken = [key for key, value in weights.items() if value.is_floating_point() and not value.isfinite().all()]
    if broken:
        raise ValueError(f"{path} has weights that are not finite (NaN or infinite), for example {broken[0]}; "
                         "its training failed, use an earlier checkpoint")
    return weights, metadata


def write_adapter(path: str | os.PathLike, weights: Mapping[str, Tensor], *, config: dict, about: dict) -> Path:
    """Write an adapter file in diffusers' form; it appears whole or not at all.

    Args:
        path: the file.
        weights: tensors by diffusers key ("unet.….lora_A.weight").
        config: PEFT's LoraConfig by component, as {"unet": {"r": 4, "lora_alpha": 4, …}}.
        about: what else the file should tell (base model, trigger words, training settings); kept as JSON.
    Returns: the path.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    flat = {f"{part}.{key}": _plain(value) for part, settings in config.items() for key, value in settings.items()}
    metadata = {"format": "pt", METADATA_KEY: json.dumps(flat, sort_keys=True)}
    metadata |= {key: value if isinstance(value, str) else json.dumps(value) for key, value in about.items()}
    unfinished = path.with_name(path.name + ".part")
    save_file({key: value.detach().to("cpu").contiguous() for key, value in weights.items()}, unfinished, metadata)
    os.replace(unfinished, path)
    return path


def _plain(value):
    """The value as JSON knows it."""
    if isinstance(value, (set, frozenset)):
        return sorted(value)
    if isinstance(value, torch.dtype):
        return str(value)
    return getattr(value, "value", value)
