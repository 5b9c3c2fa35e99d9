"""A shelf of adapter files: a click on one loads it."""

from collections.abc import Callable, Sequence

import ipywidgets as widgets

from lorabook.live.layers import module_name
from lorabook.studio.adapter_files import ShelfFile, thumbnail
from lorabook.studio.controls import button, line, row, stack, told, words
from lorabook.studio.settings import StudioSettings

MOST = 24  # cards that are shown at a time


class Shelf:
    """Cards with pictures, a line to narrow them by, and a line for anything else that can be loaded; `box` is the widget.

    Attributes:
        cards: the buttons shown, by name.
    """

    def __init__(
        self,
        files: Sequence[ShelfFile],
        load: Callable[[object], bool],
        turn: Callable[[str], None],
    ):
        """Args: what is there; what loads a path, or what was typed, and tells whether it did; what turns to an adapter."""
        self._files, self._load, self._turn, self._made, self._here = files, load, turn, {}, ()
        self.cards: dict[str, widgets.Button] = {}
        self.narrow = widgets.Text(
            description="find",
            placeholder="part of a name",
            layout={"width": "auto"},
            style={"description_width": "initial"},
        )
        self.narrow.observe(lambda event: self._lay(event["new"]), names="value")
        self.other = line(
            "other",
            self._typed,
            about="a file, a folder, a Hub id or an address; Enter loads it",
            placeholder="a file, a folder, a Hub id or an address",
            flex="1 1 0",
        )
        self.fetch = button(
            "load", "load what stands beside", lambda: self._typed(self.other.value)
        )
        self._wall, self._left = row(kind="lorabook-wall"), words()
        self._lay("")
        self.box = stack(
            *([self.narrow] if len(files) > MOST else []),
            self._wall,
            self._left,
            row(self.other, self.fetch),
        )

    def show(self, settings: StudioSettings) -> None:
        """Mark what is loaded."""
        self._here = tuple(settings.adapters)
        for path, (press, _) in self._made.items():
            name = next(file.name for file in self._files if file.path == path)
            text = f"✓ {name}" if module_name(name) in self._here else name
            if press.description != text:
                press.description = text

    def _press(self, file: ShelfFile) -> None:
        """Load it; or turn to it, where it is loaded."""
        name = module_name(file.name)
        self._turn(name) if name in self._here else self._load(file.path)

    def _lay(self, part: str) -> None:
        found = [file for file in self._files if part.strip().lower() in file.name.lower()]
        self.cards, cards = {}, []
        for file in found[:MOST]:
            if file.path not in self._made:
                self._made[file.path] = _card(file, self._press)
            press, card = self._made[file.path]
            self.cards[file.name] = press
            cards.append(card)
        self._wall.children = tuple(cards)
        more = len(found) - len(cards)
        self._left.value = told(
            f"{more} more; type a part of the name to find them"
            if more
            else ""
            if found
            else "no adapter files here"
        )

    def _typed(self, source: str) -> None:
        if source.strip() and self._load(source.strip()):
            self.other.value = ""  # leaving the line for the button beside must not load twice


def _card(
    file: ShelfFile, press: Callable[[ShelfFile], None]
) -> tuple[widgets.Button, widgets.VBox]:
    picture = widgets.Image(
        value=thumbnail(file), format="png", layout={"width": "84px", "height": "84px"}
    )
    made = button(file.name, f"load {file.name}, {file.megabytes:.1f} MB", lambda: press(file))
    return made, stack(picture, made, kind="lorabook-card")
