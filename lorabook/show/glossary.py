"""The words of the book, a sentence each, and the notebook that explains them: glossary.csv."""

from pathlib import Path

from pandas import read_csv


class Glossary(dict):
    """Terms and what they mean, `glossary["rank"]`; shows itself as a table.

    Attributes:
        table: A pandas DataFrame with the columns term, notebook and meaning.
    """

    def __init__(self):
        self.table = read_csv(Path(__file__).with_name("glossary.csv"))
        super().__init__(zip(self.table.term, self.table.meaning, strict=True))

    def __repr__(self) -> str:
        return "\n".join(f"{term}: {meaning}" for term, meaning in self.items())

    def _repr_markdown_(self) -> str:
        rows = [
            f"| **{row.term}** | {row.meaning} | [{row.notebook[:2]}]({row.notebook}.ipynb) |"
            for row in self.table.itertuples()
        ]
        return "\n".join(["| term | what it means | in |", "|---|---|---|", *rows])


def glossary() -> Glossary:
    """The words of the book, in the order of the alphabet.

    Returns: What each means, by term; in a notebook, a table with links to where it is explained.
    """
    return Glossary()
