"""All adapters side by side: how much of each, by which method they are put together, and a crossfade of two."""

from collections.abc import Callable

import ipywidgets as widgets

from lorabook.lora.merge import METHODS
from lorabook.studio.controls import ScaleSlider, menu, put, row, stack, switch, tip, words
from lorabook.studio.settings import AdapterSettings, StudioSettings

Change = Callable[[Callable[[StudioSettings], StudioSettings]], None]
_ADDED = "cat: simply added up"
_OFF = AdapterSettings(on=False)


class Mixer:
    """A slider and a switch for each adapter, the blend's method, and a crossfade; `box` is the widget."""

    def __init__(self, change: Change):
        self._change, self._channels, self._settings, self._placing = (
            change,
            {},
            StudioSettings(),
            False,
        )
        self.method = menu(
            "method",
            [(_ADDED, None), *((method, method) for method in METHODS[1:])],
            lambda method: change(lambda settings: settings.with_(blend_method=method)),
            about="how several adapters become one",
            flex="1 1 0",
        )
        self.left, self.right = (
            menu(
                which,
                [],
                lambda _: self._place(),
                about=f"the adapter on the {which}",
                flex="1 1 0",
            )
            for which in ("left", "right")
        )
        self.fade = widgets.FloatSlider(
            value=0.5,
            min=0,
            max=1,
            step=0.05,
            readout_format=".2f",
            description="crossfade",
            style={"description_width": "initial"},
            layout={"width": "auto", "flex": "1 1 0"},
        )
        tip(self.fade, "from the left adapter alone to the right one alone")
        self.fade.observe(lambda event: self._cross(round(event["new"], 4)), names="value")
        self._list = stack()
        self._pair = stack(
            words("crossfade of two", kind="lorabook-title"),
            row(self.left, self.right),
            row(self.fade),
        )
        self.box = stack(
            words("how much of each", kind="lorabook-title"),
            self._list,
            row(self.method),
            self._pair,
        )

    @property
    def scales(self) -> dict[str, ScaleSlider]:
        """The sliders by adapter."""
        return {name: channel[1] for name, channel in self._channels.items()}

    def show(self, settings: StudioSettings) -> None:
        """Let all controls stand as the settings say."""
        self._settings = settings
        if new := [name for name in settings.adapters if name not in self._channels]:
            self._add(new)
        for name, (on, scale) in self._channels.items():
            mine = settings.adapters.get(name, _OFF)
            put(on, mine.on)
            scale.show(mine.scale)
        put(self.method, None if settings.blend_method == "cat" else settings.blend_method)
        self._place()

    def _add(self, names: list[str]) -> None:
        self._channels |= {name: self._channel(name) for name in names}
        self._list.children = tuple(
            row(scale.box, on, kind="lorabook-channel") for on, scale in self._channels.values()
        )
        self._placing = True
        for choice, place in ((self.left, 0), (self.right, 1)):
            before = choice.value
            choice.options = list(self._channels)
            choice.value = before or list(self._channels)[min(place, len(self._channels) - 1)]
        self._placing = False
        self._pair.layout.display = None if len(self._channels) > 1 else "none"

    def _channel(self, name: str) -> tuple[widgets.ToggleButton, ScaleSlider]:
        def to(what: str) -> Callable:
            return lambda value: self._change(
                lambda settings: settings.with_adapter(name, **{what: value})
            )

        scale = ScaleSlider(name, to("scale"), about=f"scale of {name}")
        scale.box.layout.flex = "1 1 0"
        return switch("on", to("on"), about=f"let {name} take part"), scale

    def _cross(self, share: float) -> None:
        """The two at 1 − share and share."""
        left, right = self.left.value, self.right.value
        if self._placing or left == right:
            return
        self._change(
            lambda settings: settings.with_adapter(
                left, on=True, scale=round(1 - share, 4)
            ).with_adapter(right, on=True, scale=share)
        )

    def _place(self) -> None:
        """Let the crossfade stand where the two scales say, where they add up to 1."""
        pair = [
            self._settings.adapters.get(choice.value, _OFF).scale
            for choice in (self.left, self.right)
        ]
        if not self._placing and abs(sum(pair) - 1) < 1e-6 and 0 <= pair[1] <= 1:
            self._placing = True
            put(self.fade, pair[1])
            self._placing = False
