"""A notebook in JupyterLab, opened as `make lab` opens it: Run All, then its slider."""

import os
import re

import nbformat
import pytest
from servers import READY, ROOT, serving

if not os.environ.get("CI"):
    pytest.importorskip("playwright", reason="playwright is not installed: pip install -e '.[dev]'")
pytestmark = pytest.mark.browser
_CELLS = "() => window.jupyterapp.shell.currentWidget.content.model.sharedModel.cells.map(cell => cell.toJSON())"
_DONE = f"""() => ({_CELLS})().filter(cell => cell.cell_type == 'code')
  .every(cell => cell.execution_count || (cell.outputs ?? []).some(output => output.output_type == 'error'))"""
_SHOWN = "() => [...document.querySelectorAll('.jupyter-widgets img, .widget-output img')].map(image => image.src).at(-1)"


@pytest.fixture
def notebook(tmp_path):
    """Notebook 00 without its outputs, in a folder of its own."""
    book = nbformat.read(ROOT / "notebooks/00_start_here.ipynb", as_version=4)
    for cell in book.cells:
        if cell.cell_type == "code":
            cell.outputs, cell.execution_count = [], None
    nbformat.write(book, tmp_path / "00_start_here.ipynb")
    return tmp_path / "00_start_here.ipynb"


def test_make_lab_opens_the_first_notebook():
    assert re.search(
        r"^lab:.*\n\t.*jupyter lab notebooks/00_start_here\.ipynb$",
        (ROOT / "Makefile").read_text(),
        re.M,
    )


def test_run_all_of_the_first_notebook_and_its_slider(page, notebook):
    with serving("lab", notebook) as address:
        page.goto(address)
        page.wait_for_function(READY)
        page.locator(".lm-MenuBar-itemLabel", has_text="Run").click()
        page.locator('li[data-command="runmenu:run-all"]').click()
        page.wait_for_function(_DONE, timeout=300_000)
        outputs = [output for cell in page.evaluate(_CELLS) for output in cell.get("outputs", [])]
        assert not [output for output in outputs if output["output_type"] == "error"]
        assert sum("image/png" in output.get("data", {}) for output in outputs) >= 5
        move_the_slider(page)


def move_the_slider(page):
    """Its picture changes when it is moved by a key."""
    slider = page.locator(".widget-slider .noUi-handle").first
    slider.scroll_into_view_if_needed()
    page.wait_for_function(_SHOWN)
    before = page.evaluate(_SHOWN)
    slider.focus()
    page.keyboard.press("ArrowLeft")
    page.wait_for_function(
        f"before => {{ const now = ({_SHOWN})(); return now && now != before }}", arg=before
    )
