"""What could not be read, and captions that are missing: named once for all pictures."""

import warnings
from collections.abc import Callable

from PIL import UnidentifiedImageError

from lorabook.images.caption_words import first_line, some


class Problems:
    """Pictures that cannot be read, or whose colour profile cannot."""

    def __init__(self, where):
        self.where, self.unread, self.odd = where, [], []

    def kept(self, label: str, keep: Callable, *picture) -> dict | None:
        """What `keep` makes of a picture, as a Dataset keeps it; None where that fails, which is noted."""
        try:
            made, word = keep(*picture)
        except UnidentifiedImageError:
            self.unread.append(f"{label} (Pillow cannot open it; save it as PNG)")
            return None
        except Exception as error:  # a damaged file can make Pillow raise nearly anything
            self.unread.append(f"{label} ({first_line(error, 60)})")
            return None
        self.odd += [f"{label} ({word})"] * bool(word)
        return made

    def report(self, read: int) -> None:
        """Warn of what was noted. Raises: ValueError if nothing was read."""
        if self.unread and not read:
            raise ValueError(
                f"none of the {len(self.unread)} images in {self.where} can be read: {some(self.unread)}"
            )
        if self.unread:
            warnings.warn(
                f"{len(self.unread)} image(s) in {self.where} cannot be read and are left out: "
                f"{some(self.unread, 20)}",
                stacklevel=5,
            )
        if self.odd:
            warnings.warn(
                f"{len(self.odd)} image(s) in {self.where} are taken with their colours as they are: "
                f"{some(self.odd)}",
                stacklevel=5,
            )


def report_empty(
    empty: list[str], count: int, where, allow: bool | None, look_alikes: list[str] = ()
) -> None:
    """Name the images without a caption.

    Args:
        empty: their names.
        count: of all images.
        allow: whether that is meant; None warns only, True is silent.
        look_alikes: files that may hold captions.
    Raises: ValueError if no image has a caption and that is not allowed.
    """
    if not empty or allow:
        return
    remedy = "write metadata.jsonl, or a .txt beside each, or say allow_empty_captions"
    alike = (
        f"; these files look like captions: {some(look_alikes, 5)}"
        if look_alikes and len(empty) == count
        else ""
    )
    if len(empty) == count and allow is not None:
        raise ValueError(
            f"none of the {count} images in {where} has a caption; {remedy}{alike}"[:400]
        )
    warnings.warn(
        f"{len(empty)} of {count} images in {where} have no caption and get an empty one: {some(sorted(empty))}; "
        f"{remedy}{alike}",
        stacklevel=5,
    )
