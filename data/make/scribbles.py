"""Pictures of nothing in particular, so that the VAE learns to hold any drawing and not only our
own.
"""

import math
import random

import numpy as np
from PIL import Image

from pen import CANVAS, INK, SIZE, Pen, blank, eye, shade, shrink


def _color(rng: random.Random):
    return tuple(rng.randint(20, 255) for _ in range(3))


def _corners(rng: random.Random, count: int):
    spin = rng.uniform(0, 2 * math.pi)
    return [
        (
            rng.uniform(0.4, 1) * math.cos(spin + i * 2 * math.pi / count),
            rng.uniform(0.4, 1) * math.sin(spin + i * 2 * math.pi / count),
        )
        for i in range(count)
    ]


def shapes(rng: random.Random) -> Image.Image:
    """Ellipses, polygons, boxes, strokes, arcs and eyes, with thick, thin or no outlines."""
    image, draw = blank(rng.choice([(255, 255, 255), _color(rng)]))
    style = rng.choice([0, 3, 8])
    for _ in range(rng.randint(3, 9)):
        fill = _color(rng)
        pen = Pen(
            draw,
            rng.randint(20, CANVAS - 20),
            rng.randint(20, CANVAS - 20),
            rng.choice([18, 30, 46, 80]),
            INK if style == 8 else shade(fill, 0.6),
            style,
        )
        kind = rng.randrange(6)
        if kind == 0:
            pen.ellipse(0, 0, rng.uniform(0.4, 1), rng.uniform(0.4, 1), fill)
        elif kind == 1:
            pen.polygon(_corners(rng, rng.randint(3, 6)), fill)
        elif kind == 2:
            pen.rectangle(
                -rng.uniform(0.3, 1),
                -rng.uniform(0.3, 1),
                rng.uniform(0.3, 1),
                rng.uniform(0.3, 1),
                fill,
                0.1,
            )
        elif kind == 3:
            pen.line(_corners(rng, 3), fill, rng.uniform(0.1, 0.3))
        elif kind == 4:
            pen.arc(
                0,
                0,
                rng.uniform(0.4, 1),
                rng.uniform(0.4, 1),
                rng.randint(0, 180),
                rng.randint(181, 360),
                fill,
                0.15,
            )
        else:
            for side in (-1, 1):
                eye(pen, side * 0.5, 0, rng.uniform(0.2, 0.45))
    return shrink(image)


def tiles(rng: random.Random) -> Image.Image:
    """A few flat colours laid as square tiles, 2, 4 or 8 pixels wide."""
    side = SIZE // rng.choice([2, 4, 8])
    palette = np.array([_color(rng) for _ in range(rng.randint(2, 6))], np.uint8)
    coarse = np.array(
        [[rng.randrange(len(palette)) for _ in range(side // 2)] for _ in range(side // 2)]
    )
    mosaic = Image.fromarray(palette[coarse.repeat(2, 0).repeat(2, 1)])
    return mosaic.resize((SIZE, SIZE), Image.NEAREST)


def strokes(rng: random.Random) -> Image.Image:
    """Thin dark lines on paper."""
    image, draw = blank(rng.choice([(255, 255, 255), (250, 244, 230)]))
    for _ in range(rng.randint(6, 22)):
        x, y = rng.randint(0, CANVAS), rng.randint(0, CANVAS)
        pen = Pen(draw, x, y, rng.randint(20, 70), width=0)
        ink = shade(INK, rng.uniform(1, 1.3))
        if rng.random() < 0.5:
            pen.line(_corners(rng, rng.randint(2, 5)), ink, 5 / pen.scale)
        else:
            pen.arc(0, 0, 1, rng.uniform(0.4, 1), 0, rng.randint(60, 360), ink, 5 / pen.scale)
    return shrink(image)


def scribble(rng: random.Random) -> Image.Image:
    """One random picture of any of the three sorts."""
    return rng.choices((shapes, tiles, strokes), (6, 1, 1))[0](rng)
