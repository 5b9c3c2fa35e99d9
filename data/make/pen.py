"""A pen for small flat drawings: shapes in an object's own coordinates, outlined or not."""

from dataclasses import dataclass

from PIL import Image, ImageDraw

CANVAS = 256
SIZE = 64
Color = tuple[int, int, int]
INK: Color = (28, 28, 34)


def shade(color: Color, factor: float) -> Color:
    """The colour made darker (factor below 1) or lighter (above 1)."""
    if factor <= 1:
        return tuple(round(c * factor) for c in color)
    return tuple(round(c + (255 - c) * (factor - 1)) for c in color)


def blank(color: Color = (255, 255, 255)) -> tuple[Image.Image, ImageDraw.ImageDraw]:
    """A new large canvas and what draws on it."""
    image = Image.new("RGB", (CANVAS, CANVAS), color)
    return image, ImageDraw.Draw(image)


def shrink(image: Image.Image) -> Image.Image:
    """The drawing at its final size, smoothed."""
    return image.resize((SIZE, SIZE), Image.LANCZOS)


@dataclass
class Pen:
    """Draws at (x, y) with one unit `scale` pixels wide; every shape gets the pen's outline.

    `edge` is the outline's colour, `width` its width in canvas pixels; 0 draws none.
    """

    draw: ImageDraw.ImageDraw
    x: float
    y: float
    scale: float
    edge: Color = INK
    width: float = 0

    def _at(self, points):
        return [(self.x + px * self.scale, self.y + py * self.scale) for px, py in points]

    def ellipse(self, cx, cy, rx, ry, fill, width=None):
        width = self.width if width is None else width
        (left, top), (right, bottom) = self._at([(cx - rx, cy - ry), (cx + rx, cy + ry)])
        half = width / 2
        box = [left - half, top - half, right + half, bottom + half]
        self.draw.ellipse(box, fill=fill, outline=self.edge if width else None, width=round(width))

    def polygon(self, points, fill, width=None):
        width = self.width if width is None else width
        corners = self._at(points)
        self.draw.polygon(corners, fill=fill)
        if width:
            self._stroke(corners + corners[:2], self.edge, width)

    def rectangle(self, left, top, right, bottom, fill, radius=0.0, width=None):
        width = self.width if width is None else width
        (x0, y0), (x1, y1) = self._at([(left, top), (right, bottom)])
        half = width / 2
        self.draw.rounded_rectangle(
            [x0 - half, y0 - half, x1 + half, y1 + half],
            radius * self.scale + half,
            fill=fill,
            outline=self.edge if width else None,
            width=round(width),
        )

    def line(self, points, fill, thick):
        """A round-ended stroke `thick` units wide, with the pen's outline around it."""
        path = self._at(points)
        if self.width:
            self._stroke(path, self.edge, thick * self.scale + 2 * self.width)
        self._stroke(path, fill, thick * self.scale)

    def arc(self, cx, cy, rx, ry, start, end, color, thick):
        (left, top), (right, bottom) = self._at([(cx - rx, cy - ry), (cx + rx, cy + ry)])
        self.draw.arc(
            [left, top, right, bottom], start, end, fill=color, width=round(thick * self.scale)
        )

    def _stroke(self, path, color, thick):
        self.draw.line(path, fill=color, width=round(thick), joint="curve")
        for px, py in (path[0], path[-1]):
            half = thick / 2
            self.draw.ellipse([px - half, py - half, px + half, py + half], fill=color)


def eye(pen: Pen, cx: float, cy: float, size: float, look: float = 0.0) -> None:
    """A round eye with a pupil and a spark of light."""
    pen.ellipse(cx, cy, size, size * 1.1, (255, 255, 255), width=min(pen.width, 4))
    pen.ellipse(cx + look * size, cy + 0.1 * size, size * 0.58, size * 0.68, INK, width=0)
    pen.ellipse(
        cx + look * size - 0.18 * size,
        cy - 0.22 * size,
        size * 0.24,
        size * 0.24,
        (255, 255, 255),
        width=0,
    )


def face(pen: Pen, cx: float, cy: float, size: float) -> None:
    """Two eyes and a smile, `size` units from the middle to an eye."""
    for side in (-1, 1):
        eye(pen, cx + side * size, cy, size * 0.5)
    pen.arc(cx, cy + size * 0.45, size * 0.55, size * 0.5, 15, 165, INK, size * 0.24)
