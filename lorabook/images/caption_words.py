"""Captions in columns, and names in sentences."""

from collections.abc import Iterable

CAPTION_WORDS = (
    "text",
    "caption",
    "prompt",
    "description",
    "sentence",
    "additional_feature",
    "tags",
)


def find_caption_column(columns: Iterable[str], asked: str | None, name) -> str:
    """The column of captions: the one asked for, or the first whose name says so.

    Raises: ValueError, listing the columns, if there is none.
    """
    columns = list(columns)
    if asked in columns:
        return asked
    told = ", ".join(map(str, columns[:12])) or "none besides the image"
    if asked:
        raise ValueError(f"{name} has no column {asked!r}; its columns are: {told}")
    found = [
        column
        for word in CAPTION_WORDS
        for column in sorted(map(str, columns), key=len)
        if word in column.lower()
    ]
    if not found:
        raise ValueError(
            f"{name} has no caption column; its columns are: {told}; say which with caption_column"
        )
    return found[0]


def as_caption(value, where: str) -> str:
    """The value where it is text, its first where it is a list of texts; else a ValueError that says where."""
    if isinstance(value, list) and value and all(isinstance(v, str) for v in value):
        value = value[0]
    if not isinstance(value, str):
        raise ValueError(
            f"the caption of {where} is not text but {type(value).__name__}: {str(value)[:60]!r}"
        )
    return value


def some(names: Iterable[str], count: int = 3) -> str:
    """The first names, and dots where there are more."""
    names = list(names)
    return ", ".join(name[:80] for name in names[:count]) + (" …" if len(names) > count else "")


def first_line(error: BaseException, length: int = 160) -> str:
    """What an error says first, shortened."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:length]
