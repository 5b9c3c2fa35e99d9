import re
from pathlib import Path

import nbformat
import pytest
from stored import PAGES, PATHS, ROOT, in_headings, without_code

from badges import BRANCH, repository

LINK = re.compile(r"""(?:\]\(|\b(?:src|href)=["'])\s*([^)\s"']+)""")
OURS = re.compile(
    rf"{repository().removeprefix('https://github.com/')}/(?:(?:blob|tree|raw)/)?{BRANCH}/([^?#]+)"
)


def markdown(path):
    """A page's markdown, or that of a notebook's cells."""
    if path.suffix != ".ipynb":
        return path.read_text()
    return "\n\n".join(
        cell.source
        for cell in nbformat.read(path, as_version=4).cells
        if cell.cell_type == "markdown"
    )


def anchors(path):
    """What `#…` may follow a page's address: as Jupyter makes it in a notebook, as GitHub does
    elsewhere.
    """
    headings = in_headings(re.sub(r"```.*?```", "", markdown(path), flags=re.S))
    if path.suffix == ".ipynb":
        return {heading.replace(" ", "-") for heading in headings}
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def broken(link, page: Path):
    """Why a link of a page leads nowhere in the repository, or None."""
    target, _, anchor = link.partition("#")
    if re.match(r"https?://|mailto:", link):
        ours = OURS.search(link)
        return None if not ours or (ROOT / ours[1]).exists() else "no such file"
    file = (page.parent / target).resolve() if target else page
    if not file.exists() or not file.is_relative_to(ROOT):
        return "no such file"
    return "no such heading" if anchor and anchor not in anchors(file) else None


@pytest.mark.parametrize("page", [*PATHS, *PAGES], ids=lambda page: str(page.relative_to(ROOT)))
def test_every_link_leads_to_a_file_and_heading_of_the_repository(page):
    links = LINK.findall(without_code(markdown(page)))
    assert [(link, broken(link, page)) for link in links if broken(link, page)] == []


@pytest.mark.parametrize("page", [*PATHS, *PAGES], ids=lambda page: str(page.relative_to(ROOT)))
def test_every_image_of_a_page_has_a_text(page):
    text = without_code(markdown(page))
    assert re.findall(r"!\[\s*\]\([^)]*\)|<img(?![^>]*alt=[\"'][^\"']+)[^>]*>", text) == []


@pytest.mark.parametrize(
    "link, why",
    [
        ("docs/sweeps.md", None),
        ("notebooks/00_start_here.ipynb#One-slider", None),
        ("docs/nowhere.md", "no such file"),
        ("README.md#two-commands", None),
        ("README.md#Two-commands", "no such heading"),
        ("#the-package", None),
        (f"{repository()}/blob/{BRANCH}/docs/sweeps.md", None),
        (f"{repository()}/blob/{BRANCH}/nowhere.md", "no such file"),
    ],
)
def test_a_broken_link_would_be_found(link, why):
    assert broken(link, ROOT / "README.md") == why
