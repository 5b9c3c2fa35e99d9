"""A labelled grid of images that shows itself in a notebook."""

import base64
import io
import json
import math
import os
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

import matplotlib
from PIL import Image, ImageChops, ImageDraw, ImageFont, ImageOps, PngImagePlugin

from lorabook.show import display as mime

_TEXT, _PAPER, _FRAME, _GAP, _MARGIN = (40, 40, 44), (255, 255, 255), (225, 225, 228), 6, 10
SMALLEST, LARGEST = 128, 320  # pixels of a cell's longer side, when shown
KEY = "lorabook"  # of the text in a PNG that holds a grid's settings


@dataclass
class ImageGrid:
    """Images in rows and columns, with a label for each.

    Attributes:
        images: PIL images as `images[row][column]`; None where nothing was drawn.
        columns, rows: one label each; an empty list draws none.
        title: what stands above, or "".
        settings: what repeats it: for a sweep, the arguments of `sweep`.
    """

    images: list[list[Image.Image | None]] = field(repr=False)
    columns: Sequence[str] = field(default_factory=list)
    rows: Sequence[str] = field(default_factory=list)
    title: str = ""
    settings: Mapping[str, object] = field(default_factory=dict, repr=False)

    def __post_init__(self):
        if not self.images or not self.images[0]:
            raise ValueError("an ImageGrid needs at least one image")
        if len({len(row) for row in self.images}) > 1:
            raise ValueError(
                f"every row of an ImageGrid needs as many images; got {[len(r) for r in self.images]}"
            )
        for name, labels, count in (
            ("columns", self.columns, len(self.images[0])),
            ("rows", self.rows, len(self.images)),
        ):
            if labels and len(labels) != count:
                raise ValueError(
                    f"an ImageGrid with {count} {name} was given {len(labels)} labels for them"
                )

    @property
    def is_whole(self) -> bool:
        """Whether every image is there; a sweep that was interrupted lacks some."""
        return all(image is not None for row in self.images for image in row)

    @property
    def alt(self) -> str:
        """What the grid shows in a sentence of at most 300 letters, for those who do not see it."""
        rows, columns = len(self.images), len(self.images[0])
        sizes = {image.size for row in self.images for image in row if image}
        size = (
            " × ".join(map(str, map(max, zip(*sizes, strict=True)))) + " pixels"
            if sizes
            else "no pixels yet"
        )
        told = {
            "": [self.title.rstrip(".")] * bool(self.title),
            "columns: ": self.columns,
            "rows: ": self.rows,
        }
        parts = [
            name + textwrap.shorten(", ".join(labels), 70, placeholder=" …")
            for name, labels in told.items()
            if labels
        ]
        return (
            f"Pictures in {_counted(rows, 'row')} and {_counted(columns, 'column')}, {size} each"
            f"{': ' if parts else ''}{'; '.join(parts)}."
        )

    def picture(self, *, reduced: bool = True) -> Image.Image:
        """The whole grid as one image: small images are enlarged, pixel for pixel, and large ones reduced.

        Args:
            reduced: False leaves large images as they are.
        """
        return self._laid_out(reduced)[0]

    def save(self, path: str | os.PathLike) -> Path:
        """Write the grid as a PNG with its labels and settings inside, so that `load` gives it back; returns the path.

        Images keep all their pixels.
        """
        sheet, places = self._laid_out(reduced=False)
        told = {
            "settings": dict(self.settings),
            "columns": list(self.columns),
            "rows": list(self.rows),
            "title": self.title,
            "places": places,
        }
        text = PngImagePlugin.PngInfo()
        text.add_itxt(KEY, json.dumps(told))
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        sheet.save(path, "PNG", pnginfo=text)
        return path

    @classmethod
    def load(cls, path: str | os.PathLike) -> "ImageGrid":
        """A grid that `save` wrote, with its images, labels and settings: `sweep(pipe, **grid.settings)` repeats a sweep.

        Raises: FileNotFoundError for no such file, ValueError for a picture that is no saved grid.
        """
        if not Path(path).is_file():
            raise FileNotFoundError(f"there is no file {path}")
        try:
            with Image.open(path) as sheet:
                sheet.load()
            told = json.loads(sheet.text[KEY])
            images = [
                [
                    None
                    if place is None
                    else sheet.crop(place[:4]).resize(place[4:], Image.NEAREST)
                    for place in row
                ]
                for row in told["places"]
            ]
        except (OSError, AttributeError, KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{path} is no grid that ImageGrid.save wrote") from error
        return cls(images, told["columns"], told["rows"], told["title"], told["settings"])

    def difference_from(self, column: int | str) -> "ImageGrid":
        """How far each image is from the one in a column of its row: the absolute difference, black where they are equal.

        Args:
            column: its number from 0, or its label.
        Raises: ValueError for a column that is not there, or images of different sizes.
        """
        number, count = (
            list(self.columns).index(column) if column in self.columns else column,
            len(self.images[0]),
        )
        if not isinstance(number, int) or isinstance(number, bool) or not -count <= number < count:
            raise ValueError(
                f"the grid has no column {column!r:.60}; it has {count}: {', '.join(self.columns)}"[
                    :400
                ]
            )
        if len({image.size for row in self.images for image in row if image}) > 1:
            raise ValueError("the grid's images have different sizes, so they have no difference")
        rows = [
            [
                ImageChops.difference(image.convert("RGB"), row[number].convert("RGB"))
                if image and row[number]
                else None
                for image in row
            ]
            for row in self.images
        ]
        name = self.columns[number] if self.columns else f"column {number}"
        return ImageGrid(
            rows, self.columns, self.rows, f"{self.title}\ndifference from {name}".strip()
        )

    def to_gif(self, path: str | os.PathLike | None = None, *, seconds: float = 0.5) -> "Gif":
        """The columns one after another, all rows below each other.

        Args:
            path: where to write it, or None.
            seconds: that each column is shown.
        """
        frames = [
            ImageGrid(
                [[row[x]] for row in self.images], self.columns[x : x + 1], self.rows, self.title
            ).picture()
            for x in range(len(self.images[0]))
        ]
        size = tuple(map(max, zip(*(frame.size for frame in frames), strict=True)))
        frames = [
            ImageOps.pad(frame, size, color=_PAPER, centering=(0.5, 1))
            if frame.size != size
            else frame
            for frame in frames
        ]
        made = io.BytesIO()
        frames[0].save(
            made,
            "GIF",
            save_all=True,
            append_images=frames[1:],
            duration=round(1000 * seconds),
            loop=0,
        )
        gif = Gif(made.getvalue(), f"An animation, one column after another. {self.alt}")
        if path is not None:
            Path(path).parent.mkdir(parents=True, exist_ok=True)
            Path(path).write_bytes(gif.data)
        return gif

    def _laid_out(self, reduced: bool) -> tuple[Image.Image, list]:
        """The sheet, and where each image is on it: left, top, right, bottom, and its own width and height."""
        shown = [[image and _shown(image, reduced) for image in row] for row in self.images]
        sizes = [image.size for row in shown for image in row if image] or [(SMALLEST, SMALLEST)]
        cell_w, cell_h = (max(edges) for edges in zip(*sizes, strict=True))
        font = _font(max(12, min(cell_w, LARGEST) // 11))
        heads = [_wrapped(label, font, cell_w) for label in self.columns]
        sides = [_wrapped(label, font, max(cell_w, 150)) for label in self.rows]
        line = font.size + 4
        cell_h = max([cell_h, *(line * (side.count("\n") + 1) for side in sides)])
        left = _MARGIN + (_widest(sides, font) + _GAP if sides else 0)
        right = left + len(self.images[0]) * (cell_w + _GAP) - _GAP + _MARGIN
        title = _wrapped(self.title, font, right - 2 * _MARGIN) if self.title else ""
        top = _MARGIN + (line * (title.count("\n") + 1) + _GAP if title else 0)
        first = top + (max(h.count("\n") for h in heads) + 1) * line + _GAP if heads else top
        sheet = Image.new(
            "RGB", (right, first + len(self.images) * (cell_h + _GAP) - _GAP + _MARGIN), _PAPER
        )
        draw = ImageDraw.Draw(sheet)
        draw.multiline_text((_MARGIN, _MARGIN), title, _TEXT, font)
        for x, head in enumerate(heads):
            draw.multiline_text(
                (left + x * (cell_w + _GAP) + cell_w / 2, first - _GAP),
                head,
                _TEXT,
                font,
                anchor="md",
                align="center",
            )
        places = []
        for y, row in enumerate(shown):
            if sides:
                draw.multiline_text(
                    (left - _GAP, first + y * (cell_h + _GAP) + cell_h / 2),
                    sides[y],
                    _TEXT,
                    font,
                    anchor="rm",
                    align="right",
                )
            places.append(
                [
                    self._placed(
                        sheet,
                        draw,
                        image,
                        self.images[y][x],
                        (left + x * (cell_w + _GAP), first + y * (cell_h + _GAP), cell_w, cell_h),
                    )
                    for x, image in enumerate(row)
                ]
            )
        return sheet, places

    @staticmethod
    def _placed(
        sheet, draw, shown: Image.Image | None, image: Image.Image | None, cell: tuple
    ) -> list | None:
        """Put an image in the middle of its cell (left, top, width, height), or a frame where there is none."""
        left, top, wide, high = cell
        if shown is None:
            draw.rectangle((left, top, left + wide - 1, top + high - 1), outline=_FRAME)
            return None
        left, top = left + (wide - shown.width) // 2, top + (high - shown.height) // 2
        sheet.paste(shown, (left, top))
        return [left, top, left + shown.width, top + shown.height, *image.size]

    def _repr_png_(self) -> bytes:
        encoded, picture = io.BytesIO(), self.picture()
        sizes = [max(image.size) for row in self.images for image in row if image]
        if (
            min(sizes, default=0) < SMALLEST
        ):  # a drawing enlarged: 256 colours hold it in a third of the bytes
            picture = picture.quantize(256, dither=Image.Dither.NONE)
        picture.save(encoded, "PNG", optimize=True)
        return encoded.getvalue()

    def _repr_mimebundle_(self, include=None, exclude=None) -> tuple[dict, dict]:
        return mime.bundle(self._repr_png_(), self.alt)


@dataclass(frozen=True)
class Gif:
    """An animation that shows itself.

    Attributes:
        data: the GIF's bytes.
        alt: what it shows, in words.
    """

    data: bytes = field(repr=False)
    alt: str

    def _repr_mimebundle_(self, include=None, exclude=None) -> tuple[dict, dict]:
        data = {"image/gif": base64.b64encode(self.data).decode(), "text/plain": self.alt}
        return data, {"image/gif": {"alt": self.alt}}


@cache
def _font(size: int) -> ImageFont.FreeTypeFont:
    """DejaVu Sans, which comes with matplotlib and has letters like ‖ and Δ."""
    return ImageFont.truetype(f"{matplotlib.get_data_path()}/fonts/ttf/DejaVuSans.ttf", size)


def _counted(number: int, what: str) -> str:
    return f"{number} {what}{'s' * (number != 1)}"


def _shown(image: Image.Image, reduced: bool) -> Image.Image:
    """The image at the size it is shown in."""
    longer = max(image.size)
    if longer > LARGEST and reduced:
        return ImageOps.contain(image.convert("RGB"), (LARGEST, LARGEST), Image.LANCZOS)
    zoom = max(1, round(SMALLEST / longer))
    return image.convert("RGB").resize((image.width * zoom, image.height * zoom), Image.NEAREST)


def _wrapped(label: str, font, width: int) -> str:
    """The label broken into lines that fit `width` pixels; its own lines stay."""
    letters = max(4, int(width / (font.getlength("abcdefghij") / 10)))
    while True:
        lines = [line for part in str(label).splitlines() for line in textwrap.wrap(part, letters)]
        if letters <= 4 or all(font.getlength(line) <= width for line in lines):
            return "\n".join(lines) or " "
        letters -= 1


def _widest(labels: Sequence[str], font) -> int:
    return math.ceil(max(font.getlength(line) for label in labels for line in label.split("\n")))
