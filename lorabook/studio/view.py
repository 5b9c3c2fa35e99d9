"""The studio's panels put together."""

from collections.abc import Callable, Sequence

import ipywidgets as widgets

from lorabook.studio.adapter_browser import Shelf
from lorabook.studio.adapter_files import ShelfFile
from lorabook.studio.adapter_panel import AdapterPanel
from lorabook.studio.controls import button, put, row, stack, switch, told, words
from lorabook.studio.export_panel import ExportPanel
from lorabook.studio.gallery import Gallery, Kept
from lorabook.studio.generate import Painted
from lorabook.studio.image_view import Stage
from lorabook.studio.mixer import Mixer
from lorabook.studio.prompt_panel import PromptPanel
from lorabook.studio.settings import StudioSettings
from lorabook.studio.style import LABELS, STYLES
from lorabook.studio.worker import in_one_sentence


class View:
    """All of the studio's widgets.

    It keeps no settings: what a person moves becomes a call of `studio.change`, and `show` lets all controls stand as the
    settings say.

    Attributes:
        box: the whole as one widget.
        stage, words, adapter, mixer, shelf, gallery, take: the panels.
        undo, redo, compare, keep: of the bar.
        status: the line that says what happened.
    """

    def __init__(self, studio, painter, files: Sequence[ShelfFile], side: int):
        """Args: a ScaleStudio; its Painter; what lies on the shelf; the pixels of the model's own pictures."""
        self._showing = False
        change = self._unless_showing(self._tried(studio.change))
        self.stage, self.words = Stage(), PromptPanel(change, side)
        self.adapter, self.mixer = AdapterPanel(painter, change), Mixer(change)
        self.shelf = Shelf(files, self._tried(studio.load), self.adapter.choose)
        self.gallery = Gallery(self._tried(studio.put), self._tried(studio.drop))
        self.take = ExportPanel(
            studio.code,
            self._tried(studio.save_adapter, "{}"),
            self._tried(studio.save_picture, "{}: written, its settings inside"),
        )
        self.undo = button(
            "undo", "back to the settings before", self._tried(studio.undo), kind="lorabook-undo"
        )
        self.redo = button(
            "redo", "forth to what was undone", self._tried(studio.redo), kind="lorabook-redo"
        )
        self.keep = button(
            "keep",
            "put the present picture into the gallery, with its settings",
            self._tried(studio.keep, "kept, in the gallery"),
        )
        self.compare = switch(
            "compare",
            lambda on: change(lambda settings: settings.with_(compare=on)),
            about="the base model's picture and the difference beside",
        )
        self.status = words(kind="lorabook-status")
        self.tabs = _tabs(
            {
                "blocks": self.adapter.box,
                "mix": self.mixer.box,
                "shelf": self.shelf.box,
                "gallery": self.gallery.box,
                "take away": self.take.box,
            },
            self._turned,
        )
        bar = row(
            words("scale studio", kind="lorabook-name"),
            self.undo,
            self.redo,
            self.compare,
            self.keep,
            self.status,
            kind="lorabook-bar",
        )
        left, right = (
            stack(self.stage.box, self.words.box, kind="lorabook-left"),
            stack(self.tabs, kind="lorabook-right"),
        )
        self._body = row(left, right, kind="lorabook-body")
        self.box = stack(
            widgets.HTML(STYLES + LABELS, layout={"display": "none"}),
            bar,
            self.words.words,
            self._body,
            kind="lorabook-studio",
        )

    def show(self, settings: StudioSettings, can_undo: bool, can_redo: bool) -> None:
        """Let all controls stand as the settings say; nothing comes back from that."""
        before, self._showing = self._showing, True
        try:
            for panel in (self.words, self.adapter, self.mixer, self.shelf):
                panel.show(settings)
            put(self.compare, settings.compare)
            self.undo.disabled, self.redo.disabled = not can_undo, not can_redo
            self._turned()
        finally:
            self._showing = before

    def show_gallery(self, gallery: Sequence[Kept]) -> None:
        """Show what is kept."""
        self.gallery.show(gallery)

    def show_painted(self, painted: Painted) -> None:
        """Show pictures, and how long they took."""
        self.stage.show(painted)
        (self._body.remove_class if self.stage.alone else self._body.add_class)("lorabook-wide")
        steps = painted.settings.num_inference_steps
        self.say(
            f"preview · {painted.seconds:.2f} s"
            if painted.preview
            else f"{steps} steps · {painted.seconds:.2f} s"
        )

    def say(self, sentence: str, *, wrong: bool = False) -> None:
        """Put a sentence into the status line."""
        self.status.value = told(sentence)
        (self.status.add_class if wrong else self.status.remove_class)("lorabook-wrong")

    def close(self) -> None:
        """Close all widgets."""
        waiting = [self.box]
        while waiting:
            widget = waiting.pop()
            waiting += getattr(widget, "children", ())
            widget.close()

    def _unless_showing(self, change: Callable) -> Callable:
        return lambda how: None if self._showing else change(how)

    def _tried(self, act: Callable, after: str = "") -> Callable[..., bool]:
        """The same, where an error becomes a sentence in the status line; tells whether all went well."""

        def tried(*args) -> bool:
            try:
                result = act(*args)
            except Exception as error:  # whatever it is, the next movement has to work
                self.say(in_one_sentence(error), wrong=True)
                return False
            if after:
                self.say(after.format(result))
            return True

        return tried

    def _turned(self) -> None:
        """The code is written only where it is seen."""
        if self.tabs.selected_index == len(self.tabs.children) - 1:
            self.take.refresh()


def _tabs(panels: dict[str, widgets.Widget], turned: Callable[[], None]) -> widgets.Tab:
    made = widgets.Tab(list(panels.values()))
    for number, title in enumerate(panels):
        made.set_title(number, title)
    made.selected_index = 0
    made.add_class("lorabook-tabs")
    made.observe(lambda _: turned(), names="selected_index")
    return made
