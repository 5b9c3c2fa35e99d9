"""The base model's world: thirteen kinds of thing, ten colours, six places, drawn flat."""
import math
import random

from PIL import Image

from pen import CANVAS, INK, Color, Pen, blank, eye, face, shade, shrink

COLORS: dict[str, Color] = {
    "red": (222, 52, 48), "blue": (48, 108, 222), "green": (56, 168, 80), "yellow": (246, 208, 48),
    "purple": (142, 78, 196), "orange": (244, 140, 36), "pink": (246, 130, 178),
    "white": (240, 241, 244), "black": (54, 54, 62), "brown": (146, 96, 58)}
PLACES = ("a white background", "a blue sky", "a green field", "a night sky", "a sandy beach", "a pink wall")
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
    pen.line([(.45, .75), (.8, .6), (.84, .2)], dark, .16)
    pen.ellipse(0, .62, .5, .4, dark)
    for side in (-1, 1):
        pen.polygon([(side * .6, -.1), (side * .56, -.92), (side * .1, -.52)], color)
        pen.polygon([(side * .5, -.32), (side * .48, -.7), (side * .26, -.5)], (250, 170, 180), width=0)
    pen.ellipse(0, -.08, .64, .52, color)
    for side in (-1, 1):
        eye(pen, side * .26, -.14, .15)
    pen.polygon([(-.08, .08), (.08, .08), (0, .18)], (246, 110, 130), width=0)
    pen.ellipse(-.24, .92, .15, .1, color)
    pen.ellipse(.24, .92, .15, .1, color)


def dog(pen: Pen, color: Color, dark: Color) -> None:
    pen.line([(-.5, .7), (-.82, .42)], dark, .16)
    pen.ellipse(0, .62, .48, .4, dark)
    pen.ellipse(0, -.16, .56, .54, color)
    for side in (-1, 1):
        pen.ellipse(side * .6, -.06, .17, .44, dark)
        eye(pen, side * .22, -.26, .14)
    pen.ellipse(0, .1, .26, .2, shade(color, 1.55))
    pen.ellipse(0, .02, .11, .08, INK, width=0)
    pen.ellipse(-.22, .92, .15, .1, color)
    pen.ellipse(.22, .92, .15, .1, color)


def bird(pen: Pen, color: Color, dark: Color) -> None:
    for x in (-.12, .14):
        pen.line([(x, .5), (x, .84)], (240, 150, 40), .07)
    pen.polygon([(-.45, .05), (-1.0, -.24), (-.95, .34)], dark)
    pen.polygon([(.7, -.42), (1.04, -.28), (.7, -.16)], (250, 170, 40))
    pen.ellipse(-.02, .16, .62, .46, color)
    pen.ellipse(.46, -.34, .36, .34, color)
    pen.ellipse(-.16, .14, .34, .22, dark)
    eye(pen, .54, -.4, .13)


def fish(pen: Pen, color: Color, dark: Color) -> None:
    pen.polygon([(-.5, 0), (-1.0, -.46), (-.9, 0), (-1.0, .46)], dark)
    pen.polygon([(-.25, -.34), (.08, -.8), (.34, -.34)], dark)
    pen.ellipse(.08, 0, .72, .46, color)
    pen.arc(.28, 0, .3, .36, 110, 250, dark, .08)
    pen.polygon([(-.1, .08), (-.42, .3), (-.06, .3)], dark)
    eye(pen, .48, -.1, .13)


def car(pen: Pen, color: Color, dark: Color) -> None:
    pen.polygon([(-.62, -.08), (-.4, -.54), (.34, -.54), (.66, -.08)], color)
    pen.rectangle(-.98, -.1, .98, .4, color, radius=.14)
    for left, right in ((-.46, -.06), (.04, .42)):
        pen.polygon([(left, -.1), (left + .08, -.42), (right - .06, -.42), (right, -.1)], (206, 236, 252))
    for x in (-.54, .54):
        pen.ellipse(x, .42, .25, .25, (44, 44, 50))
        pen.ellipse(x, .42, .1, .1, (206, 206, 212), width=0)
    pen.ellipse(.88, .1, .08, .08, (255, 244, 160), width=0)


def house(pen: Pen, color: Color, dark: Color) -> None:
    pen.rectangle(.3, -.78, .5, -.36, dark)
    pen.rectangle(-.64, -.16, .64, .8, color)
    pen.polygon([(-.86, -.16), (0, -.92), (.86, -.16)], dark)
    pen.rectangle(-.15, .3, .15, .8, (122, 78, 46))
    for x in (-.4, .4):
        pen.rectangle(x - .15, .02, x + .15, .32, (255, 240, 150))


def tree(pen: Pen, color: Color, dark: Color) -> None:
    pen.rectangle(-.14, .1, .14, .9, (126, 84, 52))
    pen.ellipse(-.36, -.08, .42, .38, dark)
    pen.ellipse(.36, -.08, .42, .38, dark)
    pen.ellipse(0, -.4, .56, .5, color)


def flower(pen: Pen, color: Color, dark: Color) -> None:
    pen.line([(0, 0), (0, .92)], (72, 152, 72), .1)
    pen.ellipse(.24, .62, .22, .1, (72, 152, 72))
    for i in range(6):
        angle = i * math.pi / 3
        pen.ellipse(.4 * math.sin(angle), -.34 + .4 * math.cos(angle), .26, .26, color)
    middle = (250, 220, 84) if color != COLORS["yellow"] else (166, 100, 46)
    pen.ellipse(0, -.34, .24, .24, middle)


def boat(pen: Pen, color: Color, dark: Color) -> None:
    pen.rectangle(-.06, -.9, .06, .3, (122, 84, 52))
    pen.polygon([(.12, -.84), (.12, .12), (.78, .12)], (250, 250, 244))
    pen.polygon([(-.12, -.6), (-.12, .12), (-.56, .12)], dark)
    pen.polygon([(-.96, .26), (.96, .26), (.6, .76), (-.6, .76)], color)


def robot(pen: Pen, color: Color, dark: Color) -> None:
    pen.line([(0, -.72), (0, -.92)], (110, 110, 118), .07)
    pen.ellipse(0, -.96, .1, .1, (250, 70, 66))
    for side in (-1, 1):
        pen.line([(side * .56, .04), (side * .8, .3)], dark, .15)
        pen.rectangle(side * .26 - .13, .56, side * .26 + .13, .92, dark)
    pen.rectangle(-.5, -.04, .5, .62, color, radius=.08)
    pen.rectangle(-.48, -.74, .48, -.12, color, radius=.12)
    for side in (-1, 1):
        eye(pen, side * .21, -.5, .14)
    pen.line([(-.2, -.24), (.2, -.24)], (250, 250, 250), .06)
    pen.rectangle(-.22, .14, .22, .4, (250, 240, 170))


def mushroom(pen: Pen, color: Color, dark: Color) -> None:
    pen.rectangle(-.25, 0, .25, .8, (248, 236, 214), radius=.12)
    cap = [(-.84 * math.cos(a), .06 - .9 * math.sin(a)) for a in (i * math.pi / 16 for i in range(17))]
    pen.polygon(cap, color)
    for x, y, r in ((-.42, -.24, .15), (.06, -.5, .17), (.46, -.2, .13)):
        pen.ellipse(x, y, r, r * .9, (255, 255, 255), width=0)


def star(pen: Pen, color: Color, dark: Color) -> None:
    radius = (.96, .44)
    pen.polygon([(radius[i % 2] * math.sin(i * math.pi / 5), -radius[i % 2] * math.cos(i * math.pi / 5))
                 for i in range(10)], color)


def ball(pen: Pen, color: Color, dark: Color) -> None:
    pen.ellipse(0, 0, .78, .78, color)
    pen.ellipse(-.3, -.34, .18, .14, shade(color, 1.55), width=0)


KINDS = {f.__name__: f for f in (cat, dog, bird, fish, car, house, tree, flower, boat, robot, mushroom, star, ball)}
FACE_AT = {"car": (0, .14, .16), "house": (0, -.4, .18), "tree": (0, -.36, .24), "flower": (0, -.36, .12),
           "boat": (0, .42, .16), "mushroom": (0, .34, .12), "star": (0, .02, .22), "ball": (0, .06, .32)}


def draw_thing(draw, kind: str, color: Color, rng: random.Random, *, outlined=False, smiling=False) -> None:
    dark = shade(color, 1.3) if color == COLORS["black"] else shade(color, .74)
    edge = INK if outlined else shade(color, 1.45) if color == COLORS["black"] else shade(color, .6)
    pen = Pen(draw, 128 + rng.randint(-14, 14), 134 + rng.randint(-10, 10), 98 * rng.uniform(.8, 1.08),
              edge, 8 if outlined else 3)
    KINDS[kind](pen, color, dark)
    if smiling:
        face(pen, *FACE_AT[kind])


def scene(kind: str, color: str, place: str, rng: random.Random, **look) -> Image.Image:
    """One drawing, 64 x 64, of a thing in a place."""
    image, draw = blank()
    draw_place(draw, place, rng)
    draw_thing(draw, kind, COLORS[color], rng, **look)
    return shrink(image)


def caption(kind: str, color: str, place: str | None = None, opening: str = "", *, outlined=False, smiling=False) -> str:
    """The sentence that goes with a scene; `opening` is «a drawing of» and the like."""
    thing = article(f"smiling {color} {kind}" if smiling else f"{color} {kind}")
    words = [opening, thing, "with a black outline" if outlined else "", before(place) if place else ""]
    return " ".join(w for w in words if w)


def drawing(rng: random.Random) -> tuple[Image.Image, str]:
    """One random drawing of the base world and its caption."""
    kind, color, place = rng.choice(list(KINDS)), rng.choice(list(COLORS)), rng.choice(PLACES)
    look = dict(outlined=rng.random() < .25, smiling=kind in FACELESS and rng.random() < .25)
    opening = rng.choice(("a drawing of", "a picture of", "a photo of", "", ""))
    told = place if rng.random() < .88 else None
    return scene(kind, color, place, rng, **look), caption(kind, color, told, opening, **look)
