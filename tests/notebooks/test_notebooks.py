import re
from pathlib import Path
from statistics import median

import nbformat
import pytest

PATHS = sorted((Path(__file__).parents[2] / "notebooks").glob("*.ipynb"))
WIDGET = "application/vnd.jupyter.widget-view+json"


@pytest.fixture(params=PATHS, ids=lambda path: path.stem)
def book(request):
    return nbformat.read(request.param, as_version=4)


def code_cells(book):
    return [cell for cell in book.cells if cell.cell_type == "code"]


def lines(cell):
    return [line for line in cell.source.splitlines() if line.strip()]


def is_picture(output):
    data = output.get("data", {})
    return "image/png" in data or "<img" in data.get("text/html", "")


def test_cells_are_few_and_short(book):
    counts = sorted(len(lines(cell)) for cell in code_cells(book))
    assert 30 <= len(book.cells) <= 60 and counts[-1] <= 20
    assert median(counts) <= 4 and counts[int(0.9 * len(counts))] < 10


def test_prose_keeps_the_budget(book):
    words = sum(len(cell.source.split()) for cell in book.cells if cell.cell_type == "markdown")
    assert 5 <= words / sum(len(lines(cell)) for cell in code_cells(book)) <= 9.5


def test_a_picture_comes_early_and_several_follow(book):
    shown = [
        number
        for number, cell in enumerate(book.cells)
        for output in cell.get("outputs", [])
        if is_picture(output)
    ]
    assert shown[0] <= 8 and len(shown) >= 3


def test_claims_are_asserted(book):
    assert sum("assert " in cell.source for cell in code_cells(book)) >= 3


def test_three_exercises_have_folded_answers_that_ran(book):
    answers = [cell for cell in code_cells(book) if "answer" in cell.metadata.get("tags", [])]
    assert len(answers) >= 3
    assert all(cell.metadata["jupyter"]["source_hidden"] and cell.outputs for cell in answers)
    assert len(re.findall(r"\*\*\d\.\*\*", " ".join(c.source for c in book.cells))) == len(answers)


def test_one_cell_holds_the_parameters_and_one_the_setup(book):
    assert sum("parameters" in cell.metadata.get("tags", []) for cell in book.cells) == 1
    assert sum("git clone" in cell.source for cell in code_cells(book)) == 1


def test_the_setup_cell_is_the_same_everywhere():
    setups = {
        cell.source
        for path in PATHS
        for cell in code_cells(nbformat.read(path, as_version=4))
        if "git clone" in cell.source
    }
    assert len(setups) == 1


def test_it_was_run_from_top_to_bottom_without_errors(book):
    assert [cell.execution_count for cell in code_cells(book)] == list(
        range(1, len(code_cells(book)) + 1)
    )
    assert not [o for cell in code_cells(book) for o in cell.outputs if o.output_type == "error"]


def test_no_widget_state_is_half_stored(book):
    assert "widgets" not in book.metadata
    shown = [
        cell for cell in code_cells(book) if any(WIDGET in o.get("data", {}) for o in cell.outputs)
    ]
    assert all("interact" in cell.source for cell in shown)


@pytest.mark.parametrize("path", PATHS, ids=lambda path: path.stem)
def test_a_notebook_stays_below_a_megabyte(path):
    assert path.stat().st_size < 1_000_000
