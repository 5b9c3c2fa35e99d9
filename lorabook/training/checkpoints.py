"""Checkpoints: they appear whole or not at all, and bring a run back to the same bits."""

import hashlib
import json
import os
import re
import shutil
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path

import torch

STATE, HISTORY, SUMS = "training_state.pt", "history.json", "SHA256SUMS"


class DamagedCheckpoint(ValueError):
    """A checkpoint whose files are not as they were written."""


def save_checkpoint(
    folder: Path, state: dict, write_adapter: Callable[[Path], Path], limit: int | None
) -> Path:
    """Write `checkpoint-<step>`, then remove the oldest beyond `limit`.

    Args:
        folder: The run's output folder.
        state: See `Trainer.state_dict`.
        write_adapter: Writes the adapter file into a folder.
        limit: How many checkpoints may stay; None keeps all.
    """
    final, scratch = folder / f"checkpoint-{state['step']}", folder / ".checkpoint.part"
    shutil.rmtree(scratch, ignore_errors=True)
    new = scratch / "new"
    new.mkdir(parents=True)
    try:
        write_adapter(new)
        (new / HISTORY).write_text(json.dumps(state["history"]))
        torch.save(state, new / STATE)
        names = sorted(path.name for path in new.iterdir())
        (new / SUMS).write_text(_sums(new, names))
        if final.exists():
            os.replace(final, scratch / "old")
        os.replace(new, final)
        by_age = sorted(_checkpoints(folder), key=lambda path: path.stat().st_mtime_ns)
        for old in by_age[:-limit] if limit else ():  # one that is half removed is not one
            os.replace(old, scratch / old.name)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return final


def find_checkpoint(folder: Path, wanted: str | None, identity: dict) -> dict:
    """The state to go on from: see `Trainer.state_dict`; empty where there is none.

    Args:
        folder: The run's output folder.
        wanted: None, "latest", a checkpoint's name or its path.
        identity: What makes this run the one it is; without a seed, any run's will do.

    Raises:
        FileNotFoundError: If there is no such checkpoint.
        ValueError: If it is damaged or of another run, saying what differs. "latest" passes over
            those where there is one of this run.
    """
    if wanted is None:
        return {}
    if wanted != "latest":
        for path in (Path(wanted).expanduser(), folder / Path(wanted).name):
            if path.is_dir():
                return _read(path, identity)
        names = ", ".join(path.name for path in _checkpoints(folder)) or "none"
        raise FileNotFoundError(
            f"resume_from_checkpoint: no folder {wanted!r}, and none of that name in {folder}, "
            f"which has {names}"
        )
    other_run = None
    for path in reversed(_checkpoints(folder)):
        try:
            return _read(path, identity)
        except DamagedCheckpoint as error:
            warnings.warn(f"{error}; going on from the one before it", stacklevel=2)
        except ValueError as error:
            other_run = other_run or error
    if other_run:
        raise other_run
    return {}


def _checkpoints(folder: Path) -> list[Path]:
    """The checkpoints in a folder, by step."""
    names = (path for path in folder.glob("checkpoint-*") if path.is_dir())
    whole = [path for path in names if re.fullmatch(r"checkpoint-\d+", path.name)]
    return sorted(whole, key=lambda path: int(path.name.split("-")[1]))


def _sums(folder: Path, names: Iterable[str]) -> str:
    """The files' checksums, as `sha256sum -c` reads them."""
    contents = ((folder / name).read_bytes() for name in names)
    sums = (hashlib.sha256(content).hexdigest() for content in contents)
    return "".join(f"{checksum}  {name}\n" for checksum, name in zip(sums, names, strict=True))


def _read(path: Path, identity: dict) -> dict:
    try:
        sums = (path / SUMS).read_text()
        names = [line.split("  ")[1] for line in sums.splitlines()]
        if STATE not in names or _sums(path, names) != sums:
            raise ValueError("its files are not as they were written")
        state = torch.load(path / STATE, map_location="cpu", weights_only=True)
    except Exception as error:  # whatever a cut or changed file makes its reader raise
        raise DamagedCheckpoint(f"checkpoint {path} is damaged ({str(error)[:120]})") from error
    other = state["identity"]
    names = {*other, *identity} - ({"seed"} - identity.keys())
    differences = [
        f"{name} is {repr(other.get(name))[:60]} there and {repr(identity.get(name))[:60]} here"
        for name in sorted(names)
        if other.get(name) != identity.get(name)
    ]
    if differences:
        raise ValueError(
            f"checkpoint {path} belongs to another run: {'; '.join(differences[:4])}; give the "
            "same settings, or another output_dir"
        )
    return state
