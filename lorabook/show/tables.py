"""Results in rows that show themselves, in a terminal and in a notebook."""

import html
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, ClassVar

from lorabook.checks import listed
from lorabook.show.display import bundle, image_tag

if TYPE_CHECKING:
    from pandas import DataFrame


class Report:
    """A result that holds its rows as a pandas DataFrame and shows itself.

    A subclass sets `table`. It may set `formats`, and override `cells` where people read other
    columns than programs do. A dataclass needs `@dataclass(eq=False, repr=False)`.

    Attributes:
        table: One row a thing, with numbers as numbers: sort it, filter it, plot it, save it.
        formats: By column, what turns a value into text: "{:.1%}" or a function.
        heads: By column, what stands above it, if not its name.
        empty: What is shown where there are no rows.
        note: A line to stand below.
    """

    table: "DataFrame"
    formats: ClassVar[Mapping[str, str | Callable[[object], str]]] = {}
    heads: ClassVar[Mapping[str, str]] = {}
    empty: ClassVar[str] = "no rows"
    note = ""

    def cells(self) -> "DataFrame":
        """The table as people read it: every value is text."""
        from pandas import DataFrame  # here, since `doctor` shows tables where pandas is broken

        columns = {}
        for column in self.table:
            form = self.formats.get(column, str)
            to_text = form.format if isinstance(form, str) else form
            head = self.heads.get(column, str(column).replace("_", " "))
            columns[head] = [to_text(value) for value in self.table[column]]
        return DataFrame(columns)

    def __str__(self) -> str:
        if self.table.empty:
            return self.empty
        cells = self.cells()
        return f"{as_text(list(cells), cells.values.tolist())}\n{self.note}".rstrip()

    def __repr__(self) -> str:
        return str(self)

    def _repr_html_(self) -> str:
        if self.table.empty:
            return f"<p>{html.escape(self.empty)}</p>"
        cells = self.cells()
        note = f"<p>{html.escape(self.note)}</p>" if self.note else ""
        return as_html(list(cells), cells.values.tolist()) + note


class RowReport(Report, Sequence):
    """A report that is a sequence too: `report[0].name`, `report["ink"]`, `for row in report`.

    Attributes:
        row: What a row is, for errors: "adapter".
    """

    row: ClassVar[str] = "row"

    @property
    def rows(self) -> tuple:
        """The rows as named tuples with the table's columns."""
        return tuple(self.table.itertuples(index=False, name="Row"))

    def __len__(self) -> int:
        return len(self.table)

    def __getitem__(self, index: int | slice | str):
        """The row of a number, or of what stands in the first column."""
        if not isinstance(index, str):
            return self.rows[index]
        rows = {row[0]: row for row in self.rows}
        if index not in rows:
            raise KeyError(f"no {self.row} {index!r}; there are: {listed(rows)}")
        return rows[index]


class PlottedReport(Report):
    """A report that shows a figure too, the one that its `plot()` gives."""

    @cached_property
    def _picture(self) -> tuple[bytes, str]:
        plot = self.plot()
        return plot._repr_png_(), plot.alt

    def _repr_png_(self) -> bytes:
        return self._picture[0]

    def _repr_mimebundle_(self, include=None, exclude=None) -> tuple[dict, dict]:
        return bundle(*self._picture)

    def _repr_html_(self) -> str:
        return image_tag(*self._picture) + super()._repr_html_()


def as_text(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table in plain text, columns under each other; without heads where there are none."""
    lines = [heads, *rows] if heads else [*rows]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in lines
    )


def as_html(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """The same as HTML, aligned to the left."""
    lines = [_line(heads, "th")] * bool(heads) + [_line(row, "td") for row in rows]
    return f"<table>{''.join(lines)}</table>"


def _line(cells: Sequence[str], tag: str) -> str:
    texts = [f'<{tag} style="text-align:left">{html.escape(cell)}</{tag}>' for cell in cells]
    return f"<tr>{''.join(texts)}</tr>"
