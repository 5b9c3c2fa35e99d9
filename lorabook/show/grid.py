"""A labelled grid of images that shows itself in a notebook."""

import base64
import io
import json
import math
import os
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache, partial
from pathlib import Path

import matplotlib
from PIL import Image, ImageChops, ImageDraw, ImageFont, ImageOps

from lorabook.show.display import KEY, bundle, png_of, write

SMALLEST, LARGEST = 128, 320  # pixels of a cell's longer side, when shown
_TEXT, _PAPER, _FRAME = (40, 40, 44), (255, 255, 255), (225, 225, 228)
_GAP, _MARGIN = 6, 10


@dataclass
class ImageGrid:
    """Images in rows and columns, with a label for each.

    Attributes:
        images: PIL images as `images[row][column]`; None where there is no image.
        columns, rows: One label each; an empty list draws none.
        title: What stands above, or "".
        settings: What repeats it: for a sweep, the arguments of `sweep`.
    """

    images: list[list[Image.Image | None]] = field(repr=False)
    columns: Sequence[str] = field(default_factory=list)
    rows: Sequence[str] = field(default_factory=list)
    title: str = ""
    settings: Mapping[str, object] = field(default_factory=dict, repr=False)

    def __post_init__(self):
        if not self.images or not self.images[0]:
            raise ValueError("an ImageGrid needs at least one image")
        lengths = [len(row) for row in self.images]
        if len(set(lengths)) > 1:
            raise ValueError(f"every row of an ImageGrid needs as many images; got {lengths}")
        for name, count in (("columns", lengths[0]), ("rows", len(lengths))):
            labels = len(getattr(self, name))
            if labels not in (0, count):
                raise ValueError(
                    f"an ImageGrid with {count} {name} was given {labels} labels for them"
                )

    @property
    def is_whole(self) -> bool:
        """Whether every image is there; a sweep that was interrupted lacks some."""
        return all(image is not None for row in self.images for image in row)

    @property
    def alt(self) -> str:
        """What the grid shows in a sentence of at most 300 letters, for those who do not see it."""
        rows, columns, pixels = len(self.images), len(self.images[0]), "no pixels yet"
        if sizes := [image.size for image in self._present()]:
            width, height = map(max, zip(*sizes, strict=True))
            pixels = f"{width} × {height} pixels"
        counts = f"{rows} row{'s' * (rows != 1)} and {columns} column{'s' * (columns != 1)}"
        labels = {"": [self.title.rstrip(".")], "columns: ": self.columns, "rows: ": self.rows}
        content = "; ".join(
            name + textwrap.shorten(", ".join(texts), 70, placeholder=" …")
            for name, texts in labels.items()
            if any(texts)
        )
        return f"Pictures in {counts}, {pixels} each{': ' if content else ''}{content}."

    def picture(self, *, reduced: bool = True, smallest: int = SMALLEST) -> Image.Image:
        """The whole grid as one image; small images are enlarged, pixel for pixel.

        Args:
            reduced: Make large images smaller; False leaves them as they are.
            smallest: Pixels of a cell's longer side at least, or nearly.
        """
        return self._layout(reduced, smallest)[0]

    def save(self, path: str | os.PathLike) -> Path:
        """Write the grid as a PNG that `load` reads; returns the path.

        Images keep all their pixels; labels and settings stand in the PNG's text.
        """
        sheet, places = self._layout(reduced=False)
        content = {
            "settings": dict(self.settings),
            "columns": list(self.columns),
            "rows": list(self.rows),
            "title": self.title,
            "places": places,
        }
        return write(path, png_of(sheet, content))

    @classmethod
    def load(cls, path: str | os.PathLike) -> "ImageGrid":
        """A grid that `save` wrote: `sweep(pipe, **grid.settings)` repeats a sweep.

        Raises: FileNotFoundError for no such file, ValueError for a picture that is no saved grid.
        """
        if not Path(path).is_file():
            raise FileNotFoundError(f"there is no file {path}")
        try:
            with Image.open(path) as sheet:
                sheet.load()
            content = json.loads(sheet.text[KEY])
            images = [[place and _cut_out(sheet, place) for place in r] for r in content["places"]]
            labels = [content[key] for key in ("columns", "rows", "title", "settings")]
        except (OSError, AttributeError, KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{path} is no grid that ImageGrid.save wrote") from error
        return cls(images, *labels)

    def difference_from(self, column: int | str) -> "ImageGrid":
        """The absolute difference of each image from the one in a column of its row.

        Args:
            column: Its number from 0, or its label.
        Raises: ValueError for a column that is not there, or images of different sizes.
        """
        labels, count = list(self.columns), len(self.images[0])
        number = labels.index(column) if column in labels else column
        if not isinstance(number, int) or isinstance(number, bool) or not -count <= number < count:
            names = ", ".join(labels)
            raise ValueError(f"the grid has no column {column!r:.60}; it has {count}: {names:.250}")
        if len({image.size for image in self._present()}) > 1:
            raise ValueError("the grid's images have different sizes, so they have no difference")
        rows = [[_difference(image, row[number]) for image in row] for row in self.images]
        name = labels[number] if labels else f"column {number}"
        title = f"{self.title}\ndifference from {name}".strip()
        return ImageGrid(rows, self.columns, self.rows, title)

    def to_gif(self, path: str | os.PathLike | None = None, *, seconds: float = 0.5) -> "Gif":
        """The columns one after another, all rows below each other.

        Args:
            path: Where to write it, or None.
            seconds: How long each column is shown.
        """
        frames = []
        for number, column in enumerate(zip(*self.images, strict=True)):
            label = self.columns[number : number + 1]
            grid = ImageGrid([[image] for image in column], label, self.rows, self.title)
            frames.append(grid.picture())
        size = tuple(map(max, zip(*(frame.size for frame in frames), strict=True)))
        first, *others = (ImageOps.pad(f, size, color=_PAPER, centering=(0.5, 1)) for f in frames)
        encoded = io.BytesIO()
        looped = {"save_all": True, "duration": round(1000 * seconds), "loop": 0}
        first.save(encoded, "GIF", append_images=others, **looped)
        gif = Gif(encoded.getvalue(), f"An animation, one column after another. {self.alt}")
        if path is not None:
            write(path, gif.data)
        return gif

    def _present(self) -> list[Image.Image]:
        return [image for row in self.images for image in row if image]

    def _layout(self, reduced: bool, smallest: int = SMALLEST) -> tuple[Image.Image, list]:
        """The sheet, and each image's place on it: its four edges, and its own width and height."""
        shown = [
            [image and _resized(image, reduced, smallest) for image in row] for row in self.images
        ]
        sizes = [image.size for row in shown for image in row if image] or [(SMALLEST, SMALLEST)]
        width, height = (max(edges) for edges in zip(*sizes, strict=True))
        font = _font(max(12, min(width, LARGEST) // 11))
        heads = [_wrap(label, font, width) for label in self.columns]
        sides = [_wrap(label, font, max(width, 150)) for label in self.rows]
        line = font.size + 4
        height = max([height, *(line * _line_count(side) for side in sides)])
        left = _MARGIN + (_text_width(sides, font) + _GAP if sides else 0)
        right = left + len(self.images[0]) * (width + _GAP) - _GAP + _MARGIN
        title = _wrap(self.title, font, right - 2 * _MARGIN) if self.title else ""
        top = _MARGIN + (line * _line_count(title) + _GAP if title else 0)
        top += line * max(map(_line_count, heads)) + _GAP if heads else 0
        bottom = top + len(self.images) * (height + _GAP) - _GAP + _MARGIN

        sheet = Image.new("RGB", (right, bottom), _PAPER)
        draw = ImageDraw.Draw(sheet)
        put = partial(draw.multiline_text, fill=_TEXT, font=font)
        put((_MARGIN, _MARGIN), title)
        xs = [left + x * (width + _GAP) for x in range(len(self.images[0]))]
        ys = [top + y * (height + _GAP) for y in range(len(self.images))]
        for x, head in zip(xs, heads, strict=False):
            put((x + width / 2, top - _GAP), head, anchor="md", align="center")
        for y, side in zip(ys, sides, strict=False):
            put((left - _GAP, y + height / 2), side, anchor="rm", align="right")
        places = [[None] * len(xs) for _ in ys]
        for row, y in enumerate(ys):
            for column, x in enumerate(xs):
                image = shown[row][column]
                if image is None:
                    draw.rectangle((x, y, x + width - 1, y + height - 1), outline=_FRAME)
                    continue
                x0, y0 = x + (width - image.width) // 2, y + (height - image.height) // 2
                sheet.paste(image, (x0, y0))
                edges = [x0, y0, x0 + image.width, y0 + image.height]
                places[row][column] = [*edges, *self.images[row][column].size]
        return sheet, places

    def _repr_png_(self) -> bytes:
        picture = self.picture()
        if min((max(image.size) for image in self._present()), default=0) < SMALLEST:
            # Enlarged drawings: 256 colours hold them in a third of the bytes.
            picture = picture.quantize(256, dither=Image.Dither.NONE)
        return png_of(picture, optimize=True)

    def _repr_mimebundle_(self, include=None, exclude=None) -> tuple[dict, dict]:
        return bundle(self._repr_png_(), self.alt)


@dataclass(frozen=True)
class Gif:
    """An animation that shows itself.

    Attributes:
        data: The GIF's bytes.
        alt: What it shows, in words.
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


def _resized(image: Image.Image, reduced: bool, smallest: int) -> Image.Image:
    """The image at the size in which it is shown."""
    longer = max(image.size)
    if longer > LARGEST and reduced:
        return ImageOps.contain(image.convert("RGB"), (LARGEST, LARGEST), Image.LANCZOS)
    zoom = max(1, round(smallest / longer))
    return image.convert("RGB").resize((image.width * zoom, image.height * zoom), Image.NEAREST)


def _cut_out(sheet: Image.Image, place: Sequence[int]) -> Image.Image:
    """The image at a place, at its own size; a foreign file may name a place that cannot be."""
    left, top, right, bottom, width, height = place
    inside = 0 <= left <= right <= sheet.width and 0 <= top <= bottom <= sheet.height
    if not inside or width > right - left or height > bottom - top:
        raise ValueError(f"there is no image at {place}")
    return sheet.crop((left, top, right, bottom)).resize((width, height), Image.NEAREST)


def _difference(one: Image.Image | None, other: Image.Image | None) -> Image.Image | None:
    return one and other and ImageChops.difference(one.convert("RGB"), other.convert("RGB"))


def _wrap(label: str, font: ImageFont.FreeTypeFont, width: int) -> str:
    """The label broken into lines that fit `width` pixels; its own lines stay."""
    letters = max(4, int(width / (font.getlength("abcdefghij") / 10)))
    while True:
        lines = [line for part in str(label).splitlines() for line in textwrap.wrap(part, letters)]
        if letters <= 4 or all(font.getlength(line) <= width for line in lines):
            return "\n".join(lines) or " "
        letters -= 1


def _line_count(text: str) -> int:
    return text.count("\n") + 1


def _text_width(texts: Sequence[str], font: ImageFont.FreeTypeFont) -> int:
    return math.ceil(max(font.getlength(line) for text in texts for line in text.split("\n")))
