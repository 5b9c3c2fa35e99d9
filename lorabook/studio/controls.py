"""The studio's smallest pieces: a slider with its way back, buttons, labels; for ipywidgets 7.7 and 8."""

import html
import io
from collections.abc import Callable, Sequence

import ipywidgets as widgets
from PIL import Image

LOWEST, HIGHEST, STEP = -1.0, 2.0, 0.05
_NONE = ""
_NEAR = 1e-6  # a slider's own arithmetic leaves 0.30000000000000004; writing 0.3 into it would fight the hand


class ScaleSlider:
    """A slider from −1 to 2, and a small button that brings it back to where it rests.

    Attributes:
        box: both, as one widget.
        slider: a FloatSlider whose track has marks at 0 and 1.
        back: the button.
    """

    def __init__(
        self,
        label: str,
        moved: Callable[[float], None],
        *,
        about: str,
        rest: float = 1.0,
        kind: str = "",
    ):
        """Args: the text beside it; what takes each new value; the whole name for tooltips; a further DOM class."""
        self.slider = widgets.FloatSlider(
            value=rest,
            min=LOWEST,
            max=HIGHEST,
            step=STEP,
            description=label,
            readout_format=".2f",
            style={"description_width": "initial"},
            layout={"width": "auto", "flex": "1 1 0", "min_width": "0"},
        )
        tip(self.slider, f"{about}: 0 is without, 1 as trained")
        self.slider.add_class("lorabook-ticked")
        self.back = button(
            "", f"{about} back to {rest:g}", lambda: put(self.slider, rest), kind="lorabook-back"
        )
        self.box = widgets.HBox([self.slider, self.back])
        self.box.add_class("lorabook-row")
        if kind:
            self.box.add_class(kind)
        self._rest, self._moved = rest, moved
        self.slider.observe(self._stirred, names="value")

    def _stirred(self, event) -> None:
        rested, rests = (abs(event[when] - self._rest) < _NEAR for when in ("old", "new"))
        if rested != rests:
            (self.box.remove_class if rests else self.box.add_class)("lorabook-moved")
        self._moved(round(event["new"], 4))

    def show(self, value: float) -> None:
        """Stand at a value; the range grows where it must."""
        put(self.slider, value)


def button(text: str, about: str, act: Callable[[], None], *, kind: str = "") -> widgets.Button:
    """A button; its tooltip is its label for screen readers where it has no text.

    Args:
        text: on it.
        about: what it does.
        act: called without arguments.
        kind: a DOM class.
    """
    made = widgets.Button(description=text, tooltip=about, layout={"width": "auto"})
    made.on_click(lambda _: act())
    made.add_class("lorabook-button")
    if kind:
        made.add_class(kind)
    return made


def menu(
    label: str, options: Sequence, chosen: Callable[[object], None], *, about: str, **layout
) -> widgets.Dropdown:
    """A menu that tells what was chosen; options as a Dropdown takes them, and None among their values."""
    pairs = [one if isinstance(one, tuple) else (one, one) for one in options]
    made = widgets.Dropdown(
        options=[(text, _stands_for(value)) for text, value in pairs],
        description=label,
        style={"description_width": "initial"},
        layout={"width": "auto"} | layout,
    )
    tip(made, about)
    made.observe(
        lambda event: chosen(None if event["new"] == _NONE else event["new"]), names="value"
    )
    return made


def line(
    label: str, entered: Callable[[str], None], *, about: str, placeholder: str = "", **layout
) -> widgets.Text:
    """A line of text that is told when Enter is pressed or another place is clicked."""
    made = widgets.Text(
        description=label,
        placeholder=placeholder,
        continuous_update=False,
        style={"description_width": "initial"},
        layout={"width": "auto"} | layout,
    )
    tip(made, about)
    made.observe(lambda event: entered(event["new"]), names="value")
    return made


def switch(text: str, turned: Callable[[bool], None], *, about: str) -> widgets.ToggleButton:
    """A button that stays down."""
    made = widgets.ToggleButton(description=text, tooltip=about, layout={"width": "auto"})
    made.observe(lambda event: turned(event["new"]), names="value")
    made.add_class("lorabook-switch")
    return made


def words(text: str = "", *, kind: str = "lorabook-note") -> widgets.HTML:
    """A text to read; markup in it is shown as it stands."""
    made = widgets.HTML(told(text))
    made.add_class(kind)
    return made


def told(text: str) -> str:
    """A text as HTML."""
    return html.escape(text, quote=False)


def row(*children: widgets.Widget, kind: str = "lorabook-row") -> widgets.HBox:
    """Widgets beside each other."""
    made = widgets.HBox(children)
    made.add_class(kind)
    return made


def stack(*children: widgets.Widget, kind: str = "lorabook-stack") -> widgets.VBox:
    """Widgets beneath each other."""
    made = widgets.VBox(children)
    made.add_class(kind)
    return made


def put(widget: widgets.Widget, value) -> None:
    """Give a widget a value where it has another; a slider's range, or a menu's options, grow where they must."""
    if isinstance(widget, widgets.Dropdown):
        value = _stands_for(value)
    present = widget.value
    if isinstance(value, float) and isinstance(present, float) and abs(value - present) < _NEAR:
        return
    if isinstance(widget, (widgets.FloatSlider, widgets.IntSlider)):
        widget.max, widget.min = max(widget.max, value), min(widget.min, value)
    if isinstance(widget, widgets.Dropdown):
        known = [one[1] if isinstance(one, tuple) else one for one in widget.options]
        if value not in known:
            widget.options = (*widget.options, (str(value), value))
    if present != value:
        widget.value = value


def _stands_for(value):
    """A Dropdown takes the value None for no choice at all."""
    return _NONE if value is None else value


def tip(widget: widgets.Widget, text: str) -> None:
    """What is shown when the pointer rests on a widget; the trait's name changed from 7 to 8."""
    setattr(widget, "tooltip" if widget.has_trait("tooltip") else "description_tooltip", text)


def png(image: Image.Image) -> bytes:
    """A picture's bytes, as the browser gets them."""
    encoded = io.BytesIO()
    image.save(encoded, "PNG", compress_level=1)
    return encoded.getvalue()
