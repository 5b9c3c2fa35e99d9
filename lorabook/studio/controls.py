"""The studio's smallest pieces, for ipywidgets 7.7 and 8: sliders, buttons, menus, texts."""

import html
import io
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from itertools import zip_longest

import ipywidgets as widgets
from PIL import Image

_NONE = ""  # a Dropdown takes the value None for no choice at all
_NEAR = 1e-6  # a slider computes 0.30000000000000004; writing 0.3 into it would fight the hand
_BESIDE = {
    "outside": "outside of the blocks",
    "text_encoder": "text encoder",
    "text_encoder_2": "text encoder 2",
}
_SHORT = {"attentions": "transformer", "resnets": "resnet"}
_SHIFT = 12  # pixels from one row of the U to the next


class ScaleSlider(widgets.HBox):
    """A slider from −1 to 2 with marks at 0 and 1, and a button that brings it back to 1.

    Its tooltip begins with `about`; `kind` is a further DOM class.
    """

    def __init__(self, label: str, moved: Callable[[float], None], about: str, kind: str = ""):
        tip = f"{about}: 0 is without, 1 as trained"
        self.slider = slider(widgets.FloatSlider, label, moved, tip, -1.0, 2.0, 0.05, value=1.0)
        self.slider.add_class("lorabook-ticked")
        self.slider.observe(self._mark, names="value")
        self.back = button("", f"{about} back to 1", lambda: self.show(1.0), "lorabook-back")
        super().__init__([self.slider, self.back])
        classes(self, "lorabook-row", kind)

    def show(self, value: float) -> None:
        """Stand at a value."""
        put(self.slider, value)

    def _mark(self, event) -> None:
        toggle_class(self, "lorabook-moved", abs(event["new"] - 1) > _NEAR)


def block_sliders(name: str, touched: Iterable[str], changed: Callable) -> dict[str, ScaleSlider]:
    """A slider for each block that an adapter touches, of DOM class `lorabook-scale`."""
    sliders = {}
    for block in touched:
        label = _BESIDE.get(block, block)
        kind = "beside-one" if block in _BESIDE else block.split(".")[0]
        moved = partial(lambda block, scale: changed(blocks={block: scale}), block)
        sliders[block] = ScaleSlider(label, moved, f"{name}: {label}", f"lorabook-{kind}")
        dom_class = f"lorabook-block-{block.replace('.', '-')}"
        classes(sliders[block].slider, "lorabook-scale", dom_class)
    return sliders


def block_map_of(sliders: dict[str, ScaleSlider], blocks: Sequence[str]) -> widgets.VBox:
    """The sliders as the UNet's U: blocks of one resolution side by side, the middle below."""
    down, up = (sorted(b for b in blocks if b.startswith(side)) for side in ("down", "up"))
    levels, cells = list(zip_longest(down, reversed(up), fillvalue="")), []
    for level, (left, right) in enumerate(levels):
        inner, outer = f"{level * _SHIFT}px", f"{(len(levels) - 1 - level) * _SHIFT}px"
        cells += [
            _cell(left, sliders, f"0 {outer} 0 {inner}"),
            text(kind="lorabook-skip"),
            _cell(right, sliders, f"0 {inner} 0 {outer}"),
        ]
    rows = []
    if blocks:
        cells.append(classes(_cell("mid", sliders, "0"), "lorabook-bottom"))
        columns = "minmax(0, 1fr) 30px minmax(0, 1fr)"
        layout = {"grid_template_columns": columns, "grid_gap": "5px 0", "width": "100%"}
        rows.append(widgets.GridBox(cells, layout=layout))
    if beside := [slider for block, slider in sliders.items() if block in _BESIDE]:
        rows.append(row(*beside, kind="lorabook-beside"))
    return stack(*rows)


def _cell(block: str, sliders: dict[str, ScaleSlider], margin: str) -> widgets.Widget:
    """A block's slider, or a dotted frame where the adapter does not touch it."""
    words = f"{block} · untouched" if block else ""
    cell = sliders[block] if block in sliders else text(words, "lorabook-untouched")
    cell.layout.margin = margin
    return cell


def part_sliders(
    name: str, groups: Mapping[str, Sequence[str]], changed: Callable
) -> tuple[dict[str, ScaleSlider], widgets.VBox]:
    """A slider for each kind of layer and each part of a block, and all of them in a box."""
    sliders, boxes = {}, []
    for group, parts in groups.items():
        for part in parts:
            what, _, index = part.rpartition(".")[2].partition("_")
            label = f"{_SHORT.get(what, what)} {index}".strip()
            moved = partial(lambda part, scale: changed(parts={part: scale}), part)
            sliders[part] = ScaleSlider(label, moved, f"{name}: {part}")
        title = text(group or "kinds of layers, in all blocks", "lorabook-title")
        cells = row(*(sliders[part] for part in parts), kind="lorabook-cells")
        boxes += [stack(title, cells)] if parts else []
    return sliders, stack(*boxes, kind="lorabook-parts")


def slider(kind: type, label: str, moved: Callable, about: str, low, high, step=1, value=None):
    """An IntSlider or FloatSlider that gives each new value to `moved`."""
    value = low if value is None else value
    layout = {"flex": "1 1 0", "min_width": "0"}
    control = _control(kind, label, about, layout, min=low, max=high, step=step, value=value)
    return _observed(control, lambda number: moved(round(number, 4)))


def button(label: str, about: str, act: Callable[[], None], kind: str = "") -> widgets.Button:
    """A button; its tooltip is its name for screen readers where it has no label."""
    control = _control(widgets.Button, label, about)
    control.on_click(lambda _: act())
    return classes(control, "lorabook-button", kind)


def switch(label: str, turned: Callable[[bool], None], about: str) -> widgets.ToggleButton:
    """A button that stays down."""
    control = _control(widgets.ToggleButton, label, about)
    return classes(_observed(control, turned), "lorabook-switch")


def menu(label: str, options: Sequence, chosen: Callable, about: str, flex="1 1 0"):
    """A Dropdown that tells what was chosen; an option is a value, or (text, value or None)."""
    pairs = [option if isinstance(option, tuple) else (option, option) for option in options]
    pairs = [(text, _NONE if value is None else value) for text, value in pairs]
    control = _control(widgets.Dropdown, label, about, {"flex": flex}, options=pairs)
    return _observed(control, lambda value: chosen(None if value == _NONE else value))


def line(label: str, entered: Callable, about: str, placeholder: str = "", flex: str = "1 1 0"):
    """A line of text that is told when Enter is pressed or another place is clicked."""
    words = {"placeholder": placeholder, "continuous_update": False}
    return _observed(_control(widgets.Text, label, about, {"flex": flex}, **words), entered)


def text(words: str = "", kind: str = "lorabook-note") -> widgets.HTML:
    """A text to read."""
    return classes(say(widgets.HTML(), words), kind)


def say(control: widgets.HTML, words: str) -> widgets.HTML:
    """Let a text say something else; markup in it is shown as it stands."""
    control.value = html.escape(words, quote=False)
    return control


def row(*children: widgets.Widget, kind: str = "lorabook-row") -> widgets.HBox:
    """Widgets beside each other."""
    return classes(widgets.HBox(children), kind)


def stack(*children: widgets.Widget, kind: str = "lorabook-stack") -> widgets.VBox:
    """Widgets beneath each other."""
    return classes(widgets.VBox(children), kind)


def picture(*kinds: str, **layout) -> widgets.Image:
    """A place for an image."""
    return classes(widgets.Image(format="png", layout=layout), *kinds)


def png(image: Image.Image) -> bytes:
    """An image's bytes, as the browser gets them."""
    encoded = io.BytesIO()
    image.save(encoded, "PNG", compress_level=1)
    return encoded.getvalue()


def put(control: widgets.Widget, value) -> None:
    """Give a control a value where it has another; its range or options grow at need."""
    if isinstance(control, widgets.Dropdown):
        value = _NONE if value is None else value
        pairs = [one if isinstance(one, tuple) else (one, one) for one in control.options]
        if value not in [known for _, known in pairs]:
            control.options = [*pairs, (str(value), value)]
    elif isinstance(control, (widgets.FloatSlider, widgets.IntSlider)):
        if abs(value - control.value) < _NEAR:
            return
        control.max, control.min = max(control.max, value), min(control.min, value)
    if control.value != value:
        control.value = value


def classes(control: widgets.DOMWidget, *names: str):
    """The control with these DOM classes; empty names are passed over."""
    for name in filter(None, names):
        control.add_class(name)
    return control


def toggle_class(control: widgets.DOMWidget, name: str, on: bool) -> None:
    """Let a control have a DOM class or not."""
    (control.add_class if on else control.remove_class)(name)


def _control(kind: type, label: str, about: str, layout: dict | None = None, **more):
    layout = {"width": "auto"} | (layout or {})
    if kind not in (widgets.Button, widgets.ToggleButton):
        more["style"] = {"description_width": "initial"}
    control = kind(description=label, layout=layout, **more)
    # the trait's name changed from ipywidgets 7 to 8
    tooltip = "tooltip" if control.has_trait("tooltip") else "description_tooltip"
    setattr(control, tooltip, about)
    return control


def _observed(control: widgets.DOMWidget, changed: Callable):
    control.observe(lambda event: changed(event["new"]), names="value")
    return control
