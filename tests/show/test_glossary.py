from pathlib import Path

import nbformat
import pytest

import lorabook as lb
from lorabook.show.glossary import _NOTEBOOKS, TERMS

FOLDER = Path(__file__).parents[2] / "notebooks"


def plain(word):
    return word.lower().replace("-", "").replace("_", " ")


@pytest.mark.parametrize("term", TERMS)
def test_a_term_is_one_short_sentence_and_stands_in_its_notebook(term):
    number, meaning = TERMS[term]
    assert meaning[0].isupper() or meaning.startswith("diffusers")
    assert meaning.endswith(".") and len(meaning.split()) <= 20
    cells = nbformat.read(FOLDER / f"{_NOTEBOOKS[number]}.ipynb", as_version=4).cells
    text = plain(" ".join(cell.source for cell in cells))
    assert all(plain(word).rstrip("s") in text for word in term.split(", "))


def test_terms_stand_in_the_order_of_the_alphabet():
    names = [plain(term).replace("δ", "delta") for term in TERMS]
    assert names == sorted(names)


def test_every_notebook_of_the_book_is_known():
    assert sorted(_NOTEBOOKS.values()) == sorted(path.stem for path in FOLDER.glob("*.ipynb"))


def test_it_tells_a_word_and_shows_a_table_with_links():
    words = lb.glossary()
    assert words["rank"] == TERMS["rank"][1] and "rank: " in repr(words)
    assert (
        "| **scale** | " in words._repr_markdown_()
        and "[00](00_start_here.ipynb)" in words._repr_markdown_()
    )
