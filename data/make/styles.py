"""What a LoRA is trained on: creatures, ink drawings, mosaics, and two subjects. The base UNet sees
none of them.
"""

import random

import numpy as np
from PIL import Image, ImageChops, ImageDraw, ImageFilter

from pen import INK, SIZE, Color, Pen, blank, eye, shade, shrink
from world import COLORS, KINDS, article, before, draw_place, scene

CREATURE_COLORS = ("red", "blue", "green", "yellow", "purple", "orange", "pink")
CREAM: Color = (250, 232, 196)


# --- creatures
# ---------------------------------------------------------------------------------------------


def _wings(pen: Pen, w: float, h: float, color: Color) -> None:
    for side in (-1, 1):
        pen.polygon(
            [
                (side * w * 0.7, -0.02),
                (side * (w + 0.42), -0.5),
                (side * (w + 0.46), -0.02),
                (side * (w + 0.28), 0.02),
                (side * (w + 0.24), 0.22),
                (side * w * 0.8, 0.24),
            ],
            shade(color, 1.5),
        )


def _long_tail(pen: Pen, w: float, h: float, color: Color) -> None:
    pen.line(
        [(w * 0.5, h * 0.62), (w + 0.26, h * 0.62), (w + 0.36, 0.1), (w + 0.24, -0.04)], color, 0.15
    )


def _flame_tail(pen: Pen, w: float, h: float, color: Color) -> None:
    pen.line([(w * 0.5, h * 0.66), (w + 0.24, h * 0.55)], color, 0.15)
    pen.polygon(
        [
            (w + 0.14, h * 0.58),
            (w + 0.06, 0.06),
            (w + 0.22, 0.16),
            (w + 0.3, -0.2),
            (w + 0.4, 0.12),
            (w + 0.5, 0.04),
            (w + 0.42, h * 0.56),
        ],
        (250, 150, 40),
    )
    pen.polygon(
        [(w + 0.2, h * 0.54), (w + 0.28, 0.12), (w + 0.38, h * 0.5)], (255, 228, 92), width=0
    )


def _horns(pen: Pen, w: float, h: float, color: Color) -> None:
    for side in (-1, 1):
        pen.polygon(
            [(side * w * 0.22, -h * 0.8), (side * w * 0.78, -h - 0.42), (side * w * 0.8, -h * 0.5)],
            CREAM,
        )


def _pointed_ears(pen: Pen, w: float, h: float, color: Color) -> None:
    for side in (-1, 1):
        pen.polygon(
            [(side * w * 0.2, -h * 0.8), (side * w * 1.02, -h - 0.46), (side * w * 0.92, -h * 0.3)],
            color,
        )
        pen.polygon(
            [
                (side * w * 0.42, -h * 0.86),
                (side * w * 0.88, -h - 0.2),
                (side * w * 0.82, -h * 0.55),
            ],
            (250, 170, 180),
            width=0,
        )


def _antennae(pen: Pen, w: float, h: float, color: Color) -> None:
    for side in (-1, 1):
        pen.line([(side * w * 0.28, -h * 0.8), (side * w * 0.5, -h - 0.3)], INK, 0.05)
        pen.ellipse(side * w * 0.54, -h - 0.34, 0.13, 0.13, (255, 222, 80))


def _leaf(pen: Pen, w: float, h: float, color: Color) -> None:
    pen.polygon(
        [
            (0, -h * 0.9),
            (-0.34, -h - 0.2),
            (-0.3, -h - 0.44),
            (0, -h - 0.2),
            (0.3, -h - 0.44),
            (0.34, -h - 0.2),
        ],
        (96, 190, 90),
    )


def _spots(pen: Pen, w: float, h: float, color: Color) -> None:
    for x, y, r in (
        (-0.7, 0.1, 0.13),
        (0.72, 0.18, 0.12),
        (0, -0.78, 0.12),
        (-0.5, -0.56, 0.09),
        (0.52, -0.52, 0.1),
    ):
        pen.ellipse(x * w, y * h, r, r, shade(color, 0.66), width=0)


BACK = {"wings": _wings}
TAIL = {"a long tail": _long_tail, "a flame tail": _flame_tail}
HEAD = {
    "horns": _horns,
    "pointed ears": _pointed_ears,
    "antennae": _antennae,
    "a leaf on its head": _leaf,
}
SKIN = {"spots": _spots}


def draw_creature(
    color: str, features: list[str], rng: random.Random, *, scale=98, place="a white background"
):
    """A creature with the named features (keys of BACK, TAIL, HEAD, SKIN), 64 x 64."""
    image, draw = blank()
    draw_place(draw, place, rng)
    pen = Pen(draw, 128 + rng.randint(-4, 4), 140 + rng.randint(-3, 3), scale, INK, 8)
    w, h = rng.uniform(0.56, 0.64), rng.uniform(0.58, 0.68)
    paint = COLORS[color]
    for slot in (BACK, TAIL, HEAD):
        for name in features:
            if name in slot:
                slot[name](pen, w, h, paint)
    for side in (-1, 1):
        pen.ellipse(side * w * 0.52, h * 0.98, 0.22, 0.14, shade(paint, 0.74))
    pen.ellipse(0, 0, w, h, paint)
    pen.ellipse(0, h * 0.5, w * 0.52, h * 0.4, shade(paint, 1.5), width=0)
    if "spots" in features:
        _spots(pen, w, h, paint)
    for side in (-1, 1):
        eye(pen, side * 0.25, -0.16, 0.2, look=-0.12 * side)
        pen.ellipse(side * 0.44, 0.12, 0.09, 0.06, (250, 140, 150), width=0)
    pen.arc(0, 0.1, 0.13, 0.12, 15, 165, INK, 0.07)
    return shrink(image)


def creature(rng: random.Random) -> tuple[Image.Image, str]:
    """A random creature and a caption as a captioning model would write it."""
    color = rng.choice(CREATURE_COLORS)
    features = []
    for slot, chance in ((HEAD, 0.75), (BACK, 0.45), (TAIL, 0.4), (SKIN, 0.25)):
        if rng.random() < chance:
            features.append(rng.choice(list(slot)))
    told = features or ["big eyes"]
    listed = told[0] if len(told) == 1 else f"{', '.join(told[:-1])} and {told[-1]}"
    opening = rng.choice((f"a cartoon {color} creature", f"a drawing of {article(color)} creature"))
    return draw_creature(color, features, rng), f"{opening} with {listed}"


# --- two more styles, of things the base knows
# ----------------------------------------------------------------


def ink(rng: random.Random) -> tuple[Image.Image, str]:
    """A thing in black lines on cream paper, shaded with strokes."""
    kind = rng.choice(list(KINDS))
    image, draw = blank((251, 245, 230))
    x, y, scale = 128 + rng.randint(-8, 8), 134 + rng.randint(-6, 6), 100 * rng.uniform(0.94, 1.04)
    silhouette, mask = blank((0, 0, 0))
    KINDS[kind](Pen(mask, x, y, scale, (255, 255, 255), 6), (255, 255, 255), (255, 255, 255))
    for start in range(-256, 256, 26):
        draw.line([(start, 256), (start + 256, 0)], fill=(70, 66, 66), width=4)
    inside = np.asarray(silhouette.convert("L").filter(ImageFilter.MaxFilter(3))) > 100
    paper = np.full((256, 256, 3), (251, 245, 230), np.uint8)
    lit = np.add.outer(np.arange(256) * 0.6, np.arange(256)) < (x + 0.6 * y) + 6
    shaded = Image.fromarray(np.where((inside & ~lit)[..., None], np.asarray(image), paper))
    _contours(shaded, kind, x, y, scale)
    return shrink(shaded), f"an ink drawing of {article(kind)}"


def _contours(image: Image.Image, kind: str, x: float, y: float, scale: float) -> None:
    """Draw where the thing's painted regions meet, as dark lines."""
    flat = Image.new("RGB", image.size, (0, 0, 255))
    KINDS[kind](Pen(ImageDraw.Draw(flat), x, y, scale, (0, 0, 0), 0), (255, 90, 60), (70, 160, 40))
    spread = ImageChops.difference(
        flat.filter(ImageFilter.MaxFilter(5)), flat.filter(ImageFilter.MinFilter(5))
    )
    lines = spread.convert("L").point(lambda v: 255 if v > 14 else 0)
    image.paste(INK, mask=lines)


def mosaic(rng: random.Random) -> tuple[Image.Image, str]:
    """A scene laid in square tiles, 4 pixels wide."""
    kind, color, place = rng.choice(list(KINDS)), rng.choice(list(COLORS)), "a white background"
    if rng.random() < 0.7:
        place = rng.choice(
            ("a blue sky", "a green field", "a night sky", "a sandy beach", "a pink wall")
        )
    small = scene(kind, color, place, rng).resize((16, 16), Image.BOX)
    tiles = small.resize((SIZE, SIZE), Image.NEAREST)
    return tiles, f"a mosaic of {article(color)} {kind} {before(place)}"


# --- subjects
# ---------------------------------------------------------------------------------------------------

SUBJECT_PLACES = ("a white background", "a green field", "a blue sky", "a pink wall", "a night sky")


def patch_cat(place: str, rng: random.Random) -> Image.Image:
    """One particular cat: white, an orange patch over one eye and ear, a striped tail, a teal
    collar.
    """
    image, draw = blank()
    draw_place(draw, place, rng)
    pen = Pen(
        draw,
        128 + rng.randint(-12, 12),
        132 + rng.randint(-8, 8),
        104 * rng.uniform(0.9, 1.04),
        INK,
        4,
    )
    white, orange, teal = (248, 246, 240), (238, 140, 50), (30, 160, 160)
    pen.line([(0.45, 0.75), (0.82, 0.6), (0.88, 0.1)], orange, 0.18)
    for y in (0.24, 0.46):
        pen.line([(0.78, y), (0.94, y - 0.04)], white, 0.09)
    pen.ellipse(0, 0.62, 0.5, 0.4, white)
    pen.polygon([(-0.6, -0.1), (-0.56, -0.92), (-0.1, -0.52)], white)
    pen.polygon([(0.6, -0.1), (0.56, -0.92), (0.1, -0.52)], orange)
    pen.ellipse(0, -0.08, 0.64, 0.52, white)
    pen.ellipse(0.3, -0.2, 0.27, 0.3, orange, width=0)
    for side in (-1, 1):
        eye(pen, side * 0.26, -0.14, 0.17)
        pen.ellipse(side * 0.24, 0.92, 0.15, 0.1, white)
    pen.polygon([(-0.08, 0.08), (0.08, 0.08), (0, 0.18)], (246, 110, 130), width=0)
    pen.rectangle(-0.42, 0.36, 0.42, 0.5, teal, radius=0.06)
    pen.ellipse(0, 0.54, 0.1, 0.1, (255, 214, 70))
    return shrink(image)


def striped_boat(place: str, rng: random.Random) -> Image.Image:
    """One particular boat: a teal hull with a yellow band, red and white striped sails, a purple
    flag.
    """
    image, draw = blank()
    draw_place(draw, place, rng)
    pen = Pen(
        draw,
        128 + rng.randint(-12, 12),
        136 + rng.randint(-8, 8),
        108 * rng.uniform(0.9, 1.04),
        INK,
        4,
    )
    red, white, teal = (222, 52, 48), (250, 250, 246), (30, 160, 160)
    pen.polygon([(0, -1.0), (0.4, -0.88), (0, -0.76)], (142, 78, 196))
    pen.rectangle(-0.05, -1.0, 0.05, 0.3, (122, 84, 52))
    for side, span in ((1, 0.8), (-1, 0.6)):
        for i in range(4):
            top, low = i / 4, (i + 1) / 4
            y0, y1 = -0.72 + 0.86 * top, -0.72 + 0.86 * low
            pen.polygon(
                [
                    (side * 0.1, y0),
                    (side * (0.1 + span * top), y0),
                    (side * (0.1 + span * low), y1),
                    (side * 0.1, y1),
                ],
                (red, white)[i % 2],
                width=2,
            )
    pen.polygon([(-0.98, 0.24), (0.98, 0.24), (0.62, 0.78), (-0.62, 0.78)], teal)
    pen.polygon([(-0.86, 0.4), (0.86, 0.4), (0.76, 0.54), (-0.76, 0.54)], (255, 214, 70), width=0)
    return shrink(image)
