from pathlib import Path

import nbformat
import pytest

import lorabook as lb

FOLDER = Path(__file__).parents[2] / "notebooks"
WORDS = lb.glossary()


def plain(word):
    return word.lower().replace("-", "").replace("_", " ")


@pytest.mark.parametrize("row", list(WORDS.table.itertuples()), ids=lambda row: row.term)
def test_a_term_is_one_short_sentence_and_stands_in_its_notebook(row):
    assert row.meaning[0].isupper() or row.meaning.startswith("diffusers")
    assert row.meaning.endswith(".") and len(row.meaning.split()) <= 20
    cells = nbformat.read(FOLDER / f"{row.notebook}.ipynb", as_version=4).cells
    text = plain(" ".join(cell.source for cell in cells))
    assert all(plain(word).rstrip("s") in text for word in row.term.split(", "))


def test_terms_stand_in_the_order_of_the_alphabet():
    names = [plain(term).replace("δ", "delta") for term in WORDS]
    assert names == sorted(names) and len(names) == len(WORDS)


def test_every_notebook_of_the_book_is_known():
    assert set(WORDS.table.notebook) == {path.stem for path in FOLDER.glob("*.ipynb")}


def test_it_tells_a_word_and_shows_a_table_with_links():
    assert WORDS["rank"].startswith("Of how many") and "rank: " in repr(WORDS)
    table = WORDS._repr_markdown_()
    assert "| **scale** | " in table and "[00](00_start_here.ipynb)" in table
