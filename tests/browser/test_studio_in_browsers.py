"""The studio in real browsers: each test opens it once and does all that a person would, in one go."""

import os
import re
import statistics
import subprocess
import time

import pytest

if not os.environ.get("CI"):
    pytest.importorskip("playwright", reason="playwright is not installed: pip install -e '.[dev]'")

from hand import Expected, Hand, apart, beside_the_shots  # noqa: E402
from playwright.sync_api import expect  # noqa: E402
from servers import READY, lacking, old_python, serving, write_notebook  # noqa: E402

import lorabook as lb  # noqa: E402

pytestmark = pytest.mark.browser
PROMPT, STEPS = "a cartoon purple creature with horns and wings", 4
expect.set_options(timeout=60_000)
_NAMELESS = """studio => [...studio.querySelectorAll('button, input, select, textarea, [tabindex]')]
  .filter(one => one.offsetParent && !(one.ariaLabel || one.title || one.textContent.trim() || one.labels?.[0]?.textContent))
  .map(one => one.outerHTML)"""


def test_in_jupyterlab(page, tmp_path):
    with serving("lab", write_notebook(tmp_path, PROMPT, STEPS)) as address:
        page.goto(address)
        page.wait_for_function(READY)
        page.locator(".lm-MenuBar-itemLabel", has_text="Run").click()
        page.locator('li[data-command="runmenu:run-all"]').click()
        do_everything(page, "lab", tmp_path)


def test_in_voila(page, tmp_path):
    with serving("voila", write_notebook(tmp_path, PROMPT, STEPS)) as address:
        page.goto(address)
        do_everything(page, "voila", tmp_path)


def test_in_voila_with_ipywidgets_7(page, tmp_path):
    try:
        python = old_python()
    except subprocess.SubprocessError as error:
        lacking(f"no environment with ipywidgets 7.7.1 can be made: {str(error):.200}")
    version = subprocess.check_output(
        [python, "-c", "import ipywidgets; print(ipywidgets.__version__)"], text=True
    )
    assert version.strip() == "7.7.1"
    with serving("voila", write_notebook(tmp_path, PROMPT, STEPS), python) as address:
        page.goto(address)
        do_everything(page, "widgets7", tmp_path)


def do_everything(page, name, folder):
    """All that a person would do, each step from where the last one left the studio."""
    hand, expected = Hand(page, name), Expected(PROMPT, STEPS)
    see_it(hand, expected)
    move_a_slider_by_mouse(hand, expected)
    move_a_slider_by_keyboard(hand, expected)
    drag_fast(hand, expected)
    press_what_goes_back(hand, expected)
    type_a_prompt(hand, expected)
    make_a_mistake_and_recover(hand, expected)
    compare(hand, expected)
    switch_and_choose(hand, expected)
    keep_and_go_back(hand, expected)
    load_from_the_shelf(hand, expected)
    take_it_away(hand, folder)
    find_every_control_named(hand)
    look_at_it_narrow(hand)


def see_it(hand, expected):
    expect(hand.studio.locator("img.lorabook-now").first).to_be_visible()
    hand.studio.scroll_into_view_if_needed()
    hand.sees(expected())
    blocks = [f"{side}.{number}" for side in ("down", "up") for number in range(4)]
    assert all(hand.slider(block).is_visible() for block in [*blocks, "mid"])
    assert hand.chosen("scheduler") == "the model's own"
    expect(hand.handle(hand.slider("up.1"))).to_have_attribute("aria-label", re.compile("up.1"))
    hand.shot("1-first")


def move_a_slider_by_mouse(hand, expected):
    before = hand.picture()
    hand.drag(hand.slider("up.1"), -20, -40)
    value = hand.value("up.1")
    assert value < 1
    hand.sees(expected(ink={"unet": {"up": {"block_1": value}}}))
    assert apart(hand.picture(), before) > 20
    hand.shot("2-mouse")


def move_a_slider_by_keyboard(hand, expected):
    before, value, took = hand.picture(), hand.value("up.1"), []
    hand.handle(hand.slider("up.1")).focus()
    for presses in range(1, 4):
        wanted = expected(ink={"unet": {"up": {"block_1": round(value + 0.05 * presses, 2)}}})
        start = time.monotonic()
        hand.page.keyboard.press("ArrowRight")
        hand.sees(wanted)
        took.append(time.monotonic() - start)
    assert hand.value("up.1") == pytest.approx(value + 0.15) and apart(hand.picture(), before) > 0
    seconds = f"from the key to the final picture: {statistics.median(took):.2f} s\n"
    beside_the_shots(f"{hand.name}-seconds.txt").write_text(seconds)


def drag_fast(hand, expected):
    hand.drag(hand.slider("mid"), *(5 * step for step in (-9, 4, -8, 3, -7, 2, -6, 1, -5, -4)))
    values = {"up": {"block_1": hand.value("up.1")}, "mid": hand.value("mid")}
    assert values["mid"] < 1
    wanted = expected(ink={"unet": values})
    hand.sees(wanted)
    hand.page.wait_for_timeout(1000)  # nothing stale comes after it
    hand.sees(wanted)
    assert hand.value("mid") == values["mid"]
    hand.shot("3-dragged")


def press_what_goes_back(hand, expected):
    mid, up = hand.value("mid"), hand.value("up.1")
    hand.press("undo", exact=False)
    expect(hand.slider("mid").locator(".widget-readout")).to_have_text("1.00")
    hand.sees(expected(ink={"unet": {"up": {"block_1": up}}}))
    hand.press("redo", exact=False)
    hand.sees(expected(ink={"unet": {"up": {"block_1": up}, "mid": mid}}))
    hand.studio.get_by_title("ink: up.1 back to 1").click()
    hand.sees(expected(ink={"unet": {"mid": mid}}))
    hand.press("all to 1")
    hand.sees(expected())


def type_a_prompt(hand, expected):
    hand.type("prompt", "a cartoon green creature with a tail")
    hand.sees(expected(prompt="a cartoon green creature with a tail"))
    hand.type("without", "wings")
    hand.type("without", "")
    hand.type("prompt", PROMPT)
    hand.sees(expected())


def make_a_mistake_and_recover(hand, expected):
    hand.type("seeds", "one, two")
    hand.is_told("seeds are whole numbers")
    hand.shot("4-mistake")
    hand.type("seeds", "5")
    hand.sees(expected(seed=5))
    hand.is_well()
    hand.press("another")
    expect(hand.line("seeds")).not_to_have_value("5")
    hand.sees(expected(seed=int(hand.line("seeds").input_value())))
    hand.type("seeds", "0")
    hand.sees(expected())


def compare(hand, expected):
    hand.press("compare")
    hand.sees(expected(ink=0.0, creatures=0.0), "base")
    expect(hand.studio.locator("img.lorabook-difference")).to_be_visible()
    hand.shot("5-compare")
    hand.press("compare")
    expect(hand.studio.locator("img.lorabook-difference")).to_be_hidden()


def switch_and_choose(hand, expected):
    hand.press("on")
    hand.sees(expected(ink=0.0))
    hand.press("on")
    hand.sees(expected())
    hand.choose("preset", "style blocks")
    hand.sees(expected(ink="style blocks"))
    hand.press("all to 1")
    hand.press("single layers")
    expect(hand.studio.locator(".lorabook-parts")).to_be_visible()
    hand.shot("6-single-layers")
    hand.press("single layers")
    hand.turn_to("mix")
    fade = hand.studio.locator(
        ".widget-slider", has=hand.page.locator("label", has_text=re.compile("^crossfade$"))
    )
    hand.handle(fade).focus()
    hand.page.keyboard.press("ArrowRight")
    hand.sees(expected(ink=0.45, creatures=0.55))
    hand.shot("7-mix")
    hand.turn_to("blocks")
    hand.press("undo", exact=False)
    hand.sees(expected())


def keep_and_go_back(hand, expected):
    hand.press("keep")
    hand.drag(hand.slider("up.2"), -30)
    hand.sees(expected(ink={"unet": {"up": {"block_2": hand.value("up.2")}}}))
    hand.turn_to("gallery")
    hand.shot("8-gallery")
    hand.press("back to this")
    hand.sees(expected())
    hand.studio.get_by_title("drop this picture from the gallery").locator("visible=true").click()
    expect(hand.studio.get_by_text("Nothing kept yet")).to_be_visible()


def load_from_the_shelf(hand, expected):
    hand.turn_to("shelf")
    hand.type("other", "no_such_adapter")
    hand.is_told("no_such_adapter")
    hand.press("mosaic")
    lb.load_adapter(expected.pipe, "mosaic")
    hand.sees(expected(mosaic=1.0))
    hand.is_well()
    expect(hand.studio.get_by_role("button", name="✓ mosaic")).to_be_visible()
    hand.shot("9-shelf")


def take_it_away(hand, folder):
    hand.turn_to("take away")
    code = hand.studio.locator(".lorabook-code textarea")
    expect(code).to_have_value(re.compile("mosaic"))
    hand.choose("as", "A1111 prompt")
    expect(code).to_have_value(re.compile("<lora:mosaic"))
    hand.press("copy")
    expect(hand.studio.get_by_text("copied")).to_be_visible()
    hand.press("save picture")
    expect(hand.status).to_contain_text("studio.png")
    hand.press("save adapter")
    expect(hand.status).to_contain_text("studio-adapter")
    hand.shot("10-take-away")
    assert set(lb.ScaleStudio.settings_in(folder / "studio.png").adapters) == {
        "ink",
        "creatures",
        "mosaic",
    }
    assert "diffusers" in lb.inspect_adapter(folder / "studio-adapter")._repr_html_()


def find_every_control_named(hand):
    """A control has a label beside it, words on it, or a tooltip."""
    for tab in ("blocks", "mix", "shelf", "gallery", "take away"):
        hand.turn_to(tab)
        assert hand.studio.evaluate(_NAMELESS) == []


def look_at_it_narrow(hand):
    hand.turn_to("blocks")
    hand.page.set_viewport_size({"width": 900, "height": 1000})
    hand.studio.scroll_into_view_if_needed()
    expect(hand.slider("down.3")).to_be_visible()
    hand.page.wait_for_timeout(500)
    hand.shot("11-narrow")
