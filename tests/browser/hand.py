"""A hand on the studio in a browser, and the pictures that it should see."""

import io
import re
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from playwright.sync_api import Locator, Page, expect

import lorabook as lb

SHOTS = Path(__file__).parent / "shots"
_BYTES = "async e => Array.from(new Uint8Array(await (await fetch(e.src)).arrayBuffer()))"
_NEAR = 3  # of 255: adding ΔW to the weights rounds otherwise than adding its output


class Expected:
    """Draws by ordinary calls of a pipeline of its own."""

    def __init__(self, prompt: str, steps: int):
        self.pipe, self.prompt, self.steps = (
            lb.load_pipeline("tiny-sd", device="cpu"),
            prompt,
            steps,
        )
        self.pipe.set_progress_bar_config(disable=True)
        for name in ("ink", "creatures"):
            lb.load_adapter(self.pipe, name)

    def __call__(self, *, prompt: str | None = None, seed: int = 0, **scales) -> Image.Image:
        """The picture with these scales; an adapter that is not named is at 1."""
        lb.set_scales(self.pipe, {"ink": 1.0, "creatures": 1.0} | scales, only=True)
        return self.pipe(
            prompt or self.prompt,
            num_inference_steps=self.steps,
            guidance_scale=4.0,
            generator=torch.Generator("cpu").manual_seed(seed),
        ).images[0]


class Hand:
    """What a person does with the studio on a page."""

    def __init__(self, page: Page, name: str):
        self.page, self.name = page, name
        self.studio = page.locator(".lorabook-studio").first
        self.status = self.studio.locator(".lorabook-status")

    def sees(self, wanted: Image.Image, what: str = "now") -> None:
        """Wait until the picture shown is this one, to rounding; the bytes are the browser's own."""
        end = time.monotonic() + 60
        while (off := apart(self.picture(what), wanted)) > _NEAR:
            assert time.monotonic() < end, (
                f"the picture shown is {off} of 255 off what the settings draw"
            )
            self.page.wait_for_timeout(50)

    def picture(self, what: str = "now") -> Image.Image:
        """The picture in the browser."""
        shown = self.studio.locator(f"img.lorabook-{what}").first
        return Image.open(io.BytesIO(bytes(shown.evaluate(_BYTES)))).convert("RGB")

    def slider(self, block: str) -> Locator:
        """A block's slider."""
        return self.studio.locator(
            f".lorabook-scale.lorabook-block-{block.replace('.', '-')}"
        ).first

    def value(self, block: str) -> float:
        """The number beside a block's slider."""
        return float(self.slider(block).locator(".widget-readout").inner_text())

    def handle(self, slider: Locator) -> Locator:
        """What is dragged: noUiSlider's in ipywidgets 8, jQuery UI's in 7."""
        return slider.locator(".noUi-handle, .ui-slider-handle").first

    def drag(self, slider: Locator, *ways: int) -> None:
        """Take a slider by the mouse and go to these pixels from where it was, one after another,
        without a pause.
        """
        handle = self.handle(slider)
        handle.scroll_into_view_if_needed()
        box = handle.bounding_box()
        x, y = box["x"] + box["width"] / 2, box["y"] + box["height"] / 2
        self.page.mouse.move(x, y)
        self.page.mouse.down()
        for way in ways:
            self.page.mouse.move(x + way, y, steps=2)
        self.page.mouse.up()

    def press(self, name: str, exact: bool = True) -> None:
        """Press a button that can be seen."""
        self.studio.get_by_role("button", name=name, exact=exact).locator(
            "visible=true"
        ).first.click()

    def turn_to(self, tab: str) -> None:
        """Open a tab."""
        self.studio.locator(
            ".lm-TabBar-tab, .p-TabBar-tab", has_text=re.compile(f"^{tab}$")
        ).first.click()

    def type(self, label: str, text: str) -> None:
        """Type into a line and press Enter."""
        entry = self.line(label)
        entry.fill(text)
        entry.press("Enter")

    def line(self, label: str) -> Locator:
        """A line to type into, by the label beside it."""
        found = self.studio.locator(
            ".widget-text", has=self.page.locator("label", has_text=re.compile(f"^{label}$"))
        )
        return found.locator("input").locator("visible=true").first

    def choose(self, label: str, option: str) -> None:
        """Choose from a menu, by the label beside it."""
        self._menu(label).select_option(label=option)

    def chosen(self, label: str) -> str:
        """What a menu shows."""
        return (
            self._menu(label)
            .evaluate("menu => menu.selectedOptions[0]?.textContent ?? ``")
            .replace("\xa0", " ")
        )

    def _menu(self, label: str) -> Locator:
        found = self.studio.locator(
            ".widget-dropdown", has=self.page.locator("label", has_text=re.compile(f"^{label}$"))
        )
        return found.locator("select").locator("visible=true").first

    def is_well(self) -> None:
        """No mistake stands in the status line."""
        expect(self.status).not_to_have_class(re.compile("lorabook-wrong"))

    def is_told(self, sentence: str) -> None:
        """A mistake stands in the status line."""
        expect(self.status).to_have_class(re.compile("lorabook-wrong"))
        expect(self.status).to_contain_text(sentence)

    def shot(self, what: str) -> None:
        """Keep a screenshot."""
        self.page.screenshot(path=beside_the_shots(f"{self.name}-{what}.png"))


def beside_the_shots(name: str) -> Path:
    """A path in the folder of screenshots, which git passes over."""
    SHOTS.mkdir(exist_ok=True)
    (SHOTS / ".gitignore").write_text("*\n")
    return SHOTS / name


def apart(one: Image.Image, other: Image.Image) -> int:
    """The largest difference of two pictures, in steps of 255."""
    if one.size != other.size:
        return 255
    return int(np.abs(np.asarray(one, dtype=int) - np.asarray(other, dtype=int)).max())
