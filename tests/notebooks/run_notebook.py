"""Run a notebook's code cells in a process of their own; the first error ends it."""

import multiprocessing
import os
import sys
from dataclasses import replace
from pathlib import Path

import nbformat
from IPython.core.interactiveshell import InteractiveShell

from lorabook import (
    worlds,
)  # and nothing else of lorabook: other modules take HUB from there when they are loaded

SLOW = [
    "datasets",
    "diffusers.pipelines.stable_diffusion",
    "ipywidgets",
    "matplotlib.pyplot",
    "peft",
    "accelerate",
    "transformers.models.clip.modeling_clip",
    "torch._dynamo",
    "nbformat",
    "IPython.core.interactiveshell",
]  # to load, and so once for all notebooks


def run_in_the_hub_world(path: Path, hub: dict, injected: str, folder: Path) -> str | None:
    """Run a notebook in a folder, in a process where `world()` chooses HUB as on a GPU.

    Args:
        hub: the fields of HUB that are other ones.
        injected: lines put after the parameters, as papermill does.
    Returns: the cell that failed and the last that it said; None if all ran.
    """
    processes = multiprocessing.get_context("forkserver" if hasattr(os, "fork") else "spawn")
    processes.set_forkserver_preload(SLOW)
    process = processes.Process(target=_run, args=(path, hub, injected, folder))
    process.start()
    process.join(600)  # seconds
    process.kill()  # what still runs has failed
    process.join()
    return (folder / "said.txt").read_text()[-3000:] if process.exitcode else None


def _run(path: Path, hub: dict, injected: str, folder: Path) -> None:
    os.chdir(folder)
    said = os.open(folder / "said.txt", os.O_WRONLY | os.O_CREAT)
    os.dup2(said, 1)
    os.dup2(said, 2)
    worlds.HUB = replace(worlds.HUB, **hub)
    worlds.world.__defaults__ = (
        worlds.HUB.name,
    )  # a world that is asked for by name is still that one
    _run_cells(nbformat.read(path, as_version=4).cells, injected)


def _run_cells(cells: list, injected: str) -> None:
    shell = InteractiveShell.instance()
    shell.history_manager.enabled = False
    errors = []
    shell.showtraceback = shell.showsyntaxerror = lambda *_, **__: errors.append(
        sys.exc_info()[1]
    )  # in callbacks too
    for number, cell in enumerate(cells):
        if cell.cell_type == "code":
            parameters = "parameters" in cell.metadata.get("tags", [])
            shell.run_cell(f"{cell.source}\n{injected}" if parameters else cell.source)
        if errors:
            raise SystemExit(
                f"\n\ncell {number}: {cell.source}\n\n{type(errors[0]).__name__}: {errors[0]}"
            )
