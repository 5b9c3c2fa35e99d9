"""Films the studio for the README: python tests/browser/film.py docs/studio.gif"""

import io
import sys
import tempfile
from pathlib import Path

from hand import Hand
from PIL import Image
from playwright.sync_api import sync_playwright
from servers import chromium, serving, write_notebook

PROMPT, WIDTH = "a cartoon purple creature with horns and wings", 760  # pixels
MOVES = (
    ("up.1", 0.7),
    ("up.1", 0.35),
    ("up.1", 0.0),
    ("up.2", 0.7),
    ("up.2", 0.35),
    ("up.2", 0.0),
    ("up.1", 0.5),
    ("up.1", 1.0),
    ("up.2", 0.5),
    ("up.2", 1.0),
)


def film(target: Path) -> None:
    """Open the studio in Voilà, move its sliders, and write what was seen as a GIF."""
    with tempfile.TemporaryDirectory() as folder, sync_playwright() as playwright:
        notebook = write_notebook(Path(folder), PROMPT, 12, adapters=["creatures"])
        with serving("voila", notebook) as address:
            browser = playwright.chromium.launch(executable_path=chromium(), args=["--no-sandbox"])
            page = browser.new_page(viewport={"width": 1130, "height": 900})
            page.set_default_timeout(120_000)
            page.goto(address)
            hand = Hand(page, "film")
            frames = [shot(hand, None)] + [move(hand, *step) for step in MOVES]
            browser.close()
    palette = frames[0].quantize(128)
    frames = [frame.quantize(palette=palette, dither=Image.Dither.NONE) for frame in frames]
    frames[0].save(
        target,
        save_all=True,
        append_images=frames[1:],
        duration=[1500] + [600] * len(MOVES),
        loop=0,
        optimize=True,
    )


def move(hand: Hand, block: str, scale: float) -> Image.Image:
    """What is seen when a block's slider has come to a scale by its keys."""
    before = hand.studio.locator("img.lorabook-now").first.get_attribute("src")
    hand.handle(hand.slider(block)).focus()
    while abs(hand.value(block) - scale) > 0.01:
        hand.page.keyboard.press("ArrowRight" if hand.value(block) < scale else "ArrowLeft")
    return shot(hand, before)


def shot(hand: Hand, before: str | None) -> Image.Image:
    """A screenshot of the studio, once its picture is another one and final."""
    picture = hand.studio.locator("img.lorabook-now").first
    picture.wait_for(timeout=60_000)
    hand.page.wait_for_function(
        "([image, before]) => image.src != before", arg=[picture.element_handle(), before]
    )
    hand.page.wait_for_timeout(2500)
    seen = Image.open(io.BytesIO(hand.studio.screenshot())).convert("RGB")
    return seen.resize((WIDTH, round(seen.height * WIDTH / seen.width)), Image.Resampling.LANCZOS)


if __name__ == "__main__":
    film(Path(sys.argv[1]))
