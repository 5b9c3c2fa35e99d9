"""One adapter in hand: which it is, whether it takes part, how much of it, block by block, and at which rank."""

from collections.abc import Callable
from dataclasses import replace

import ipywidgets as widgets

from lorabook.live.presets import PRESETS, VECTORS
from lorabook.live.scales import layer_scales, resolve_scales
from lorabook.live.state import lock_of
from lorabook.studio.block_sliders import BlockSliders
from lorabook.studio.blocks_of_adapter import (
    blocks_of,
    touched_blocks,
    touched_kinds,
    touched_parts,
)
from lorabook.studio.controls import ScaleSlider, button, menu, put, row, stack, switch, tip, words
from lorabook.studio.from_scales import nearest_settings
from lorabook.studio.layer_sliders import PartSliders
from lorabook.studio.settings import AdapterSettings, StudioSettings

Change = Callable[[Callable[[StudioSettings], StudioSettings]], None]
_NO_PRESET = "as the sliders are"
_OFF = AdapterSettings(on=False)


class AdapterPanel:
    """The controls of one adapter at a time; `box` is the widget, `name` the adapter that is chosen, or None.

    Attributes:
        maps: the block sliders made so far, by adapter.
    """

    def __init__(self, painter, change: Change):
        self.name: str | None = None
        self.maps: dict[str, BlockSliders] = {}
        self._painter, self._change, self._parts, self._settings = (
            painter,
            change,
            {},
            StudioSettings(),
        )
        self._blocks, self._preset_scales = blocks_of(painter.pipe), ()
        self.choice = menu(
            "adapter",
            [],
            self._choose,
            about="the adapter that these sliders are of",
            flex="1 1 120px",
        )
        self.on = switch("on", lambda on: self._set(on=on), about="let the adapter take part")
        self.scale = ScaleSlider(
            "scale", lambda value: self._set(scale=value), about="scale of the whole adapter"
        )
        self.presets = menu(
            "preset",
            [_NO_PRESET, *PRESETS, *VECTORS],
            self._preset,
            about="scales by name",
            flex="1 1 150px",
        )
        self.level = button("all to 1", "every slider of this adapter back to 1", self._all_to_one)
        self.fine = switch(
            "single layers",
            self._finer,
            about="sliders for kinds of layers and single parts of the blocks",
        )
        self.rank = widgets.IntSlider(
            value=1,
            min=1,
            max=1,
            description="rank",
            style={"description_width": "initial"},
            layout={"width": "auto", "flex": "1 1 160px", "min_width": "0"},
        )
        tip(self.rank, "cut the adapter to this rank")
        self.rank.observe(lambda event: self._cut(event["new"]), names="value")
        self.kept = words()
        self._map, self._more = stack(), stack()
        self.box = stack(
            row(self.choice, self.on, _grow(self.scale.box)),
            self._map,
            row(self.presets, self.level, self.fine),
            row(self.rank, self.kept),
            self._more,
        )

    def show(self, settings: StudioSettings) -> None:
        """Let all controls stand as the settings say."""
        self._settings = settings
        names = list(dict.fromkeys([*self.choice.options, *settings.adapters]))
        if names != list(self.choice.options):
            self.choice.options = names  # which turns to the first
            put(self.choice, self.name or names[0])
        if self.name is not None:
            self._show_one(settings.adapters.get(self.name, _OFF))

    def choose(self, name: str) -> None:
        """Turn to another adapter."""
        put(self.choice, name)

    def _choose(self, name: str) -> None:
        if name == self.name or name is None:
            return
        self.name, pipe = name, self._painter.pipe
        if name not in self.maps:
            with lock_of(pipe):
                touched = touched_blocks(pipe, name)
            self.maps[name] = BlockSliders(
                name, touched, self._blocks, lambda block, value: self._set(blocks={block: value})
            )
        self._map.children = (self.maps[name].box,)
        self._finer(self.fine.value)
        self._change(lambda settings: settings)

    def _show_one(self, mine: AdapterSettings) -> None:
        put(self.on, mine.on)
        self.scale.show(mine.scale)
        self.maps[self.name].show(mine)
        if self.name in self._parts:
            self._parts[self.name].show(mine)
        largest = self._painter.largest_rank(self.name)
        if self.rank.max != largest:
            self.rank.max = largest
        put(self.rank, mine.rank or largest)
        share = self._painter.energy_kept(self.name, mine.rank) if mine.rank else 1.0
        self.kept.value = (
            f"{share:.1%} of ‖ΔW‖² kept" if mine.rank else f"as trained, rank {largest}"
        )
        if self._preset_scales != (self.name, _scales(mine)):
            put(self.presets, _NO_PRESET)

    def _set(self, **changes) -> None:
        name = self.name
        if name is not None:
            self._change(lambda settings: settings.with_adapter(name, **changes))

    def _cut(self, rank: int) -> None:
        self._set(rank=None if rank >= self.rank.max else rank)

    def _all_to_one(self) -> None:
        self._put_all(AdapterSettings())

    def _preset(self, name: str) -> None:
        if name != _NO_PRESET and self.name is not None:
            pipe = self._painter.pipe
            with lock_of(pipe):
                wanted = nearest_settings(
                    layer_scales(pipe, self.name, resolve_scales(pipe, name, self.name))
                )
            self._preset_scales = self.name, _scales(wanted)
            self._put_all(wanted)

    def _put_all(self, wanted: AdapterSettings) -> None:
        """Scales in the place of all that are; the rank stays."""
        name = self.name
        if name is not None:
            self._change(
                lambda settings: settings.with_(
                    adapters={
                        **settings.adapters,
                        name: replace(
                            settings.adapters.get(name, _OFF),
                            scale=wanted.scale,
                            blocks=wanted.blocks,
                            parts=wanted.parts,
                        ),
                    }
                )
            )

    def _finer(self, wanted: bool) -> None:
        name, pipe = self.name, self._painter.pipe
        if wanted and name is not None and name not in self._parts:
            with lock_of(pipe):
                kinds, parts = touched_kinds(pipe, name), touched_parts(pipe, name)
            self._parts[name] = PartSliders(
                name, kinds, parts, lambda part, value: self._set(parts={part: value})
            )
            self._parts[name].show(self._settings.adapters.get(name, _OFF))
        self._more.children = (self._parts[name].box,) if wanted and name in self._parts else ()


def _grow(box: widgets.HBox) -> widgets.HBox:
    box.layout.flex = "3 1 200px"
    return box


def _scales(settings: AdapterSettings) -> tuple:
    return settings.scale, settings.blocks, settings.parts
