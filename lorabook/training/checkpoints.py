"""Checkpoints: they appear whole or not at all, and bring a run back to the same bits."""

import json
import os
import re
import shutil
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path

import torch

STATE, HISTORY = "training_state.pt", "history.json"


class DamagedCheckpoint(ValueError):
    """A checkpoint whose state is not as it was written."""


def save_checkpoint(
    folder: Path, state: dict, write_adapter: Callable[[Path], Path], limit: int | None
) -> None:
    """Write `checkpoint-<step>`, then remove the oldest beyond `limit`; None keeps all."""
    final, scratch = folder / f"checkpoint-{state['step']}", folder / ".checkpoint.part"
    shutil.rmtree(scratch, ignore_errors=True)
    new = scratch / "new"
    new.mkdir(parents=True)
    try:
        write_adapter(new)
        (new / HISTORY).write_text(json.dumps(state["history"]))
        torch.save(state, new / STATE)
        if final.exists():
            os.replace(final, scratch / "old")
        os.replace(new, final)
        by_age = sorted(_checkpoints(folder), key=lambda path: path.stat().st_mtime_ns)
        for old in by_age[:-limit] if limit else ():  # one that is half removed is not one
            os.replace(old, scratch / old.name)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def find_checkpoint(folder: Path, wanted: str | None, identity: dict) -> dict:
    """The state to go on from: see `Trainer.state_dict`; empty where there is none.

    Wanted is None, "latest", a checkpoint's name or its path. One that is damaged or of another run
    is an error, which says what differs; "latest" passes over it where there is one of this run.
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
    steps = {
        int(path.name.split("-")[1]): path
        for path in folder.glob("checkpoint-*")
        if path.is_dir() and re.fullmatch(r"checkpoint-\d+", path.name)
    }
    return [steps[step] for step in sorted(steps)]


def _read(path: Path, identity: dict) -> dict:
    try:
        with zipfile.ZipFile(path / STATE) as archive:  # torch.save's; torch.load checks no sums
            if changed := archive.testzip():
                raise ValueError(f"{changed} in its {STATE} is not as it was written")
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
