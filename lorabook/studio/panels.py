"""The controls of the settings: what is generated, each adapter block by block, and the mix."""

from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import partial

import ipywidgets as widgets

from lorabook.live.presets import PRESETS, VECTORS
from lorabook.live.scales import layer_scales, resolve_scales
from lorabook.live.state import lock_of
from lorabook.lora.merge import METHODS
from lorabook.studio import controls as ui
from lorabook.studio.adapters import blocks_of, nearest_settings, touched_blocks, touched_parts
from lorabook.studio.generate import StudioGenerator
from lorabook.studio.settings import AdapterSettings, StudioSettings

Change = Callable[[Callable[[StudioSettings], StudioSettings]], None]
Sliders = dict[str, ui.ScaleSlider]
_NO_PRESET = "as the sliders are"
_OFF = AdapterSettings(on=False)


class AdapterPanel(widgets.VBox):
    """The controls of one adapter at a time.

    Attributes:
        name: The adapter that is chosen, or None.
        blocks, parts: By adapter, the sliders made so far by block and by part of a block.
    """

    def __init__(self, generator: StudioGenerator, change: Change):
        self.name: str | None = None
        self.blocks: dict[str, Sliders] = {}
        self.parts: dict[str, Sliders] = {}
        self._maps: dict[str, widgets.VBox] = {}
        self._lists: dict[str, widgets.VBox] = {}
        self._generator, self._change = generator, change
        self._settings, self._preset = StudioSettings(), None
        about = "the adapter that these sliders are of"
        self.choice = ui.menu("adapter", [], self._choose, about, "1 1 120px")
        self.on = ui.switch("on", lambda on: self._set(on=on), "let the adapter take part")
        about = "scale of the whole adapter"
        self.scale = ui.ScaleSlider("scale", lambda value: self._set(scale=value), about)
        self.scale.layout.flex = "3 1 200px"
        presets = [_NO_PRESET, *PRESETS, *VECTORS]
        self.presets = ui.menu("preset", presets, self._use_preset, "scales by name", "1 1 150px")
        about, level = "every slider of this adapter back to 1", AdapterSettings()
        self.level = ui.button("all to 1", about, lambda: self._put_scales(level))
        about = "sliders for kinds of layers and single parts of the blocks"
        self.fine = ui.switch("single layers", lambda _: self._lay_out_parts(), about)
        about = "cut the adapter to this rank"
        self.rank = ui.slider(widgets.IntSlider, "rank", self._cut, about, 1, 1)
        self.energy = ui.text()
        self._map, self._more = ui.stack(), ui.stack()
        choice = ui.row(self.choice, self.on, self.scale)
        preset = ui.row(self.presets, self.level, self.fine)
        rank = ui.row(self.rank, self.energy)
        super().__init__([choice, self._map, preset, rank, self._more])
        ui.classes(self, "lorabook-stack")

    def choose(self, name: str) -> None:
        """Turn to another adapter."""
        ui.put(self.choice, name)

    def show(self, settings: StudioSettings) -> None:
        """Let all controls stand as the settings say."""
        self._settings = settings
        names = list(dict.fromkeys([*self.choice.options, *settings.adapters]))
        if names != list(self.choice.options):
            chosen = self.name or names[0]
            self.choice.options = names  # which turns to the first
            self.choose(chosen)
        if self.name is None:
            return
        adapter = settings.adapters.get(self.name, _OFF)
        ui.put(self.on, adapter.on)
        self.scale.show(adapter.scale)
        for block, slider in self.blocks[self.name].items():
            slider.show(adapter.blocks.get(block, 1.0))
        for part, slider in self.parts.get(self.name, {}).items():
            slider.show(adapter.parts.get(part, 1.0))
        self.rank.max = largest = self._generator.ranks.largest(self.name)
        ui.put(self.rank, adapter.rank or largest)
        self.show_energy()
        if self._preset != (self.name, replace(adapter, on=True, rank=None)):
            ui.put(self.presets, _NO_PRESET)

    def show_energy(self) -> None:
        """Say how much of the adapter its rank leaves; known once the rank is on the pipeline."""
        if self.name is not None:
            share = self._generator.ranks.energy.get(self.name, 1.0)
            is_cut = self.rank.value < self.rank.max
            words = f"{share:.1%} of ‖ΔW‖² kept" if is_cut else f"as trained, rank {self.rank.max}"
            ui.say(self.energy, words)

    def _choose(self, name: str | None) -> None:
        if name is None or name == self.name:
            return
        self.name = name
        if name not in self.blocks:
            pipe = self._generator.pipe
            with lock_of(pipe):
                blocks, touched = blocks_of(pipe), touched_blocks(pipe, name)
            self.blocks[name] = ui.block_sliders(name, touched, self._set)
            self._maps[name] = ui.block_map_of(self.blocks[name], blocks)
        self._map.children = (self._maps[name],)
        self._lay_out_parts()
        self._change(lambda settings: settings)

    def _lay_out_parts(self) -> None:
        """Show the finer sliders, made when they are first asked for, or none."""
        name = self.name
        if self.fine.value and name is not None and name not in self.parts:
            with lock_of(self._generator.pipe):
                groups = touched_parts(self._generator.pipe, name)
            self.parts[name], self._lists[name] = ui.part_sliders(name, groups, self._set)
            for part, slider in self.parts[name].items():
                slider.show(self._settings.adapters.get(name, _OFF).parts.get(part, 1.0))
        self._more.children = (self._lists[name],) if self.fine.value and name else ()

    def _set(self, **changes) -> None:
        if (name := self.name) is not None:
            self._change(lambda settings: settings.with_adapter(name, **changes))

    def _cut(self, rank: int) -> None:
        self._set(rank=None if rank >= self.rank.max else rank)

    def _use_preset(self, preset: str) -> None:
        if preset != _NO_PRESET and self.name is not None:
            pipe = self._generator.pipe
            with lock_of(pipe):
                scales = layer_scales(pipe, self.name, resolve_scales(pipe, preset, self.name))
            settings = nearest_settings(scales)
            self._preset = self.name, settings
            self._put_scales(settings)

    def _put_scales(self, wanted: AdapterSettings) -> None:
        """Let all scales be others; the rank stays."""
        if (name := self.name) is None:
            return

        def change(settings: StudioSettings) -> StudioSettings:
            before = settings.adapters.get(name, _OFF)
            adapter = replace(wanted, on=before.on, rank=before.rank)
            return settings.with_(adapters={**settings.adapters, name: adapter})

        self._change(change)


class Mixer(widgets.VBox):
    """A slider and a switch for each adapter, the blend's method, and a crossfade of two.

    Attributes:
        scales, switches: By adapter.
        left, right, fade: Of the crossfade.
    """

    def __init__(self, change: Change):
        self._change, self._settings, self._placing = change, StudioSettings(), False
        self.scales: Sliders = {}
        self.switches: dict[str, widgets.ToggleButton] = {}
        methods = [("cat: simply added up", None), *METHODS[1:]]
        self.method = ui.menu(
            "method",
            methods,
            lambda method: change(lambda settings: settings.with_(blend_method=method)),
            "how several adapters become one",
        )
        self.left, self.right = (
            ui.menu(side, [], lambda _: self._place_fade(), f"the adapter on the {side}")
            for side in ("left", "right")
        )
        about = "from the left adapter alone to the right one alone"
        self.fade = ui.slider(
            widgets.FloatSlider, "crossfade", self._cross, about, 0.0, 1.0, 0.05, value=0.5
        )
        self._list = ui.stack()
        title, menus = ui.text("crossfade of two", "lorabook-title"), ui.row(self.left, self.right)
        self._pair = ui.stack(title, menus, ui.row(self.fade))
        title = ui.text("how much of each", "lorabook-title")
        super().__init__([title, self._list, ui.row(self.method), self._pair])
        ui.classes(self, "lorabook-stack")

    def show(self, settings: StudioSettings) -> None:
        """Let all controls stand as the settings say."""
        self._settings = settings
        if settings.adapters.keys() - self.scales.keys():
            self._add(settings.adapters)
        for name, slider in self.scales.items():
            adapter = settings.adapters.get(name, _OFF)
            ui.put(self.switches[name], adapter.on)
            slider.show(adapter.scale)
        ui.put(self.method, None if settings.blend_method == "cat" else settings.blend_method)
        self._place_fade()

    def _add(self, names: Iterable[str]) -> None:
        for name in names:
            if name not in self.scales:
                to = partial(self._to, name)
                self.scales[name] = ui.ScaleSlider(name, partial(to, "scale"), f"scale of {name}")
                self.scales[name].layout.flex = "1 1 0"
                self.switches[name] = ui.switch("on", partial(to, "on"), f"let {name} take part")
        rows = zip(self.scales.values(), self.switches.values(), strict=True)
        self._list.children = tuple(ui.row(*pair, kind="lorabook-channel") for pair in rows)
        names = list(self.scales)
        self._placing = True
        for menu, default in ((self.left, names[0]), (self.right, names[:2][-1])):
            chosen = menu.value or default
            menu.options = names
            menu.value = chosen
        self._placing = False
        self._pair.layout.display = None if len(names) > 1 else "none"

    def _to(self, name: str, field: str, value) -> None:
        self._change(lambda settings: settings.with_adapter(name, **{field: value}))

    def _cross(self, share: float) -> None:
        """Put the two at 1 − share and share."""
        left, right = self.left.value, self.right.value
        if not self._placing and left != right:
            self._change(
                lambda settings: settings.with_adapter(
                    left, on=True, scale=round(1 - share, 4)
                ).with_adapter(right, on=True, scale=share)
            )

    def _place_fade(self) -> None:
        """Let the crossfade stand where the two scales say, where they add up to 1."""
        names = (self.left.value, self.right.value)
        left, right = (self._settings.adapters.get(name, _OFF).scale for name in names)
        if not self._placing and abs(left + right - 1) < 1e-6 and 0 <= right <= 1:
            self._placing = True
            ui.put(self.fade, right)
            self._placing = False
