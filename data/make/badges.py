"""The badges that open a notebook on Colab and on Kaggle: `python data/make/badges.py` prints those
of all notebooks.
"""

import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
BRANCH = "main"


def repository() -> str:
    """The repository's address, which stands in pyproject.toml and is repeated nowhere by hand."""
    return tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["urls"]["Repository"]


def badges(notebook: str) -> str:
    """The two badges of a notebook, in Markdown.

    Args:
        notebook: its file's name without the ending, for example "00_start_here".
    """
    address = repository()
    inside = (
        f"{address.removeprefix('https://github.com/')}/blob/{BRANCH}/notebooks/{notebook}.ipynb"
    )
    colab = f"https://colab.research.google.com/github/{inside}"
    kaggle = f"https://kaggle.com/kernels/welcome?src=https://github.com/{inside}"
    return (
        f"[![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)]({colab}) "
        f"[![Open in Kaggle](https://kaggle.com/static/images/open-in-kaggle.svg)]({kaggle})"
    )


if __name__ == "__main__":
    for path in sorted((ROOT / "notebooks").glob("*.ipynb")):
        print(path.stem, badges(path.stem))
