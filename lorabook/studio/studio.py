"""The sliders: a pipeline's adapters in a person's hands, and the picture that follows."""

import io
import os
from collections.abc import Callable
from pathlib import Path

from PIL import Image

from lorabook.checks import listed
from lorabook.live.layers import adapter_names
from lorabook.live.load import LoadReport, load_adapter
from lorabook.live.manage import remove_adapter
from lorabook.live.save import SaveReport
from lorabook.live.state import lock_of
from lorabook.pipelines import world_of
from lorabook.show import display as mime
from lorabook.show.grid import ImageGrid
from lorabook.studio.adapter_files import adapter_files
from lorabook.studio.blocks_of_adapter import touched_blocks
from lorabook.studio.code import as_code
from lorabook.studio.drawable import check_drawable
from lorabook.studio.files import read_settings, write_adapter, write_picture
from lorabook.studio.gallery import Kept, in_words
from lorabook.studio.generate import Painted, Painter, settings_of, side_of
from lorabook.studio.history import History
from lorabook.studio.image_view import NOW, compared, enlarged
from lorabook.studio.settings import StudioSettings
from lorabook.studio.snapshot import static_picture
from lorabook.studio.view import View
from lorabook.studio.worker import Renderer
from lorabook.worlds import BUNDLED, DATA

_PATIENCE = 120  # seconds to wait for a picture that is asked for


class ScaleStudio:
    """Sliders for every block of a pipeline's adapters, and the picture that follows them; shows itself in a notebook.

    The pipeline stays an ordinary one: what the sliders say is on it, and the next `pipe(...)` draws with it. Where widgets
    cannot show, a static picture stands in.

    Attributes:
        pipe: the pipeline.
        widget: all controls and pictures, an ipywidgets Box.
        gallery: what was kept, as `Kept` with `picture`, `images` and `settings`.
    """

    def __init__(
        self,
        pipe,
        *,
        prompt: str | None = None,
        adapters_folder: str | os.PathLike | None = None,
        **more,
    ):
        """Args:
            pipe: with adapters, or without; the shelf loads some.
            prompt: None takes one that suits the model.
            adapters_folder: whose files lie on the shelf; None takes the bundled ones, with the bundled model.
            **more: other fields of StudioSettings (seeds, num_inference_steps, guidance_scale …).

        Raises: ValueError for settings out of range; FileNotFoundError if there is no such folder.
        """
        check_drawable(pipe)
        if adapters_folder is None and world_of(pipe) is BUNDLED:
            adapters_folder = DATA / "adapters"
        files = [] if adapters_folder is None else adapter_files(adapters_folder)
        self.pipe, self.gallery = pipe, []
        self._painted: Painted | None = None
        self._error: str | None = None
        with lock_of(pipe):
            self._history = History(settings_of(pipe, prompt, **more))
            self._painter = Painter(pipe)
            self._view = View(self, self._painter, files, side_of(pipe))
            self._renderer = self._new_renderer()
            self._follow()

    @property
    def widget(self):
        """All controls and pictures as one ipywidgets Box."""
        return self._view.box

    @property
    def settings(self) -> StudioSettings:
        """All that decides the picture; set it, and the sliders and the picture follow."""
        return self._history.present

    @settings.setter
    def settings(self, settings: StudioSettings) -> None:
        self.put(settings)

    def put(self, settings: StudioSettings) -> None:
        """Let the sliders and the picture follow these settings. Raises ValueError for adapters that are not loaded."""
        if not isinstance(settings, StudioSettings):
            raise ValueError(
                f"settings must be StudioSettings, not {settings!r:.80}; change them as "
                "studio.settings.with_(prompt=...)"
            )
        if new := settings.adapters.keys() - self.settings.adapters.keys():
            with lock_of(self.pipe):
                known = {*self.settings.adapters, *adapter_names(self.pipe)}
            if new - known:
                raise ValueError(
                    f"the pipeline has no adapter {min(new - known)!r:.80}; it has: {listed(sorted(known))}; "
                    "load it first with studio.load(file)"
                )
        self._history.push(settings)
        self._follow()

    def change(self, how: Callable[[StudioSettings], StudioSettings]) -> None:
        """Go on to what a function makes of the present settings."""
        self.put(how(self.settings))

    def undo(self) -> None:
        """Back to the settings before."""
        self._history.undo()
        self._follow()

    def redo(self) -> None:
        """Forth to what was undone."""
        self._history.redo()
        self._follow()

    def wait(self, timeout: float | None = None) -> bool:
        """Wait until the picture is what the settings say; returns whether that came within `timeout` seconds."""
        return self._renderer.wait(timeout)

    @property
    def picture(self) -> Image.Image:
        """The present picture (of the first seed), once it is there. Raises ValueError where the settings draw none."""
        return self._present().images[0]

    @property
    def grid(self) -> ImageGrid:
        """The present pictures, labelled: a row for each seed where base, now and difference stand side by side."""
        return self._grid(self._present())

    def keep(self) -> Kept:
        """Put the present pictures into the gallery, with their settings."""
        painted = self._present()
        kept = Kept(tuple(painted.images), painted.settings)
        self.gallery.append(kept)
        self._view.show_gallery(self.gallery)
        return kept

    def drop(self, kept: Kept) -> None:
        """Take a kept picture out of the gallery."""
        self.gallery = [one for one in self.gallery if one is not kept]
        self._view.show_gallery(self.gallery)

    def code(self, dialect: str = "lorabook") -> str:
        """Code that draws the present picture elsewhere: "lorabook", "diffusers", or "a1111" for the A1111 prompt line."""
        with lock_of(self.pipe):
            return as_code(self.settings, dialect, pipe=self.pipe)

    def load(self, file) -> LoadReport:
        """Load another adapter, from all that `load_adapter` takes; it takes part from now on.

        Raises: as `load_adapter`. The pipeline, the settings and the sliders are then as before.
        """
        self._renderer.close()  # which stops what runs; the next one begins with what is loaded then
        self._renderer, before, report = self._new_renderer(), self.settings, None
        with lock_of(self.pipe):
            try:
                report = load_adapter(self.pipe, file)
                self._painter.forget(report.name)
                self.put(before.with_adapter(report.name))
                self._view.adapter.choose(report.name)
            except BaseException:
                if report is not None:
                    remove_adapter(self.pipe, report.name)
                if self.settings != before:
                    self._history.drop()
                self._renderer.request(before)
                raise
        return report

    def save_adapter(self, path: str | os.PathLike) -> SaveReport:
        """Write what takes part as one adapter, its scales baked in. Raises ValueError where none takes part."""
        self.wait(_PATIENCE)
        with lock_of(self.pipe):
            self._painter.apply(self.settings)
            return write_adapter(self.pipe, path)

    def save_picture(self, path: str | os.PathLike) -> Path:
        """Write the present picture as a PNG, its settings inside; several as a grid. Returns the path."""
        painted = self._present()
        several = len(painted.images) > 1 or painted.base is not None
        return write_picture(
            self._grid(painted).picture() if several else painted.images[0], painted.settings, path
        )

    @staticmethod
    def settings_in(png: str | os.PathLike) -> StudioSettings:
        """The settings in a picture that `save_picture` wrote. Raises ValueError where there are none."""
        return read_settings(png)

    def close(self) -> None:
        """End the studio: widgets are closed, temporary blends and smaller ranks taken back; scales stay as they are."""
        self._renderer.close()
        self._painter.close()
        self._view.close()

    def __repr__(self):
        return f"ScaleStudio: {in_words(self.settings)} · {self.settings.prompt!r}"

    def _repr_mimebundle_(self, include=None, exclude=None) -> tuple[dict, dict]:
        """The widget, and the static picture for places that cannot show it."""
        self.wait(_PATIENCE)
        encoded = io.BytesIO()
        self.static().quantize(256, dither=Image.Dither.NONE).save(encoded, "PNG", optimize=True)
        data, metadata = mime.bundle(encoded.getvalue(), repr(self))
        widget = {"version_major": 2, "version_minor": 0, "model_id": self.widget.model_id}
        return data | {
            "text/plain": repr(self),
            "application/vnd.jupyter.widget-view+json": widget,
        }, metadata

    def static(self) -> Image.Image:
        """What is drawn, and where the sliders stand, as one picture."""
        grid = self._grid(self._painted, enlarged).picture() if self._painted else None
        with lock_of(self.pipe):
            touched = {name: touched_blocks(self.pipe, name) for name in self.settings.adapters}
        return static_picture(grid, self.settings, touched)

    def _present(self) -> Painted:
        """The pictures of the present settings, in full."""
        if not self.wait(_PATIENCE):
            if lock_of(self.pipe).is_mine():
                raise ValueError(
                    "the studio draws when the block or the call that has its pipeline is at its end; ask for "
                    "the picture after it"
                )
            raise TimeoutError(
                f"the picture is not there after {_PATIENCE} seconds; wait for it with studio.wait()"
            )
        if self._error or self._painted is None:
            raise ValueError(self._error or "the studio is closed, so there is no picture")
        return self._painted

    def _grid(
        self, painted: Painted, drawn: Callable[[Image.Image], Image.Image] = lambda image: image
    ) -> ImageGrid:
        rows = [{what: drawn(image) for what, image in row.items()} for row in compared(painted)]
        seeds = [f"seed {seed}" for seed in painted.settings.seeds]
        if painted.base is None:
            return ImageGrid(
                [[row[NOW] for row in rows]], columns=seeds, title=painted.settings.prompt
            )
        return ImageGrid(
            [list(row.values()) for row in rows],
            columns=list(rows[0]),
            rows=seeds,
            title=painted.settings.prompt,
        )

    def _follow(self) -> None:
        """Let the view and the picture follow the present settings."""
        self._error = None
        self._renderer.request(
            self.settings
        )  # first, since it stops what runs, and the view may wait for the pipeline
        self._view.show(self.settings, self._history.can_undo, self._history.can_redo)

    def _new_renderer(self) -> Renderer:
        return Renderer(self._painter.paint, self._show, self._fail, lambda: lock_of(self.pipe))

    def _show(self, painted: Painted) -> None:
        self._painted = painted
        self._view.show_painted(painted)

    def _fail(self, sentence: str, settings: StudioSettings) -> None:
        self._error = sentence
        self._view.say(sentence, wrong=True)
