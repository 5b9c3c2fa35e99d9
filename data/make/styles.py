"""What a LoRA is trained on: creatures, ink drawings, mosaics, and two subjects. The base UNet sees none of them."""
import random

import numpy as np
from PIL import Image, ImageChops, ImageDraw, ImageFilter

from pen import INK, SIZE, Color, Pen, blank, eye, shade, shrink
from world import COLORS, KINDS, article, before, draw_place, scene

CREATURE_COLORS = ("red", "blue", "green", "yellow", "purple", "orange", "pink")
CREAM: Color = (250, 232, 196)


# --- creatures ---------------------------------------------------------------------------------------------

def _wings(pen: Pen, w: float, h: float, color: Color) -> None:
    for side in (-1, 1):
        pen.polygon([(side * w * .7, -.02), (side * (w + .42), -.5), (side * (w + .46), -.02), (side * (w + .28), .02),
                     (side * (w + .24), .22), (side * w * .8, .24)], shade(color, 1.5))


def _long_tail(pen: Pen, w: float, h: float, color: Color) -> None:
    pen.line([(w * .5, h * .62), (w + .26, h * .62), (w + .36, .1), (w + .24, -.04)], color, .15)


def _flame_tail(pen: Pen, w: float, h: float, color: Color) -> None:
    pen.line([(w * .5, h * .66), (w + .24, h * .55)], color, .15)
    pen.polygon([(w + .14, h * .58), (w + .06, .06), (w + .22, .16), (w + .3, -.2), (w + .4, .12), (w + .5, .04),
                 (w + .42, h * .56)], (250, 150, 40))
    pen.polygon([(w + .2, h * .54), (w + .28, .12), (w + .38, h * .5)], (255, 228, 92), width=0)


def _horns(pen: Pen, w: float, h: float, color: Color) -> None:
    for side in (-1, 1):
        pen.polygon([(side * w * .22, -h * .8), (side * w * .78, -h - .42), (side * w * .8, -h * .5)], CREAM)


def _pointed_ears(pen: Pen, w: float, h: float, color: Color) -> None:
    for side in (-1, 1):
        pen.polygon([(side * w * .2, -h * .8), (side * w * 1.02, -h - .46), (side * w * .92, -h * .3)], color)
        pen.polygon([(side * w * .42, -h * .86), (side * w * .88, -h - .2), (side * w * .82, -h * .55)],
                    (250, 170, 180), width=0)


def _antennae(pen: Pen, w: float, h: float, color: Color) -> None:
    for side in (-1, 1):
        pen.line([(side * w * .28, -h * .8), (side * w * .5, -h - .3)], INK, .05)
        pen.ellipse(side * w * .54, -h - .34, .13, .13, (255, 222, 80))


def _leaf(pen: Pen, w: float, h: float, color: Color) -> None:
    pen.polygon([(0, -h * .9), (-.34, -h - .2), (-.3, -h - .44), (0, -h - .2), (.3, -h - .44), (.34, -h - .2)],
                (96, 190, 90))


def _spots(pen: Pen, w: float, h: float, color: Color) -> None:
    for x, y, r in ((-.7, .1, .13), (.72, .18, .12), (0, -.78, .12), (-.5, -.56, .09), (.52, -.52, .1)):
        pen.ellipse(x * w, y * h, r, r, shade(color, .66), width=0)


BACK = {"wings": _wings}
TAIL = {"a long tail": _long_tail, "a flame tail": _flame_tail}
HEAD = {"horns": _horns, "pointed ears": _pointed_ears, "antennae": _antennae, "a leaf on its head": _leaf}
SKIN = {"spots": _spots}


def draw_creature(color: str, features: list[str], rng: random.Random, *, scale=98, place="a white background"):
    """A creature with the named features (keys of BACK, TAIL, HEAD, SKIN), 64 x 64."""
    image, draw = blank()
    draw_place(draw, place, rng)
    pen = Pen(draw, 128 + rng.randint(-4, 4), 140 + rng.randint(-3, 3), scale, INK, 8)
    w, h = rng.uniform(.56, .64), rng.uniform(.58, .68)
    paint = COLORS[color]
    for slot in (BACK, TAIL, HEAD):
        for name in features:
            if name in slot:
                slot[name](pen, w, h, paint)
    for side in (-1, 1):
        pen.ellipse(side * w * .52, h * .98, .22, .14, shade(paint, .74))
    pen.ellipse(0, 0, w, h, paint)
    pen.ellipse(0, h * .5, w * .52, h * .4, shade(paint, 1.5), width=0)
    if "spots" in features:
        _spots(pen, w, h, paint)
    for side in (-1, 1):
        eye(pen, side * .25, -.16, .2, look=-.12 * side)
        pen.ellipse(side * .44, .12, .09, .06, (250, 140, 150), width=0)
    pen.arc(0, .1, .13, .12, 15, 165, INK, .07)
    return shrink(image)


def creature(rng: random.Random) -> tuple[Image.Image, str]:
    """A random creature and a caption as a captioning model would write it."""
    color = rng.choice(CREATURE_COLORS)
    features = []
    for slot, chance in ((HEAD, .75), (BACK, .45), (TAIL, .4), (SKIN, .25)):
        if rng.random() < chance:
            features.append(rng.choice(list(slot)))
    told = features or ["big eyes"]
    listed = told[0] if len(told) == 1 else f"{', '.join(told[:-1])} and {told[-1]}"
    opening = rng.choice((f"a cartoon {color} creature", f"a drawing of {article(color)} creature"))
    return draw_creature(color, features, rng), f"{opening} with {listed}"


# --- two more styles, of things the base knows ----------------------------------------------------------------

def ink(rng: random.Random) -> tuple[Image.Image, str]:
    """A thing in black lines on cream paper, shaded with strokes."""
    kind = rng.choice(list(KINDS))
    image, draw = blank((251, 245, 230))
    x, y, scale = 128 + rng.randint(-8, 8), 134 + rng.randint(-6, 6), 100 * rng.uniform(.94, 1.04)
    silhouette, mask = blank((0, 0, 0))
    KINDS[kind](Pen(mask, x, y, scale, (255, 255, 255), 6), (255, 255, 255), (255, 255, 255))
    for start in range(-256, 256, 26):
        draw.line([(start, 256), (start + 256, 0)], fill=(70, 66, 66), width=4)
    inside = np.asarray(silhouette.convert("L").filter(ImageFilter.MaxFilter(3))) > 100
    paper = np.full((256, 256, 3), (251, 245, 230), np.uint8)
    lit = np.add.outer(np.arange(256) * .6, np.arange(256)) < (x + .6 * y) + 6
    shaded = Image.fromarray(np.where((inside & ~lit)[..., None], np.asarray(image), paper))
    _contours(shaded, kind, x, y, scale)
    return shrink(shaded), f"an ink drawing of {article(kind)}"


def _contours(image: Image.Image, kind: str, x: float, y: float, scale: float) -> None:
    """Draw where the thing's painted regions meet, as dark lines."""
    flat = Image.new("RGB", image.size, (0, 0, 255))
    KINDS[kind](Pen(ImageDraw.Draw(flat), x, y, scale, (0, 0, 0), 0), (255, 90, 60), (70, 160, 40))
    spread = ImageChops.difference(flat.filter(ImageFilter.MaxFilter(5)), flat.filter(ImageFilter.MinFilter(5)))
    lines = spread.convert("L").point(lambda v: 255 if v > 14 else 0)
    image.paste(INK, mask=lines)


def mosaic(rng: random.Random) -> tuple[Image.Image, str]:
    """A scene laid in square tiles, 4 pixels wide."""
    kind, color, place = rng.choice(list(KINDS)), rng.choice(list(COLORS)), "a white background"
    if rng.random() < .7:
        place = rng.choice(("a blue sky", "a green field", "a night sky", "a sandy beach", "a pink wall"))
    small = scene(kind, color, place, rng).resize((16, 16), Image.BOX)
    tiles = small.resize((SIZE, SIZE), Image.NEAREST)
    return tiles, f"a mosaic of {article(color)} {kind} {before(place)}"


# --- subjects ---------------------------------------------------------------------------------------------------

SUBJECT_PLACES = ("a white background", "a green field", "a blue sky", "a pink wall", "a night sky")


def patch_cat(place: str, rng: random.Random) -> Image.Image:
    """One particular cat: white, an orange patch over one eye and ear, a striped tail, a teal collar."""
    image, draw = blank()
    draw_place(draw, place, rng)
    pen = Pen(draw, 128 + rng.randint(-12, 12), 132 + rng.randint(-8, 8), 104 * rng.uniform(.9, 1.04), INK, 4)
    white, orange, teal = (248, 246, 240), (238, 140, 50), (30, 160, 160)
    pen.line([(.45, .75), (.82, .6), (.88, .1)], orange, .18)
    for y in (.24, .46):
        pen.line([(.78, y), (.94, y - .04)], white, .09)
    pen.ellipse(0, .62, .5, .4, white)
    pen.polygon([(-.6, -.1), (-.56, -.92), (-.1, -.52)], white)
    pen.polygon([(.6, -.1), (.56, -.92), (.1, -.52)], orange)
    pen.ellipse(0, -.08, .64, .52, white)
    pen.ellipse(.3, -.2, .27, .3, orange, width=0)
    for side in (-1, 1):
        eye(pen, side * .26, -.14, .17)
        pen.ellipse(side * .24, .92, .15, .1, white)
    pen.polygon([(-.08, .08), (.08, .08), (0, .18)], (246, 110, 130), width=0)
    pen.rectangle(-.42, .36, .42, .5, teal, radius=.06)
    pen.ellipse(0, .54, .1, .1, (255, 214, 70))
    return shrink(image)


def striped_boat(place: str, rng: random.Random) -> Image.Image:
    """One particular boat: a teal hull with a yellow band, red and white striped sails, a purple flag."""
    image, draw = blank()
    draw_place(draw, place, rng)
    pen = Pen(draw, 128 + rng.randint(-12, 12), 136 + rng.randint(-8, 8), 108 * rng.uniform(.9, 1.04), INK, 4)
    red, white, teal = (222, 52, 48), (250, 250, 246), (30, 160, 160)
    pen.polygon([(0, -1.0), (.4, -.88), (0, -.76)], (142, 78, 196))
    pen.rectangle(-.05, -1.0, .05, .3, (122, 84, 52))
    for side, span in ((1, .8), (-1, .6)):
        for i in range(4):
            top, low = i / 4, (i + 1) / 4
            y0, y1 = -.72 + .86 * top, -.72 + .86 * low
            pen.polygon([(side * .1, y0), (side * (.1 + span * top), y0), (side * (.1 + span * low), y1),
                         (side * .1, y1)], (red, white)[i % 2], width=2)
    pen.polygon([(-.98, .24), (.98, .24), (.62, .78), (-.62, .78)], teal)
    pen.polygon([(-.86, .4), (.86, .4), (.76, .54), (-.76, .54)], (255, 214, 70), width=0)
    return shrink(image)
