"""Every notebook opens, asks, and ends in the same way, and depends on the world in its parameters
only.
"""

import re

import pytest
from stored import BOOKS, ROOT, in_headings, of_kind, outputs, text_of

from lorabook.show.glossary import glossary

GLOSSARY = "00_start_here.ipynb#Glossary"
TAKES = re.compile(
    r"\*\*It takes\*\* about (\d+) minutes? on two CPU cores; on a T4 about (\d+)(?: \(estimated\))?\."
)


def opening(name):
    """The text of a notebook's first two cells."""
    return "\n".join(cell.source for cell in BOOKS[name].cells[:2] if cell.cell_type == "markdown")


def told(name):
    """The minutes of a notebook's opening, here and on a T4."""
    found = TAKES.search(opening(name))
    return tuple(f"{minutes} min" for minutes in found.groups()) if found else None


def rows():
    """The README's table of notebooks: (heading, text) of its columns, by the notebook's name."""
    table = [
        [part.strip() for part in line.strip().strip("|").split("|")]
        for line in (ROOT / "README.md").read_text().splitlines()
        if line.startswith("|")
    ]
    head = next((row for row in table if "here" in row), None)
    found = [(re.search(r"notebooks/(\w+)\.ipynb", " ".join(row)), row) for row in table]
    return {name[1]: dict(zip(head or row, row, strict=False)) for name, row in found if name}


@pytest.mark.parametrize("name", BOOKS)
def test_the_opening_says_what_how_long_and_what_to_read_first(name):
    assert [
        words
        for words in ("**You will learn**", "**Read first", "**It takes**")
        if words not in opening(name)
    ] == []
    assert told(name), "minutes: " + opening(name).partition("**It takes**")[2]


@pytest.mark.parametrize("name", BOOKS)
def test_readme_tells_the_minutes_that_the_notebook_tells(name):
    row = rows()[name]
    assert (row.get("here"), row.get("on a T4")) == told(name)


@pytest.mark.parametrize("name", BOOKS)
def test_three_predictions_are_asked_for_each_before_its_cell(name):
    cells = BOOKS[name].cells
    asked = [
        number for number, cell in of_kind("markdown", BOOKS[name]) if "**Predict" in cell.source
    ]
    assert len(asked) >= 3
    assert [number for number in asked if cells[number + 1].cell_type != "code"] == []


@pytest.mark.parametrize("name", BOOKS)
def test_it_ends_with_what_you_saw_and_where_next(name):
    text = "\n".join(cell.source for _, cell in of_kind("markdown", BOOKS[name]))
    assert "What you saw" in in_headings(text)[-1:]
    assert "**Next:**" in text.rpartition("## What you saw")[2]


def test_the_first_notebook_has_a_glossary():
    book = BOOKS["00_start_here"]
    place = next(
        number
        for number, cell in of_kind("markdown", book)
        if cell.source.startswith("## Glossary")
    )
    table = "".join(text_of(output) for number, output in outputs(book) if number == place + 1)
    assert all(f"**{term}**" in table for term in glossary())


@pytest.mark.parametrize("name", sorted(set(BOOKS) - {"00_start_here"}))
def test_every_other_notebook_opens_with_a_link_to_the_glossary(name):
    assert GLOSSARY in re.findall(r"\]\(([^)]*#[^)]*)\)", opening(name))


@pytest.mark.parametrize("name", BOOKS)
def test_after_the_parameters_nothing_asks_for_the_world_and_nothing_ever_for_its_name_or_a_gpu(
    name,
):
    code = of_kind("code", BOOKS[name])
    parameters = next(
        number for number, cell in code if "parameters" in cell.metadata.get("tags", [])
    )
    words = r"\b(?:world\.name|is_available|mini)\b"
    asking = [
        (number, re.findall(words + r"|\bworld\b" * (number > parameters), cell.source))
        for number, cell in code
    ]
    assert [(number, *found) for number, found in asking if found] == []


def test_the_teachers_page_tells_the_same_minutes_on_a_t4():
    page = (ROOT / "docs/teaching.md").read_text()
    rows = re.findall(r"^\| (\d\d) [^|]*\|[^|]*\|[^|]*\| (\d+) \|$", page, re.M)
    assert {number: f"{minutes} min" for number, minutes in rows} == {
        name[:2]: told(name)[1] for name in BOOKS
    }
