"""Pictures that were kept, with the settings that drew them."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import ipywidgets as widgets
from PIL import Image

from lorabook.show import display as mime
from lorabook.studio.controls import button, png, row, stack, words
from lorabook.studio.settings import StudioSettings

_NOTHING = "Nothing kept yet: “keep” puts the present picture here, with its settings."


@dataclass(frozen=True)
class Kept:
    """A kept picture; shows itself.

    Attributes:
        images: one for each seed.
        settings: what drew them.
    """

    images: tuple[Image.Image, ...]
    settings: StudioSettings

    @property
    def picture(self) -> Image.Image:
        """The first of the images."""
        return self.images[0]

    def _repr_png_(self) -> bytes:
        return png(self.picture)

    def _repr_mimebundle_(self, include=None, exclude=None) -> tuple[dict, dict]:
        return mime.bundle(self._repr_png_(), f"{self.settings.prompt}: {in_words(self.settings)}")


class Gallery:
    """Kept pictures, each with a way back to its settings and out of the gallery; `box` is the widget."""

    def __init__(self, back: Callable[[StudioSettings], None], drop: Callable[[Kept], None]):
        """Args: what takes the settings to go back to; what takes a picture to drop."""
        self._back, self._drop, self._cards = back, drop, {}
        self._wall, self._nothing = row(kind="lorabook-wall"), words(_NOTHING)
        self.box = stack(self._nothing, self._wall)

    def show(self, gallery: Sequence[Kept]) -> None:
        """Show these, the newest first."""
        self._cards = {id(kept): self._cards.get(id(kept)) or self._card(kept) for kept in gallery}
        self._wall.children = tuple(self._cards[id(kept)] for kept in reversed(gallery))
        self._nothing.layout.display = "none" if gallery else None

    def _card(self, kept: Kept) -> widgets.VBox:
        picture = widgets.Image(value=png(kept.picture), format="png", layout={"width": "112px"})
        picture.add_class("lorabook-picture")
        back = button(
            "back to this",
            "set everything as it was for this picture",
            lambda: self._back(kept.settings),
        )
        drop = button(
            "", "drop this picture from the gallery", lambda: self._drop(kept), kind="lorabook-drop"
        )
        return stack(
            picture,
            words(in_words(kept.settings), kind="lorabook-caption"),
            row(back, drop),
            kind="lorabook-card",
        )


def in_words(settings: StudioSettings) -> str:
    """The adapters that take part and their scales, and the seeds, in a few words."""
    taking = []
    for name, mine in settings.adapters.items():
        if mine.on:
            count = len(mine.blocks) + len(mine.parts)
            by_block = f" ({count} moved)" if count else ""
            taking.append(f"{name} {mine.scale:g}{by_block}")
    return f"{' + '.join(taking) or 'base model'} · seed {', '.join(map(str, settings.seeds))}"
