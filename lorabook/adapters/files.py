"""Adapter files: found, checked before anything is changed, and written whole or not at all."""
import json
import os
import re
from collections.abc import Mapping
from pathlib import Path

import torch
from huggingface_hub import HfApi, hf_hub_download, snapshot_download
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from lorabook.adapters.address import fetch_adapter
from lorabook.adapters.pickles import PICKLES, read_pickle
from lorabook.worlds import bundled

WEIGHT_NAME = "pytorch_lora_weights.safetensors"
METADATA_KEY = "lora_adapter_metadata"  # where diffusers keeps rank, alpha and target modules


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
    name = path_of(source)
    check_inside(name, weight_name, subfolder)
    if "://" in name:
        kept = {key: hub[key] for key in ("token", "cache_dir", "local_files_only") if hub.get(key)}
        return fetch_adapter(name, allow_pickle=allow_pickle, **kept)
    ready = bundled(f"adapters/{name}")
    for path in (Path(name).expanduser(), ready):
        if path is not None and path.is_file():
            return _no_pickle(path, allow_pickle)
        if path is not None and path.is_dir():
            folder = path / (subfolder or "")
            names = [p.name for p in folder.iterdir() if p.is_file()] if folder.is_dir() else []
            if path == ready or ready is None or any(n.endswith(".safetensors") for n in names):
                return folder / _choose(names, weight_name, folder, allow_pickle)
    if not re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", name):
        raise FileNotFoundError(f"adapter {brief(name)!r} not found: no file or folder {brief(Path(name).absolute())}, no "
                                "bundled adapter of that name, and it is not a Hub id of the form owner/name")
    return _from_hub(name, weight_name, subfolder, allow_pickle, hub)


def path_of(source) -> str:
    """The path, id or address that a source is, or that its `adapter` is. Raises ValueError for anything else."""
    try:
        return os.fspath(getattr(source, "adapter", source))
    except TypeError:
        raise ValueError(f"an adapter comes from a file, folder, Hub id, address, TrainingRun or weights by key, not from "
                         f"{source!r:.80}") from None


def check_inside(name: str, *inner: str | None) -> None:
    """Raise ValueError for a file or folder that is not inside the one it is looked for in."""
    for part in inner:
        if part and (Path(part).is_absolute() or ".." in Path(part).parts):
            raise ValueError(f"{brief(part)!r} climbs out of {brief(name)}; give a name inside it")


def brief(path, letters: int = 90) -> str:
    """A path for an error message: of a long one its end."""
    text = str(path)
    return text if len(text) <= letters else f"…{text[1 - letters:]}"


def _from_hub(repo_id: str, weight_name: str | None, subfolder: str | None, pickles: bool, hub: dict) -> Path:
    try:
        if weight_name is None:
            weight_name = _choose(_names_on_hub(repo_id, subfolder, hub), None, repo_id, pickles)
        return Path(hf_hub_download(repo_id, str(_no_pickle(Path(weight_name), pickles)), subfolder=subfolder, **hub))
    except (ValueError, FileNotFoundError) as error:
        if str(error).startswith(repo_id) or "pickle" in str(error):
            raise
        raise _not_given(repo_id, error) from error
    except Exception as error:  # no network: the class is that of whichever HTTP library huggingface_hub uses
        raise _not_given(repo_id, error) from error


def _names_on_hub(repo_id: str, subfolder: str | None, hub: dict) -> list[str]:
    """The files beside each other in a repository, or in its cached copy where that is all there is."""
    inside = f"{subfolder}/" if subfolder else ""
    try:
        if hub.get("local_files_only"):
            raise ConnectionError("local files only")
        info = HfApi(token=hub.get("token")).model_info(repo_id, revision=hub.get("revision"), timeout=10)
        names = [file.rfilename for file in info.siblings]
    except Exception:
        try:
            folder = Path(snapshot_download(repo_id, revision=hub.get("revision"), cache_dir=hub.get("cache_dir"),
                                            local_files_only=True))
        except OSError:
            folder = None
        if folder is None:
            raise
        names = [p.relative_to(folder).as_posix() for p in folder.rglob("*")]
    return [n.removeprefix(inside) for n in names if n.startswith(inside) and "/" not in n.removeprefix(inside)]


def _not_given(repo_id: str, error: Exception) -> FileNotFoundError:
    reason = " ".join(str(error).split())[:160] or type(error).__name__
    return FileNotFoundError(f"adapter {repo_id!r} not found: no file or folder {brief(Path(repo_id).absolute())}, and the "
                             f"Hub did not give it: {reason}")


def _choose(names: list[str], asked: str | None, where, pickles: bool = False) -> str:
    """The one adapter file among file names."""
    weights = sorted(n for n in names if n.endswith(".safetensors"))
    if asked or WEIGHT_NAME in weights:
        chosen = asked or WEIGHT_NAME
        if chosen not in names and not Path(where, chosen).is_file():
            raise FileNotFoundError(f"{where} has no file {chosen}; it has: {', '.join(sorted(names)[:8]) or 'none'}")
        _no_pickle(Path(chosen), pickles)
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


def _no_pickle(path: Path, allowed: bool = False) -> Path:
    if path.suffix.lower() in PICKLES and not allowed:
        raise ValueError(f"{brief(path)} is a pickle file, which can run code when it is opened; get it as .safetensors, or "
                         "give allow_pickle=True to read its weights and nothing else")
    return path


def read_adapter(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The weights of an adapter file and its metadata; of a pickle, where one was allowed, its weights alone.

    Raises: ValueError if the file is damaged or a weight is not finite.
    """
    if path.suffix.lower() in PICKLES:
        weights, metadata = read_pickle(path), {}
    else:
        try:
            with safe_open(path, "pt") as file:
                weights = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
                metadata = file.metadata() or {}
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{brief(path)} cannot be read as safetensors ({error}); cut short? Fetch it anew") from error
    check_finite(weights, brief(path))
    return weights, metadata


def check_finite(weights: Mapping[str, Tensor], where: str) -> None:
    """Raise ValueError if a weight is NaN or infinite."""
    if strange := [key for key, value in weights.items() if not isinstance(value, Tensor)]:
        raise ValueError(f"{where} holds something that is no tensor, for example {strange[0]!r:.80}")
    # 8-bit formats know no isfinite
    broken = [key for key, value in weights.items() if value.is_floating_point()
              and not (value.float() if value.element_size() == 1 else value).isfinite().all()]
    if broken:
        raise ValueError(f"{where} has weights that are not finite (NaN or infinite), for example {broken[0]:.120}; "
                         "its training failed, use an earlier checkpoint")


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
    flat = {f"{part}.{key}": _plain(value) for part, settings in config.items() for key, value in settings.items()}
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


def _plain(value):
    """The value as JSON knows it."""
    if isinstance(value, (set, frozenset)):
        return sorted(value)
    if isinstance(value, torch.dtype):
        return str(value)
    return getattr(value, "value", value)
