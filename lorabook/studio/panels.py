"""The controls of the settings: what is generated, and each adapter block by block."""

import random
import re
from collections.abc import Callable
from dataclasses import replace

import ipywidgets as widgets
from diffusers import DiffusionPipeline

from lorabook.live.presets import PRESETS, VECTORS
from lorabook.live.scales import layer_scales, resolve_scales
from lorabook.live.state import lock_of
from lorabook.schedulers import SCHEDULERS
from lorabook.studio import controls as ui
from lorabook.studio.adapters import blocks_of, settings_for, touched_blocks
from lorabook.studio.settings import AdapterSettings, StudioSettings

Change = Callable[[Callable[[StudioSettings], StudioSettings]], None]
_NO_PRESET = "as the sliders are"
_OFF = AdapterSettings(on=False)


class PromptPanel(widgets.VBox):
    """What the pipeline's call is given; the prompts stand apart, in `words`.

    Attributes:
        controls: By the setting's name.
    """

    def __init__(self, change: Change, side: int):
        def to(name: str, read: Callable = lambda value: value) -> Callable:
            return lambda value: change(lambda settings: settings.with_(**{name: read(value)}))

        karras = [f"{name} karras" for name in SCHEDULERS if name.startswith("dpm")]
        schedulers = [("the model's own", None), *SCHEDULERS, *karras]
        pixels = {max(16, round(side * share / 8) * 8) for share in (0.5, 0.75, 1, 1.25, 1.5)}
        sizes = [("own", None), *((str(size), size) for size in sorted(pixels))]
        what, out = "what to draw", "what to keep out"
        prompt = ui.line("prompt", to("prompt"), what, what, "2 1 260px")
        about = f"negative prompt: {out}"
        without = ui.line("without", to("negative_prompt"), about, out, "1 1 160px")
        about = "one picture for each, as 0, 1, 2"
        seeds = ui.line("seeds", to("seeds", seeds_in), about, flex="1 1 80px")
        draw_seed = lambda: ui.put(seeds, str(random.randrange(10_000)))  # noqa: E731
        another = ui.button("another", "a new seed", draw_seed)
        about, moved = "denoising steps of the full picture", to("num_inference_steps")
        steps = ui.slider(widgets.IntSlider, "steps", moved, about, 1, 50)
        about, moved = "how closely to follow the prompt", to("guidance_scale")
        guidance = ui.slider(widgets.FloatSlider, "guidance", moved, about, 0.0, 15.0, 0.5)
        about = "how noise is taken away"
        scheduler = ui.menu("scheduler", schedulers, to("scheduler"), about)
        width = ui.menu("width", sizes, to("width"), "pixels across")
        height = ui.menu("height", sizes, to("height"), "pixels down")
        self.controls = {
            "prompt": prompt,
            "negative_prompt": without,
            "seeds": seeds,
            "num_inference_steps": steps,
            "guidance_scale": guidance,
            "scheduler": scheduler,
            "width": width,
            "height": height,
        }
        self.words = ui.row(prompt, without, kind="lorabook-words")
        rows = (seeds, another), (steps,), (guidance,), (scheduler,), (width, height)
        super().__init__([ui.row(*controls) for controls in rows])
        ui.classes(self, "lorabook-call")

    def show(self, settings: StudioSettings) -> None:
        """Let all controls stand as the settings say."""
        for name, control in self.controls.items():
            value = getattr(settings, name)
            ui.put(control, ", ".join(map(str, value)) if name == "seeds" else value)


def seeds_in(words: str) -> tuple[int, ...]:
    """The seeds that a person typed, as "0, 1, 2"."""
    seeds = [seed for seed in re.split(r"[,;\s]+", words.strip()) if seed]
    for seed in seeds:
        if not re.fullmatch(r"-?\d{1,20}", seed):
            raise ValueError(f"seeds are whole numbers, as 0, 1, 2; not {seed!r:.60}")
    return tuple(map(int, seeds))


class AdapterPanel(widgets.VBox):
    """The controls of one adapter at a time.

    Attributes:
        name: The adapter that is chosen, or None.
        blocks: By adapter, the sliders made so far by block.
    """

    def __init__(self, pipe: DiffusionPipeline, change: Change):
        self.name: str | None = None
        self.blocks: dict[str, dict[str, ui.ScaleSlider]] = {}
        self._maps: dict[str, widgets.VBox] = {}
        self._pipe, self._change = pipe, change
        self._of_preset: tuple[str, AdapterSettings] | None = None
        about = "the adapter that these sliders are of"
        self.choice = ui.menu("adapter", [], self._choose, about, "1 1 120px")
        self.on = ui.switch("on", lambda on: self._set(on=on), "let the adapter take part")
        about = "scale of the whole adapter"
        self.scale = ui.ScaleSlider("scale", lambda value: self._set(scale=value), about)
        self.scale.layout.flex = "3 1 200px"
        presets = [_NO_PRESET, *PRESETS, *VECTORS]
        self.presets = ui.menu("preset", presets, self._use_preset, "scales by name", "1 1 150px")
        about, level = "every slider of this adapter back to 1", AdapterSettings()
        self.level = ui.button("all to 1", about, lambda: self._replace(level))
        self._map = ui.stack()
        choice = ui.row(self.choice, self.on, self.scale)
        super().__init__([choice, self._map, ui.row(self.presets, self.level)])
        ui.classes(self, "lorabook-stack")

    def choose(self, name: str) -> None:
        """Turn to another adapter."""
        ui.put(self.choice, name)

    def show(self, settings: StudioSettings) -> None:
        """Let all controls stand as the settings say."""
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
        if self._of_preset != (self.name, replace(adapter, on=True)):
            ui.put(self.presets, _NO_PRESET)

    def _choose(self, name: str | None) -> None:
        if name is None or name == self.name:
            return
        self.name = name
        if name not in self.blocks:
            with lock_of(self._pipe):
                blocks, touched = blocks_of(self._pipe), touched_blocks(self._pipe, name)
            moved = lambda block, scale: self._set(blocks={block: scale})  # noqa: E731
            self.blocks[name] = ui.block_sliders(name, touched, moved)
            self._maps[name] = ui.block_map_of(self.blocks[name], blocks)
        self._map.children = (self._maps[name],)
        self._change(lambda settings: settings)

    def _set(self, **changes) -> None:
        if (name := self.name) is not None:
            self._change(lambda settings: settings.with_adapter(name, **changes))

    def _use_preset(self, preset: str) -> None:
        if preset == _NO_PRESET or self.name is None:
            return
        with lock_of(self._pipe):
            scales = resolve_scales(self._pipe, preset, self.name)
            numbers = layer_scales(self._pipe, self.name, scales)
        settings = settings_for(numbers, scales, on=True)
        self._of_preset = self.name, settings
        self._replace(settings)

    def _replace(self, wanted: AdapterSettings) -> None:
        """Let all scales be others; the adapter stays on or off."""
        if (name := self.name) is None:
            return

        def change(settings: StudioSettings) -> StudioSettings:
            adapter = replace(wanted, on=settings.adapters.get(name, _OFF).on)
            return settings.with_(adapters={**settings.adapters, name: adapter})

        self._change(change)
