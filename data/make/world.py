"""The base model's world: thirteen kinds of thing, ten colours, six places, drawn flat."""

import math
import random

from PIL import Image

from pen import CANVAS, INK, Color, Pen, blank, eye, face, shade, shrink

COLORS: dict[str, Color] = {
    "red": (222, 52, 48),
    "blue": (48, 108, 222),
    "green": (56, 168, 80),
    "yellow": (246, 208, 48),
    "purple": (142, 78, 196),
    "orange": (244, 140, 36),
    "pink": (246, 130, 178),
    "white": (240, 241, 244),
    "black": (54, 54, 62),
    "brown": (146, 96, 58),
}
PLACES = (
    "a white background",
    "a blue sky",
    "a green field",
    "a night sky",
    "a sandy beach",
    "a pink wall",
)
FACELESS = ("car", "house", "tree", "flower", "boat", "mushroom", "star", "ball")


def article(word: str) -> str:
    """The word with its indefinite article."""
    return f"{'an' if word[0] in 'aeiou' else 'a'} {word}"


def before(place: str) -> str:
    """How a caption says where: on a field or beach, in front of all else."""
    return f"{'on' if place in ('a green field', 'a sandy beach') else 'in front of'} {place}"


def draw_place(draw, place: str, rng: random.Random) -> None:
    horizon = 168 + rng.randint(-10, 10)
    if place == "a green field":
        draw.rectangle([0, 0, CANVAS, CANVAS], fill=(168, 218, 250))
        draw.rectangle([0, horizon, CANVAS, CANVAS], fill=(112, 194, 88))
    elif place == "a sandy beach":
        draw.rectangle([0, 0, CANVAS, CANVAS], fill=(190, 232, 250))
        draw.rectangle([0, horizon - 44, CANVAS, CANVAS], fill=(60, 170, 214))
        draw.rectangle([0, horizon, CANVAS, CANVAS], fill=(244, 222, 160))
    elif place == "a night sky":
        draw.rectangle([0, 0, CANVAS, CANVAS], fill=(30, 34, 84))
        for _ in range(6):
            x, y = rng.randint(8, CANVAS - 8), rng.randint(8, CANVAS - 8)
            draw.ellipse([x - 5, y - 5, x + 5, y + 5], fill=(252, 248, 206))
    elif place == "a blue sky":
        draw.rectangle([0, 0, CANVAS, CANVAS], fill=(140, 202, 250))
        for x in (rng.randint(0, 70), rng.randint(180, 250)):
            y = rng.randint(24, 64)
            for dx, r in ((-22, 14), (0, 20), (22, 14)):
                draw.ellipse([x + dx - r, y - r, x + dx + r, y + r], fill=(255, 255, 255))
    else:
        fill = (255, 255, 255) if place == "a white background" else (255, 206, 222)
        draw.rectangle([0, 0, CANVAS, CANVAS], fill=fill)


def cat(pen: Pen, color: Color, dark: Color) -> None:
    pen.line([(0.45, 0.75), (0.8, 0.6), (0.84, 0.2)], dark, 0.16)
    pen.ellipse(0, 0.62, 0.5, 0.4, dark)
    for side in (-1, 1):
        pen.polygon([(side * 0.6, -0.1), (side * 0.56, -0.92), (side * 0.1, -0.52)], color)
        pen.polygon(
            [(side * 0.5, -0.32), (side * 0.48, -0.7), (side * 0.26, -0.5)],
            (250, 170, 180),
            width=0,
        )
    pen.ellipse(0, -0.08, 0.64, 0.52, color)
    for side in (-1, 1):
        eye(pen, side * 0.26, -0.14, 0.15)
    pen.polygon([(-0.08, 0.08), (0.08, 0.08), (0, 0.18)], (246, 110, 130), width=0)
    pen.ellipse(-0.24, 0.92, 0.15, 0.1, color)
    pen.ellipse(0.24, 0.92, 0.15, 0.1, color)


def dog(pen: Pen, color: Color, dark: Color) -> None:
    pen.line([(-0.5, 0.7), (-0.82, 0.42)], dark, 0.16)
    pen.ellipse(0, 0.62, 0.48, 0.4, dark)
    pen.ellipse(0, -0.16, 0.56, 0.54, color)
    for side in (-1, 1):
        pen.ellipse(side * 0.6, -0.06, 0.17, 0.44, dark)
        eye(pen, side * 0.22, -0.26, 0.14)
    pen.ellipse(0, 0.1, 0.26, 0.2, shade(color, 1.55))
    pen.ellipse(0, 0.02, 0.11, 0.08, INK, width=0)
    pen.ellipse(-0.22, 0.92, 0.15, 0.1, color)
    pen.ellipse(0.22, 0.92, 0.15, 0.1, color)


def bird(pen: Pen, color: Color, dark: Color) -> None:
    for x in (-0.12, 0.14):
        pen.line([(x, 0.5), (x, 0.84)], (240, 150, 40), 0.07)
    pen.polygon([(-0.45, 0.05), (-1.0, -0.24), (-0.95, 0.34)], dark)
    pen.polygon([(0.7, -0.42), (1.04, -0.28), (0.7, -0.16)], (250, 170, 40))
    pen.ellipse(-0.02, 0.16, 0.62, 0.46, color)
    pen.ellipse(0.46, -0.34, 0.36, 0.34, color)
    pen.ellipse(-0.16, 0.14, 0.34, 0.22, dark)
    eye(pen, 0.54, -0.4, 0.13)


def fish(pen: Pen, color: Color, dark: Color) -> None:
    pen.polygon([(-0.5, 0), (-1.0, -0.46), (-0.9, 0), (-1.0, 0.46)], dark)
    pen.polygon([(-0.25, -0.34), (0.08, -0.8), (0.34, -0.34)], dark)
    pen.ellipse(0.08, 0, 0.72, 0.46, color)
    pen.arc(0.28, 0, 0.3, 0.36, 110, 250, dark, 0.08)
    pen.polygon([(-0.1, 0.08), (-0.42, 0.3), (-0.06, 0.3)], dark)
    eye(pen, 0.48, -0.1, 0.13)


def car(pen: Pen, color: Color, dark: Color) -> None:
    pen.polygon([(-0.62, -0.08), (-0.4, -0.54), (0.34, -0.54), (0.66, -0.08)], color)
    pen.rectangle(-0.98, -0.1, 0.98, 0.4, color, radius=0.14)
    for left, right in ((-0.46, -0.06), (0.04, 0.42)):
        pen.polygon(
            [(left, -0.1), (left + 0.08, -0.42), (right - 0.06, -0.42), (right, -0.1)],
            (206, 236, 252),
        )
    for x in (-0.54, 0.54):
        pen.ellipse(x, 0.42, 0.25, 0.25, (44, 44, 50))
        pen.ellipse(x, 0.42, 0.1, 0.1, (206, 206, 212), width=0)
    pen.ellipse(0.88, 0.1, 0.08, 0.08, (255, 244, 160), width=0)


def house(pen: Pen, color: Color, dark: Color) -> None:
    pen.rectangle(0.3, -0.78, 0.5, -0.36, dark)
    pen.rectangle(-0.64, -0.16, 0.64, 0.8, color)
    pen.polygon([(-0.86, -0.16), (0, -0.92), (0.86, -0.16)], dark)
    pen.rectangle(-0.15, 0.3, 0.15, 0.8, (122, 78, 46))
    for x in (-0.4, 0.4):
        pen.rectangle(x - 0.15, 0.02, x + 0.15, 0.32, (255, 240, 150))


def tree(pen: Pen, color: Color, dark: Color) -> None:
    pen.rectangle(-0.14, 0.1, 0.14, 0.9, (126, 84, 52))
    pen.ellipse(-0.36, -0.08, 0.42, 0.38, dark)
    pen.ellipse(0.36, -0.08, 0.42, 0.38, dark)
    pen.ellipse(0, -0.4, 0.56, 0.5, color)


def flower(pen: Pen, color: Color, dark: Color) -> None:
    pen.line([(0, 0), (0, 0.92)], (72, 152, 72), 0.1)
    pen.ellipse(0.24, 0.62, 0.22, 0.1, (72, 152, 72))
    for i in range(6):
        angle = i * math.pi / 3
        pen.ellipse(0.4 * math.sin(angle), -0.34 + 0.4 * math.cos(angle), 0.26, 0.26, color)
    middle = (250, 220, 84) if color != COLORS["yellow"] else (166, 100, 46)
    pen.ellipse(0, -0.34, 0.24, 0.24, middle)


def boat(pen: Pen, color: Color, dark: Color) -> None:
    pen.rectangle(-0.06, -0.9, 0.06, 0.3, (122, 84, 52))
    pen.polygon([(0.12, -0.84), (0.12, 0.12), (0.78, 0.12)], (250, 250, 244))
    pen.polygon([(-0.12, -0.6), (-0.12, 0.12), (-0.56, 0.12)], dark)
    pen.polygon([(-0.96, 0.26), (0.96, 0.26), (0.6, 0.76), (-0.6, 0.76)], color)


def robot(pen: Pen, color: Color, dark: Color) -> None:
    pen.line([(0, -0.72), (0, -0.92)], (110, 110, 118), 0.07)
    pen.ellipse(0, -0.96, 0.1, 0.1, (250, 70, 66))
    for side in (-1, 1):
        pen.line([(side * 0.56, 0.04), (side * 0.8, 0.3)], dark, 0.15)
        pen.rectangle(side * 0.26 - 0.13, 0.56, side * 0.26 + 0.13, 0.92, dark)
    pen.rectangle(-0.5, -0.04, 0.5, 0.62, color, radius=0.08)
    pen.rectangle(-0.48, -0.74, 0.48, -0.12, color, radius=0.12)
    for side in (-1, 1):
        eye(pen, side * 0.21, -0.5, 0.14)
    pen.line([(-0.2, -0.24), (0.2, -0.24)], (250, 250, 250), 0.06)
    pen.rectangle(-0.22, 0.14, 0.22, 0.4, (250, 240, 170))


def mushroom(pen: Pen, color: Color, dark: Color) -> None:
    pen.rectangle(-0.25, 0, 0.25, 0.8, (248, 236, 214), radius=0.12)
    cap = [
        (-0.84 * math.cos(a), 0.06 - 0.9 * math.sin(a))
        for a in (i * math.pi / 16 for i in range(17))
    ]
    pen.polygon(cap, color)
    for x, y, r in ((-0.42, -0.24, 0.15), (0.06, -0.5, 0.17), (0.46, -0.2, 0.13)):
        pen.ellipse(x, y, r, r * 0.9, (255, 255, 255), width=0)


def star(pen: Pen, color: Color, dark: Color) -> None:
    radius = (0.96, 0.44)
    pen.polygon(
        [
            (radius[i % 2] * math.sin(i * math.pi / 5), -radius[i % 2] * math.cos(i * math.pi / 5))
            for i in range(10)
        ],
        color,
    )


def ball(pen: Pen, color: Color, dark: Color) -> None:
    pen.ellipse(0, 0, 0.78, 0.78, color)
    pen.ellipse(-0.3, -0.34, 0.18, 0.14, shade(color, 1.55), width=0)


KINDS = {
    f.__name__: f
    for f in (cat, dog, bird, fish, car, house, tree, flower, boat, robot, mushroom, star, ball)
}
FACE_AT = {
    "car": (0, 0.14, 0.16),
    "house": (0, -0.4, 0.18),
    "tree": (0, -0.36, 0.24),
    "flower": (0, -0.36, 0.12),
    "boat": (0, 0.42, 0.16),
    "mushroom": (0, 0.34, 0.12),
    "star": (0, 0.02, 0.22),
    "ball": (0, 0.06, 0.32),
}


def draw_thing(
    draw, kind: str, color: Color, rng: random.Random, *, outlined=False, smiling=False
) -> None:
    dark = shade(color, 1.3) if color == COLORS["black"] else shade(color, 0.74)
    edge = (
        INK if outlined else shade(color, 1.45) if color == COLORS["black"] else shade(color, 0.6)
    )
    pen = Pen(
        draw,
        128 + rng.randint(-14, 14),
        134 + rng.randint(-10, 10),
        98 * rng.uniform(0.8, 1.08),
        edge,
        8 if outlined else 3,
    )
    KINDS[kind](pen, color, dark)
    if smiling:
        face(pen, *FACE_AT[kind])


def scene(kind: str, color: str, place: str, rng: random.Random, **look) -> Image.Image:
    """One drawing, 64 x 64, of a thing in a place."""
    image, draw = blank()
    draw_place(draw, place, rng)
    draw_thing(draw, kind, COLORS[color], rng, **look)
    return shrink(image)


def caption(
    kind: str,
    color: str,
    place: str | None = None,
    opening: str = "",
    *,
    outlined=False,
    smiling=False,
) -> str:
    """The sentence that goes with a scene; `opening` is «a drawing of» and the like."""
    thing = article(f"smiling {color} {kind}" if smiling else f"{color} {kind}")
    words = [
        opening,
        thing,
        "with a black outline" if outlined else "",
        before(place) if place else "",
    ]
    return " ".join(w for w in words if w)


def drawing(rng: random.Random) -> tuple[Image.Image, str]:
    """One random drawing of the base world and its caption."""
    kind, color, place = rng.choice(list(KINDS)), rng.choice(list(COLORS)), rng.choice(PLACES)
    look = dict(outlined=rng.random() < 0.25, smiling=kind in FACELESS and rng.random() < 0.25)
    opening = rng.choice(("a drawing of", "a picture of", "a photo of", "", ""))
    told = place if rng.random() < 0.88 else None
    return scene(kind, color, place, rng, **look), caption(kind, color, told, opening, **look)
