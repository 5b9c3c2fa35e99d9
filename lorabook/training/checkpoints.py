"""Checkpoints: written beside and renamed whole, found again, and put back to the same bits."""

import hashlib
import json
import os
import re
import shutil
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from lorabook.lora.formats.keys import WEIGHT_NAME
from lorabook.lora.formats.write import save_tensors

STATE, HISTORY, SUMS = "training_state.safetensors", "history.json", "SHA256SUMS"


@dataclass
class Progress:
    """How far a run has come.

    Attributes:
        step: optimiser steps done.
        history: a record a step.
        tensors, numbers: state of weights, optimiser, schedule and scaler, as `pack` made it.
    """

    step: int = 0
    history: list[dict] = field(default_factory=list)
    tensors: dict[str, Tensor] = field(default_factory=dict, repr=False)
    numbers: dict = field(default_factory=dict, repr=False)


def pack(weights: dict[str, Tensor], **stateful) -> tuple[dict[str, Tensor], dict]:
    """Weights, and the state of optimiser, schedule and scaler, as tensors and as what JSON can hold."""
    tensors = {f"weights/{name}": value.detach().clone() for name, value in weights.items()}
    numbers = {
        name: _take_tensors(thing.state_dict(), name, tensors)
        for name, thing in stateful.items()
        if thing
    }
    return tensors, numbers


def unpack(progress: Progress, weights: dict[str, Tensor], **stateful) -> None:
    """Put what `pack` took back in its place."""
    with torch.no_grad():
        for name, value in weights.items():
            value.copy_(progress.tensors[f"weights/{name}"])
    for name, thing in stateful.items():
        if thing:
            thing.load_state_dict(_give_tensors(progress.numbers[name], progress.tensors))


def _take_tensors(value, path: str, tensors: dict[str, Tensor]):
    if isinstance(value, Tensor):
        tensors[path] = value.detach().clone()
        return {"tensor": path}
    if isinstance(value, dict):
        return {
            "dict": [
                [key, _take_tensors(entry, f"{path}/{key}", tensors)]
                for key, entry in value.items()
            ]
        }
    if isinstance(value, (list, tuple)):
        return [
            _take_tensors(entry, f"{path}/{number}", tensors) for number, entry in enumerate(value)
        ]
    if not isinstance(value, (int, float, str, bool, type(None))):
        raise ValueError(
            f"a checkpoint cannot hold {path}, which is of type {type(value).__name__}; train with another "
            "optimizer or schedule"
        )
    return value


def _give_tensors(value, tensors: dict[str, Tensor]):
    if isinstance(value, list):
        return [_give_tensors(entry, tensors) for entry in value]
    if isinstance(value, dict):
        return (
            tensors[value["tensor"]]
            if "tensor" in value
            else {key: _give_tensors(entry, tensors) for key, entry in value["dict"]}
        )
    return value


def save_checkpoint(
    folder: Path, progress: Progress, identity: dict, write_adapter, limit: int | None
) -> Path:
    """Write `checkpoint-<step>`; it appears whole or not at all. Then remove the oldest beyond `limit`.

    Args:
        folder: the run's output folder.
        identity: what makes this run the one it is; resuming another is an error.
        write_adapter: writes the adapter file into a folder.
    """
    final = folder / f"checkpoint-{progress.step}"
    unfinished, old = (folder / f".{final.name}.{word}" for word in ("part", "old"))
    for leftover in (unfinished, old):
        shutil.rmtree(leftover, ignore_errors=True)
    unfinished.mkdir(parents=True)
    try:
        write_adapter(unfinished)
        about = {"step": progress.step, "numbers": progress.numbers, "identity": identity}
        save_tensors(unfinished / STATE, progress.tensors, {"about": json.dumps(about)})
        (unfinished / HISTORY).write_text(json.dumps(progress.history))
        names = sorted(path.name for path in unfinished.iterdir())
        (unfinished / SUMS).write_text(
            "".join(f"{_sha(unfinished / name)}  {name}\n" for name in names)
        )
        _flush(unfinished)
        if final.exists():
            os.replace(final, old)
        os.replace(unfinished, final)
    finally:
        for leftover in (unfinished, old):
            shutil.rmtree(leftover, ignore_errors=True)
    _remove_oldest(folder, limit)
    return final


def _remove_oldest(folder: Path, limit: int | None) -> None:
    by_age = sorted(_checkpoints(folder), key=lambda path: path.stat().st_mtime_ns, reverse=True)
    for extra in by_age[limit:] if limit else ():
        gone = (
            folder / f".{extra.name}.old"
        )  # renamed first: a half removed checkpoint must not look like one
        os.replace(extra, gone)
        shutil.rmtree(gone, ignore_errors=True)


def find_checkpoint(folder: Path, asked: str | None, identity: dict) -> Progress:
    """The progress to go on from: of the checkpoint asked for, of the latest whole one, or none.

    Args:
        folder: the run's output folder.
        asked: None, "latest", a checkpoint's name or its path.
        identity: what makes this run the one it is; without a seed, any run's will do.
    Raises: FileNotFoundError if there is no such checkpoint; ValueError if it is damaged or of another run, saying
        what differs.
    """
    if asked is None:
        return Progress()
    if asked != "latest":
        path = next(
            (p for p in (Path(asked).expanduser(), folder / Path(asked).name) if p.is_dir()), None
        )
        if path is None:
            there = ", ".join(p.name for p in _checkpoints(folder)) or "none"
            raise FileNotFoundError(
                f"resume_from_checkpoint: no folder {asked!r}, and none of that name in {folder}, "
                f"which has {there}"
            )
        return _same_run(path, _read(path), identity)
    return _latest(folder, identity)


def _latest(folder: Path, identity: dict) -> Progress:
    """The newest whole checkpoint of this run; other runs' are an error only where there is none of this one."""
    stranger = None
    for path in reversed(_checkpoints(folder)):
        try:
            found = _read(path)
        except ValueError as error:
            warnings.warn(f"{error}; going on from the one before it", stacklevel=2)
            continue
        try:
            return _same_run(path, found, identity)
        except ValueError as error:
            stranger = stranger or error
    if stranger:
        raise stranger
    return Progress()


def _checkpoints(folder: Path) -> list[Path]:
    """The checkpoints in a folder, by step."""
    found = [
        p
        for p in folder.glob("checkpoint-*")
        if p.is_dir() and re.fullmatch(r"checkpoint-\d+", p.name)
    ]
    return sorted(found, key=lambda p: int(p.name.split("-")[1]))


def _read(path: Path) -> tuple[Progress, dict]:
    """A checkpoint and the identity of its run."""
    try:
        sums = {
            name: checksum
            for checksum, name in (
                line.split("  ") for line in (path / SUMS).read_text().splitlines()
            )
        }
        for name in {STATE, HISTORY, WEIGHT_NAME, *sums}:
            if _sha(path / name) != sums.get(name):
                raise ValueError(f"{name} is not as it was written")
        with safe_open(path / STATE, "pt") as file:
            about = json.loads(file.metadata()["about"])
        history = json.loads((path / HISTORY).read_text())
        return Progress(about["step"], history, load_file(path / STATE), about["numbers"]), about[
            "identity"
        ]
    except Exception as error:  # whatever a cut or changed file makes its reader raise
        raise ValueError(f"checkpoint {path} is damaged ({str(error)[:120]})") from error


def _same_run(path: Path, found: tuple[Progress, dict], identity: dict) -> Progress:
    progress, other = found
    differs = [
        f"{name} is {_short(other.get(name))} there and {_short(identity.get(name))} here"
        for name in sorted({*other, *identity} - ({"seed"} - identity.keys()))
        if other.get(name) != identity.get(name)
    ]
    if differs:
        raise ValueError(
            f"checkpoint {path} belongs to another run: {'; '.join(differs[:4])}; give the same settings, "
            "or another output_dir"
        )
    return progress


def _short(value) -> str:
    return repr(value)[:60]


def _sha(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _flush(folder: Path) -> None:
    """Let the files reach the disk before their folder gets its name."""
    for path in folder.iterdir():
        with open(path, "r+b") as file:
            os.fsync(file.fileno())


def written_elsewhere(write: Callable[[Path], Path], folders: list[Path]) -> Path:
    """What `write` returns for the first folder that takes it; a sentence for each that does not.

    Raises: OSError if none does.
    """
    for number, folder in enumerate(folders):
        try:
            return write(folder)
        except OSError as error:
            if number == len(folders) - 1:
                raise
            warnings.warn(
                f"{folder} cannot take the adapter ({error.strerror or error}); it is written to "
                f"{folders[number + 1]}",
                stacklevel=2,
            )
    raise ValueError("no folder was given")
