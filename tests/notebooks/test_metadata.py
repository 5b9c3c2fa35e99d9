import json

import nbformat
import pytest
from stored import BOOKS, PATHS, of_kind, outputs

ALLOWED = {"tags", "jupyter", "cellView"}  # no times, sizes or folds that an editor leaves behind


@pytest.fixture(params=BOOKS)
def book(request):
    return BOOKS[request.param]


@pytest.mark.parametrize("path", PATHS, ids=lambda path: path.stem)
def test_the_format_is_valid_and_each_cell_has_an_id_of_its_own(path):
    book = json.loads(path.read_text())  # nbformat would mend what it reads
    ids = [cell["id"] for cell in book["cells"]]
    assert sorted(set(ids)) == sorted(ids)
    nbformat.validate(book)


def test_the_kernel_is_the_one_that_every_machine_has(book):
    assert (
        book.metadata.kernelspec.name == "python3" and book.metadata.language_info.name == "python"
    )
    assert set(book.metadata) <= {"kernelspec", "language_info", "accelerator", "colab"}


def test_cells_carry_no_leftovers(book):
    assert [
        (number, *cell.metadata)
        for number, cell in enumerate(book.cells)
        if not set(cell.metadata) <= ALLOWED
    ] == []
    assert [number for number, cell in of_kind("markdown", book) if cell.get("attachments")] == []
    kinds = [
        (number, set(output.get("metadata", {})) - set(output.get("data", {})))
        for number, output in outputs(book)
    ]
    assert [(number, left) for number, left in kinds if left] == []


def test_what_jupyter_folds_colab_folds_too(book):
    """Jupyter hides a source by `source_hidden`, Colab by `cellView: form` under a `#@title`."""
    for number, cell in of_kind("code", book):
        folded = cell.metadata.get("jupyter", {}).get("source_hidden", False)
        assert (
            folded
            == (cell.metadata.get("cellView") == "form")
            == cell.source.startswith("#@title ")
        ), number
