"""The studio's widgets put together: the bar, the images, and the panels in tabs."""

import random
import re
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path

import ipywidgets as widgets

from lorabook.schedulers import SCHEDULERS
from lorabook.studio import controls as ui
from lorabook.studio.export import ExportPanel
from lorabook.studio.generate import NOW, StudioGenerator, StudioImages
from lorabook.studio.panels import AdapterPanel, Change, Mixer
from lorabook.studio.settings import StudioSettings
from lorabook.studio.shelf import Shelf
from lorabook.studio.worker import sentence_of

ALONE, SEVERAL, MOST = 320, 256, 512  # pixels: the least width of one image, of several; the most
_STYLE = Path(__file__).with_name("studio.css")
_SCRIPT = Path(__file__).with_name("studio.js")


class Stage(widgets.HBox):
    """The present images with a caption each; where one compares, a row for each seed.

    Attributes:
        now: The images of DOM class `lorabook-now`.
    """

    def __init__(self):
        super().__init__()
        ui.classes(self, "lorabook-stage")
        self.now: list[widgets.Image] = []
        self._figures: dict[tuple[str, int], widgets.VBox] = {}
        self._rows: list[list[widgets.VBox]] = []

    def show(self, images: StudioImages) -> None:
        """Show images; widgets that are there take the new bytes."""
        least = ALONE if len(images.images) == 1 and images.base is None else SEVERAL
        seeds, rows = images.settings.seeds, []
        for number, row in enumerate(images.rows):
            figures = []
            for what, image in row.items():
                if (what, number) not in self._figures:
                    place = ui.picture("lorabook-picture", f"lorabook-{what}", max_width="100%")
                    caption = ui.text(kind="lorabook-caption")
                    self._figures[what, number] = ui.stack(place, caption, kind="lorabook-figure")
                figures.append(self._figures[what, number])
                place, caption = figures[-1].children
                place.value = ui.png(image)
                zoom = max(1, -(-least // image.width))
                place.layout.width = f"{min(image.width * zoom, MOST)}px"
                seed = f"seed {seeds[number]}" if len(seeds) > 1 or len(row) == 1 else ""
                ui.say(caption, " · ".join(filter(None, (what if len(row) > 1 else "", seed))))
            rows.append(figures)
        if rows != self._rows:  # else the browser would build all of it anew for each image
            self._rows = rows
            if images.base is not None:
                rows = [[ui.row(*figures, kind="lorabook-compared")] for figures in rows]
            self.children = tuple(figure for row in rows for figure in row)
        self.now = [self._figures[NOW, number].children[0] for number in range(len(seeds))]


class Gallery(widgets.VBox):
    """Kept images, each with a way back to its settings and out of the gallery."""

    def __init__(self, go_back: Callable, drop: Callable):
        self._go_back, self._drop = go_back, drop
        self._cards: dict[int, widgets.VBox] = {}
        self._wall = ui.row(kind="lorabook-wall")
        self._nothing = ui.text(
            "Nothing kept yet: “keep” puts the present picture here, with its settings."
        )
        super().__init__([self._nothing, self._wall])
        ui.classes(self, "lorabook-stack")

    def show(self, gallery: Sequence[StudioImages]) -> None:
        """Show these, the newest first."""
        cards = self._cards
        self._cards = {id(one): cards.get(id(one)) or self._card(one) for one in gallery}
        self._wall.children = tuple(self._cards[id(one)] for one in reversed(gallery))
        self._nothing.layout.display = "none" if gallery else None

    def _card(self, one: StudioImages) -> widgets.VBox:
        place = ui.picture("lorabook-picture", width="112px")
        place.value = ui.png(one.picture)
        caption = ui.text(one.settings.in_words(), "lorabook-caption")
        about = "set everything as it was for this picture"
        back = ui.button("back to this", about, lambda: self._go_back(one.settings))
        about = "drop this picture from the gallery"
        drop = ui.button("", about, lambda: self._drop(one), "lorabook-drop")
        return ui.stack(place, caption, ui.row(back, drop), kind="lorabook-card")


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
        shares = (0.5, 0.75, 1, 1.25, 1.5)
        pixels = sorted({max(16, round(side * share / 8) * 8) for share in shares})
        sizes = [("own", None), *((str(size), size) for size in pixels)]
        what, out = "what to draw", "what to keep out"
        prompt = ui.line("prompt", to("prompt"), what, what, "2 1 260px")
        without = to("negative_prompt")
        negative = ui.line("without", without, f"negative prompt: {out}", out, "1 1 160px")
        about = "one picture for each, as 0, 1, 2"
        seeds = ui.line("seeds", to("seeds", seeds_in), about, flex="1 1 80px")
        new_seed = partial(random.randrange, 10_000)
        another = ui.button("another", "a new seed", lambda: ui.put(seeds, str(new_seed())))
        about, change_steps = "denoising steps of the full picture", to("num_inference_steps")
        steps = ui.slider(widgets.IntSlider, "steps", change_steps, about, 1, 50)
        about, change_guidance = "how closely to follow the prompt", to("guidance_scale")
        guidance = ui.slider(
            widgets.FloatSlider, "guidance", change_guidance, about, 0.0, 15.0, 0.5
        )
        about = "how noise is taken away"
        scheduler = ui.menu("scheduler", schedulers, to("scheduler"), about)
        width = ui.menu("width", sizes, to("width"), "pixels across")
        height = ui.menu("height", sizes, to("height"), "pixels down")
        self.controls = {
            "prompt": prompt,
            "negative_prompt": negative,
            "seeds": seeds,
            "num_inference_steps": steps,
            "guidance_scale": guidance,
            "scheduler": scheduler,
            "width": width,
            "height": height,
        }
        self.words = ui.row(prompt, negative, kind="lorabook-words")
        rows = (seeds, another), (steps,), (guidance,), (scheduler,), (width, height)
        super().__init__([ui.row(*controls) for controls in rows])
        ui.classes(self, "lorabook-call")

    def show(self, settings: StudioSettings) -> None:
        """Let all controls stand as the settings say."""
        for name, control in self.controls.items():
            value = getattr(settings, name)
            ui.put(control, ", ".join(map(str, value)) if name == "seeds" else value)


def seeds_in(words: str) -> tuple[int, ...]:
    """The seeds that a person typed, as "0, 1, 2".

    Raises:
        ValueError: For what is no whole number.
    """
    seeds = [seed for seed in re.split(r"[,;\s]+", words.strip()) if seed]
    for seed in seeds:
        if not re.fullmatch(r"-?\d{1,20}", seed):
            raise ValueError(f"seeds are whole numbers, as 0, 1, 2; not {seed!r:.60}")
    return tuple(map(int, seeds))


class View(widgets.VBox):
    """All of the studio's widgets.

    It keeps no settings: what a person moves becomes a call of `studio.change`, and `show` lets all
    controls stand as the settings say.
    """

    def __init__(self, studio, generator: StudioGenerator, files: Mapping[str, Path], side: int):
        self._is_showing = False

        def change(how: Callable[[StudioSettings], StudioSettings]) -> None:
            if not self._is_showing:
                self._try(studio.change, how)

        def tried(act: Callable, done: str = "") -> Callable:
            return partial(self._try, act, done=done)

        self.stage, self.prompts = Stage(), PromptPanel(change, side)
        self.adapter, self.mixer = AdapterPanel(generator, change), Mixer(change)
        self.shelf = Shelf(files, tried(studio.load), self.adapter.choose)
        self.gallery = Gallery(tried(studio.put), tried(studio.drop))
        written = "{}: written, its settings inside"
        self.take = ExportPanel(
            studio.code, tried(studio.save_adapter, "{}"), tried(studio.save_picture, written)
        )
        about = "back to the settings before"
        self.undo = ui.button("undo", about, tried(studio.undo), "lorabook-undo")
        self.redo = ui.button(
            "redo", "forth to what was undone", tried(studio.redo), "lorabook-redo"
        )
        about = "put the present picture into the gallery, with its settings"
        self.keep = ui.button("keep", about, tried(studio.keep, "kept, in the gallery"))
        self.compare = ui.switch(
            "compare",
            lambda on: change(lambda settings: settings.with_(compare=on)),
            "the base model's picture and the difference beside",
        )
        self.status = ui.text(kind="lorabook-status")
        panels = {
            "blocks": self.adapter,
            "mix": self.mixer,
            "shelf": self.shelf,
            "gallery": self.gallery,
            "take away": self.take,
        }
        self.tabs = ui.classes(widgets.Tab(list(panels.values())), "lorabook-tabs")
        for number, title in enumerate(panels):
            self.tabs.set_title(number, title)
        self.tabs.selected_index = 0
        self.tabs.observe(lambda _: self._refresh_code(), names="selected_index")
        name = ui.text("scale studio", "lorabook-name")
        bar = (name, self.undo, self.redo, self.compare, self.keep, self.status)
        left = ui.stack(self.stage, self.prompts, kind="lorabook-left")
        right = ui.stack(self.tabs, kind="lorabook-right")
        self._body = ui.row(left, right, kind="lorabook-body")
        script = {"application/javascript": _SCRIPT.read_text()}
        output = {"output_type": "display_data", "data": script, "metadata": {}}
        style = widgets.HTML(f"<style>{_STYLE.read_text()}</style>")
        hidden = ui.row(style, widgets.Output(outputs=(output,)))
        hidden.layout.display = "none"
        bar = ui.row(*bar, kind="lorabook-bar")
        super().__init__([hidden, bar, self.prompts.words, self._body])
        ui.classes(self, "lorabook-studio")

    def show(self, settings: StudioSettings, can_undo: bool, can_redo: bool) -> None:
        """Let all controls stand as the settings say; nothing comes back from that."""
        before, self._is_showing = self._is_showing, True
        try:
            for panel in (self.prompts, self.adapter, self.mixer, self.shelf):
                panel.show(settings)
            ui.put(self.compare, settings.compare)
            self.undo.disabled, self.redo.disabled = not can_undo, not can_redo
            self._refresh_code()
        finally:
            self._is_showing = before

    def show_images(self, images: StudioImages) -> None:
        """Show images, and how long they took."""
        self.stage.show(images)
        self.adapter.show_energy()
        is_wide = len(images.images) > 1 or images.base is not None
        ui.toggle_class(self._body, "lorabook-wide", is_wide)
        steps = images.settings.num_inference_steps
        kind = "preview" if images.preview else f"{steps} steps"
        self.say(f"{kind} · {images.seconds:.2f} s")

    def say(self, sentence: str, *, wrong: bool = False) -> None:
        """Put a sentence into the status line."""
        ui.say(self.status, sentence)
        ui.toggle_class(self.status, "lorabook-wrong", wrong)

    def close_all(self) -> None:
        """Close all widgets."""
        waiting = [self]
        while waiting:
            widget = waiting.pop()
            waiting += getattr(widget, "children", ())
            widget.close()

    def _try(self, act: Callable, *args, done: str = "") -> bool:
        """Act; an error becomes a sentence in the status line. Returns whether all went well."""
        try:
            result = act(*args)
        except Exception as error:  # whatever it is, the next movement has to work
            self.say(sentence_of(error), wrong=True)
            return False
        if done:
            self.say(done.format(result))
        return True

    def _refresh_code(self) -> None:
        """Write the code, where it is seen."""
        if self.tabs.selected_index == len(self.tabs.children) - 1:
            self.take.refresh()
