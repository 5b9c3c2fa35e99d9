"""Small tables of text, for a terminal and for a notebook."""

import html
from collections.abc import Sequence

Rows = Sequence[Sequence[str]]


def as_text(heads: Sequence[str], rows: Rows) -> str:
    """A table in plain text, columns under each other; without heads where there are none."""
    lines = [heads, *rows] if heads else [*rows]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in lines
    )


def as_html(heads: Sequence[str], rows: Rows) -> str:
    """The same as HTML, aligned to the left."""
    lines = [_line(heads, "th")] * bool(heads) + [_line(row, "td") for row in rows]
    return f"<table>{''.join(lines)}</table>"


def _line(cells: Sequence[str], tag: str) -> str:
    return (
        "<tr>"
        + "".join(f'<{tag} style="text-align:left">{html.escape(cell)}</{tag}>' for cell in cells)
        + "</tr>"
    )
