"""A labelled grid of images that shows itself in a notebook."""
import io
import os
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont, ImageOps

_TEXT, _PAPER, _GAP = (40, 40, 44), (255, 255, 255), 6
SMALLEST, LARGEST = 128, 320  # pixels of a cell's longer side, when shown


@dataclass
class ImageGrid:
    """Images in rows and columns, with a label for each.

    Attributes:
        images: PIL images as `images[row][column]`.
        columns, rows: one label each; an empty list draws none.
        title: what stands above, or "".
    """

    images: list[list[Image.Image]]
    columns: Sequence[str] = field(default_factory=list)
    rows: Sequence[str] = field(default_factory=list)
    title: str = ""

    def __post_init__(self):
        if not self.images or not self.images[0]:
            raise ValueError("an ImageGrid needs at least one image")
        if len({len(row) for row in self.images}) > 1:
            raise ValueError(f"every row of an ImageGrid needs as many images; got {[len(r) for r in self.images]}")
        for name, labels, count in (("columns", self.columns, len(self.images[0])), ("rows", self.rows, len(self.images))):
            if labels and len(labels) != count:
                raise ValueError(f"an ImageGrid with {count} {name} was given {len(labels)} labels for them")

    def picture(self) -> Image.Image:
        """The whole grid as one image: small images are enlarged, pixel for pixel, and large ones reduced."""
        cell_w, cell_h = (max(edges) for edges in zip(*(_shown(image).size for row in self.images for image in row),
                                                      strict=True))
        font = ImageFont.load_default(max(13, cell_w // 10))
        left = _widest(self.rows, font, max(cell_w, 150)) + 2 * _GAP if self.rows else _GAP
        heads = [_wrapped(c, font, cell_w) for c in self.columns]
        title = _wrapped(self.title, font, left + len(self.images[0]) * (cell_w + _GAP)) if self.title else ""
        line = font.size + 4
        top = _GAP + (line * (title.count("\n") + 1) + _GAP if title else 0)
        first = top + (max(h.count("\n") for h in heads) + 1) * line + _GAP if heads else top
        sheet = Image.new("RGB", (left + len(self.images[0]) * (cell_w + _GAP),
                                  first + len(self.images) * (cell_h + _GAP)), _PAPER)
        draw = ImageDraw.Draw(sheet)
        if title:
            draw.multiline_text((left, _GAP), title, _TEXT, font)
        for x, head in enumerate(heads):
            draw.multiline_text((left + x * (cell_w + _GAP) + cell_w / 2, first - _GAP), head, _TEXT, font,
                                anchor="md", align="center")
        for y, row in enumerate(self.images):
            if self.rows:
                label = _wrapped(self.rows[y], font, max(cell_w, 150))
                draw.multiline_text((left - _GAP, first + y * (cell_h + _GAP) + cell_h / 2), label, _TEXT, font,
                                    anchor="rm", align="right")
            for x, image in enumerate(row):
                shown = _shown(image)
                sheet.paste(shown, (left + x * (cell_w + _GAP) + (cell_w - shown.width) // 2,
                                    first + y * (cell_h + _GAP) + (cell_h - shown.height) // 2))
        return sheet

    def save(self, path: str | os.PathLike) -> Path:
        """Write the grid as a PNG; returns the path."""
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        self.picture().save(path, "PNG")
        return path

    def _repr_png_(self) -> bytes:
        encoded, picture = io.BytesIO(), self.picture()
        if max(self.images[0][0].size) < SMALLEST:  # a drawing enlarged: 256 colours hold it in a third of the bytes
            picture = picture.quantize(256, dither=Image.Dither.NONE)
        picture.save(encoded, "PNG", optimize=True)
        return encoded.getvalue()


def _shown(image: Image.Image) -> Image.Image:
    """The image at the size it is shown in."""
    longer = max(image.size)
    if longer > LARGEST:
        return ImageOps.contain(image.convert("RGB"), (LARGEST, LARGEST), Image.LANCZOS)
    zoom = max(1, round(SMALLEST / longer))
    return image.convert("RGB").resize((image.width * zoom, image.height * zoom), Image.NEAREST)


def _wrapped(label: str, font, width: int) -> str:
    """The label broken into lines that fit `width` pixels."""
    letters = max(4, int(width / (font.getlength("abcdefghij") / 10)))
    return "\n".join(textwrap.wrap(str(label), letters)) or " "


def _widest(labels: Sequence[str], font, limit: int) -> int:
    lines = [line for label in labels for line in _wrapped(label, font, limit).split("\n")]
    return round(max(font.getlength(line) for line in lines))
