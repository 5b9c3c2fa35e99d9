"""Runs notebooks from top to bottom and stores clean outputs: python tests/notebooks/execute.py
[NUMBER …]
"""

import sys
import time
from pathlib import Path

import nbformat
from nbclient import NotebookClient

FOLDER = Path(__file__).resolve().parents[2] / "notebooks"
WIDGET = "application/vnd.jupyter.widget-view+json"
METADATA = {
    "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
    "language_info": {"name": "python"},
}


def execute(path: Path) -> float:
    """Run a notebook and write it back; returns the seconds it took. Raises: CellExecutionError,
    and writes nothing.
    """
    book, start = nbformat.read(path, as_version=4), time.monotonic()
    NotebookClient(
        book, timeout=900, record_timing=False, resources={"metadata": {"path": str(path.parent)}}
    ).execute()
    took = time.monotonic() - start
    for cell in book.cells:
        if cell.cell_type == "code":
            cell.outputs = lasting(cell.outputs, shows_a_slider="interact" in cell.source)
    book.metadata = nbformat.from_dict(METADATA)
    nbformat.write(book, path)
    return took


def lasting(outputs: list, *, shows_a_slider: bool) -> list:
    """The outputs worth keeping: no progress on stderr, and no widget but `interact`'s, which
    stands without a picture.
    """
    if shows_a_slider:
        return [output for output in outputs if WIDGET in output.get("data", {})]
    for output in outputs:
        if "image/png" in output.get("data", {}):
            output["data"].pop(WIDGET, None)
    return [
        output
        for output in outputs
        if output.get("name") != "stderr"
        and WIDGET not in output.get("data", {})
        and output.get("data") != {"text/plain": ""}
    ]


if __name__ == "__main__":
    for number in sys.argv[1:] or ["0", "1"]:
        for path in sorted(FOLDER.glob(f"{number}*.ipynb")):
            print(path.stem, f"{execute(path):.0f} s", flush=True)
