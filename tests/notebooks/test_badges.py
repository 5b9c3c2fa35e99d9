import re
from pathlib import Path

import nbformat
import pytest

from badges import badges, repository

ROOT = Path(__file__).parents[2]
PATHS = sorted((ROOT / "notebooks").glob("*.ipynb"))


@pytest.mark.parametrize("path", PATHS, ids=lambda path: path.stem)
def test_a_notebook_opens_with_its_own_badges(path):
    first = nbformat.read(path, as_version=4).cells[0]
    assert first.cell_type == "markdown" and badges(path.stem) in first.source
    assert first.source.count("[![") == 2


def test_readme_has_the_badges_of_each_notebook_in_its_row():
    rows = [line for line in (ROOT / "README.md").read_text().splitlines() if "(notebooks/" in line]
    assert [re.search(r"\(notebooks/(\w+)\.ipynb\)", row)[1] for row in rows] == [
        path.stem for path in PATHS
    ]
    for row, path in zip(rows, PATHS, strict=True):
        assert badges(path.stem) in row


def test_a_badge_points_at_a_file_in_the_repository():
    targets = re.findall(r"/blob/main/(notebooks/\w+\.ipynb)\)", badges(PATHS[0].stem))
    assert targets == [str(PATHS[0].relative_to(ROOT))] * 2
    assert badges(PATHS[0].stem).count(repository().removeprefix("https://github.com/")) == 2


def test_no_other_repository_is_named_in_a_notebook_that_fetches_the_book():
    for path in PATHS:
        cells = nbformat.read(path, as_version=4).cells
        fetching = [
            line for cell in cells for line in cell.source.splitlines() if "git clone" in line
        ]
        assert len(fetching) == 1 and f"{repository()} " in fetching[0]
