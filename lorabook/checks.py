"""Checks and phrases that error messages share."""

import difflib
import math
from collections.abc import Iterable
from numbers import Real


def is_number(value: object) -> bool:
    """Whether `value` is a finite real number; True and False are not."""
    try:
        return isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value)
    except OverflowError:  # a whole number beyond the range of floats
        return False


def listed(names: Iterable[object], limit: int | None = None) -> str:
    """Names for a sentence: "ink, cat", or "none"; beyond `limit` "ink, cat and 5 more"."""
    words = [str(name) for name in names]
    if limit is not None and len(words) > limit:
        words = [*words[: limit - 1], f"{words[limit - 1]} and {len(words) - limit} more"]
    return ", ".join(words) or "none"


def closest(name: str, known: Iterable[str]) -> str:
    """ "; did you mean 'ink'?" where a known name is like `name`, else an empty string."""
    match = difflib.get_close_matches(name, list(known), n=1)
    return f"; did you mean {match[0]!r}?" if match else ""


def nearest(name: str, known: Iterable[str], otherwise: str = "there are") -> str:
    """The end of a sentence about an unknown name: the names like it, or those there are."""
    lower = {other.lower(): other for other in known}
    like = difflib.get_close_matches(name.lower(), lower, 4, 0.5)
    if like:
        return f"the nearest are: {listed(lower[match] for match in like)}"
    return f"{otherwise}: {listed(list(lower.values())[:20])}"


def first_line(error: BaseException, length: int = 160) -> str:
    """The first line of an error's message, cut to `length` characters, or its type's name."""
    text = str(error).strip().splitlines()
    line = text[0] if text else type(error).__name__
    return line if len(line) <= length else line[: length - 1] + "…"
