"""The studio's widgets put together: the bar, the images, and the panels in tabs."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path

import ipywidgets as widgets

from lorabook.studio import controls as ui
from lorabook.studio.code import DIALECTS
from lorabook.studio.generate import StudioImages
from lorabook.studio.panels import AdapterPanel, PromptPanel
from lorabook.studio.settings import History, StudioSettings
from lorabook.studio.shelf import Shelf
from lorabook.studio.worker import sentence_of

ALONE, SEVERAL, MOST = 320, 256, 512  # pixels: the least width of one image, of several; the most
_STYLE = Path(__file__).with_name("studio.css")
_SCRIPT = Path(__file__).with_name("studio.js")


class Stage(widgets.HBox):
    """The present images with a caption each; where one compares, a row for each seed."""

    def __init__(self):
        super().__init__()
        ui.classes(self, "lorabook-stage")
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
                ui.draw(place, image)
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
        place = ui.draw(ui.picture("lorabook-picture", width="112px"), one.picture)
        caption = ui.text(one.settings.in_words(), "lorabook-caption")
        about = "set everything as it was for this picture"
        back = ui.button("back to this", about, lambda: self._go_back(one.settings))
        about = "drop this picture from the gallery"
        drop = ui.button("", about, lambda: self._drop(one), "lorabook-drop")
        return ui.stack(place, caption, ui.row(back, drop), kind="lorabook-card")


class ExportPanel(widgets.VBox):
    """The settings as code, and names to save the adapter and the image by.

    Attributes:
        dialect, code: The menu and the text.
    """

    def __init__(self, code: Callable, save_adapter: Callable, save_picture: Callable):
        self._code = code
        self.dialect = ui.menu("as", [*DIALECTS], lambda _: self.refresh(), "whose code")
        copy = ui.button("copy", "copy the code", lambda: None, "lorabook-copy")  # see studio.js
        traits = {"layout": {"width": "auto"}, "style": {"description_width": "0"}}
        self.code = widgets.Textarea(description="code", rows=11, **traits)
        ui.classes(self.code, "lorabook-code")
        about = "folder or .safetensors file to write"
        adapter = _path_row("adapter", "studio-adapter", about, save_adapter)
        picture = _path_row("picture", "studio.png", "PNG file to write", save_picture)
        note = "Scales are baked into the adapter; the settings are kept inside the picture."
        super().__init__([ui.row(self.dialect, copy), self.code, ui.text(note), adapter, picture])
        ui.classes(self, "lorabook-take")

    def refresh(self) -> None:
        """Let the code say what the settings are now."""
        self.code.value = self._code(self.dialect.value)


class View(widgets.VBox):
    """All of the studio's widgets.

    It keeps no settings: what a person moves becomes other `studio.settings`, and `show` lets all
    controls stand as they say.
    """

    def __init__(self, studio, files: Mapping[str, Path], side: int):
        self._is_showing = False

        def change(how: Callable[[StudioSettings], StudioSettings]) -> None:
            def follow() -> None:
                studio.settings = how(studio.settings)

            if not self._is_showing:
                self._try(follow)

        def tried(act: Callable, done: str = "") -> Callable:
            return partial(self._try, act, done=done)

        self.stage, self.prompts = Stage(), PromptPanel(change, side)
        self.adapter = AdapterPanel(studio.pipe, change)
        self.shelf = Shelf(files, tried(studio.load), self.adapter.choose)
        self.gallery = Gallery(lambda settings: change(lambda _: settings), tried(studio.drop))
        written = "{}: written, its settings inside"
        self.take = ExportPanel(
            studio.code, tried(studio.save_adapter, "{}"), tried(studio.save_picture, written)
        )
        about = "back to the settings before"
        self.undo = ui.button("undo", about, tried(studio.undo), "lorabook-undo")
        about = "forth to what was undone"
        self.redo = ui.button("redo", about, tried(studio.redo), "lorabook-redo")
        about = "put the present picture into the gallery, with its settings"
        self.keep = ui.button("keep", about, tried(studio.keep, "kept, in the gallery"))
        about = "the base model's picture and the difference beside"
        compare = lambda on: change(lambda settings: settings.with_(compare=on))  # noqa: E731
        self.compare = ui.switch("compare", compare, about)
        self.status = ui.text(kind="lorabook-status")
        panels = {
            "blocks": self.adapter,
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
        bar = ui.row(*bar, kind="lorabook-bar")
        super().__init__([_style_and_script(), bar, self.prompts.words, self._body])
        ui.classes(self, "lorabook-studio")

    def show(self, history: History) -> None:
        """Let all controls stand as the present settings say; nothing comes back from that."""
        before, self._is_showing = self._is_showing, True
        try:
            for panel in (self.prompts, self.adapter, self.shelf):
                panel.show(history.present)
            ui.put(self.compare, history.present.compare)
            self.undo.disabled, self.redo.disabled = not history.past, not history.undone
            self._refresh_code()
        finally:
            self._is_showing = before

    def show_images(self, images: StudioImages) -> None:
        """Show images, and how long they took."""
        self.stage.show(images)
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


def _path_row(label: str, path: str, about: str, save: Callable) -> widgets.HBox:
    """A line for a path, and a button that saves there."""
    line = ui.line(label, lambda _: None, about)
    line.value = path
    return ui.row(line, ui.button(f"save {label}", f"write the {label}", lambda: save(line.value)))


def _style_and_script() -> widgets.HBox:
    """What a page needs to show the studio as it should be; not seen itself."""
    script = {"application/javascript": _SCRIPT.read_text()}
    output = {"output_type": "display_data", "data": script, "metadata": {}}
    style = widgets.HTML(f"<style>{_STYLE.read_text()}</style>")
    hidden = ui.row(style, widgets.Output(outputs=(output,)))
    hidden.layout.display = "none"
    return hidden
