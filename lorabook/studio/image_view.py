"""The present pictures: as they are now, beside the base model's and the difference where one compares."""

import ipywidgets as widgets
from PIL import Image, ImageChops

from lorabook.studio.controls import png, row, stack, words
from lorabook.studio.generate import Painted

ALONE, SEVERAL, MOST = (
    320,
    256,
    512,
)  # pixels that a picture's width is shown in: the first two at least, the last at most
BASE, NOW, DIFFERENCE = "base", "now", "difference"


class Stage:
    """Pictures and their captions.

    Attributes:
        box: the widget.
        now: the images of DOM class `lorabook-now`.
        alone: whether there is but one picture.
    """

    def __init__(self):
        self.box = row(kind="lorabook-stage")
        self.now: list[widgets.Image] = []
        self._figures: dict[tuple[str, int], tuple[widgets.Image, widgets.HTML, widgets.VBox]] = {}
        self._shape: tuple = ()
        self.alone = True

    def show(self, painted: Painted) -> None:
        """Show pictures; widgets that are there take the new bytes."""
        rows = compared(painted)
        self.alone = len(rows) == len(rows[0]) == 1
        for number, pictures in enumerate(rows):
            for what, picture in pictures.items():
                self._fill(
                    what,
                    number,
                    picture,
                    caption(what, painted, number),
                    ALONE if self.alone else SEVERAL,
                )
        shape = (len(rows), tuple(rows[0]))
        if shape != self._shape:
            self._shape = shape
            self._arrange(rows)

    def _fill(self, what: str, number: int, picture: Image.Image, said: str, least: int) -> None:
        if (what, number) not in self._figures:
            self._figures[what, number] = _figure(what)
        image, label, _ = self._figures[what, number]
        image.value, label.value = png(picture), said
        zoom = max(1, -(-least // picture.width))
        image.layout.width = f"{min(picture.width * zoom, MOST)}px"

    def _arrange(self, rows: list[dict[str, Image.Image]]) -> None:
        """Let the figures stand in rows: those of one seed together where one compares."""
        made = [
            [self._figures[what, number][2] for what in pictures]
            for number, pictures in enumerate(rows)
        ]
        self.now = [self._figures[NOW, number][0] for number in range(len(rows))]
        groups = (
            [row(*figures, kind="lorabook-compared") for figures in made]
            if len(rows[0]) > 1
            else sum(made, [])
        )
        self.box.children = tuple(groups)


def compared(painted: Painted) -> list[dict[str, Image.Image]]:
    """For each seed the pictures that are shown, by what they are, from left to right."""
    if painted.base is None:
        return [{NOW: image} for image in painted.images]
    return [
        {BASE: base, NOW: image, DIFFERENCE: difference(image, base)}
        for image, base in zip(painted.images, painted.base, strict=True)
    ]


def difference(one: Image.Image, other: Image.Image) -> Image.Image:
    """How far two pictures are apart; black where they are the same."""
    return ImageChops.difference(one.convert("RGB"), other.convert("RGB"))


def enlarged(image: Image.Image) -> Image.Image:
    """A small picture enlarged pixel for pixel, to the size that it is shown in beside others."""
    zoom = max(1, -(-SEVERAL // image.width))
    return image.resize((image.width * zoom, image.height * zoom), Image.NEAREST)


def caption(what: str, painted: Painted, number: int) -> str:
    """The words beneath a picture."""
    seeds = painted.settings.seeds
    seed = f"seed {seeds[number]}" if len(seeds) > 1 or painted.base is None else ""
    return " · ".join(filter(None, ("" if what == NOW and painted.base is None else what, seed)))


def _figure(what: str) -> tuple[widgets.Image, widgets.HTML, widgets.VBox]:
    image, label = (
        widgets.Image(format="png", layout={"max_width": "100%"}),
        words(kind="lorabook-caption"),
    )
    image.add_class("lorabook-picture")
    image.add_class("lorabook-now" if what == NOW else f"lorabook-{what}")
    return image, label, stack(image, label, kind="lorabook-figure")
