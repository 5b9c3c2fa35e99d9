"""The notebooks as they are stored, and the other pages of the book, for the tests of this folder."""

import re
from pathlib import Path

import nbformat

ROOT = Path(__file__).parents[2]
PATHS = sorted((ROOT / "notebooks").glob("*.ipynb"))
BOOKS = {path.stem: nbformat.read(path, as_version=4) for path in PATHS}
PAGES = sorted(
    [
        ROOT / "README.md",
        ROOT / "CHANGELOG.md",
        *ROOT.glob("docs/*.md"),
        *ROOT.glob("data/**/README.md"),
    ]
)


def of_kind(kind, book):
    """(number, cell) of a notebook's cells of a kind, "code" or "markdown"."""
    return [(number, cell) for number, cell in enumerate(book.cells) if cell.cell_type == kind]


def outputs(book):
    """(number of the cell, output) of a notebook."""
    return [(number, output) for number, cell in of_kind("code", book) for output in cell.outputs]


def text_of(output):
    """What a reader can read in an output: streams, results, tables without their tags."""
    data = output.get("data", {})
    shown = re.sub(r"<[^>]*>", " ", re.sub(r'"data:[^"]*"', "", data.get("text/html", "")))
    return "\n".join(
        [output.get("text", ""), data.get("text/plain", ""), data.get("text/markdown", ""), shown]
    )


def without_code(markdown):
    """Markdown without its blocks and spans of code."""
    return re.sub(r"```.*?```|`[^`\n]*`", " ", markdown, flags=re.S)


def prose(markdown):
    """The words of markdown: no code, no addresses, no tags; of links what stands in them."""
    return re.sub(r"https?://\S+|\]\([^)]*\)|</?[a-z][^>]*>", " ", without_code(markdown))


def in_headings(markdown):
    """The headings of markdown, without marks and code's quotes."""
    return [
        re.sub(r"[`*]", "", line.lstrip("#").strip())
        for line in markdown.splitlines()
        if re.match(r"#+ ", line)
    ]
