"""The sliders: a pipeline's adapters in a person's hands, and the picture that follows."""

import io
import os
from collections.abc import Callable
from pathlib import Path

from diffusers import DiffusionPipeline
from PIL import Image

from lorabook.checks import listed
from lorabook.live.layers import adapter_names
from lorabook.live.load import LoadReport, load_adapter
from lorabook.live.manage import remove_adapter
from lorabook.live.save import SaveReport
from lorabook.live.state import lock_of
from lorabook.pipelines import world_of
from lorabook.show import display
from lorabook.show.grid import ImageGrid
from lorabook.studio import export
from lorabook.studio.adapters import touched_blocks
from lorabook.studio.code import as_code
from lorabook.studio.generate import (
    StudioGenerator,
    StudioImages,
    first_settings,
    side_of,
)
from lorabook.studio.settings import History, StudioSettings
from lorabook.studio.shelf import adapter_files
from lorabook.studio.view import SEVERAL, View
from lorabook.studio.worker import Renderer
from lorabook.worlds import BUNDLED, DATA

_PATIENCE = 120  # seconds to wait for an image that is asked for


class ScaleStudio:
    """Sliders for every block of a pipeline's adapters, and the picture that follows them.

    It shows itself in a notebook; where widgets cannot show, a static picture stands in. The
    pipeline stays an ordinary one: the next `pipe(...)` has the scales that the sliders show.

    Args:
        pipe: With adapters, or without; the shelf loads some.
        prompt: None takes one that suits the model.
        adapters_folder: Whose files lie on the shelf; None takes the bundled ones, with the bundled
            model.
        **settings: Other fields of StudioSettings (seeds, num_inference_steps …).

    Attributes:
        widget: All controls and images, an ipywidgets box.
        gallery: What was kept, with `picture`, `images` and `settings` each.

    Raises:
        ValueError: For a pipeline that cannot be used, or settings out of range.
        FileNotFoundError: If there is no such folder.
    """

    def __init__(
        self,
        pipe: DiffusionPipeline,
        *,
        prompt: str | None = None,
        adapters_folder: str | os.PathLike | None = None,
        **settings,
    ):
        self.pipe, self.gallery = pipe, []
        self._images: StudioImages | None = None
        self._error: str | None = None
        with lock_of(pipe):
            self._generator = StudioGenerator(pipe)
            if adapters_folder is None and world_of(pipe) is BUNDLED:
                adapters_folder = DATA / "adapters"
            files = adapter_files(adapters_folder) if adapters_folder else {}
            self._history = History(first_settings(pipe, prompt, **settings))
            self.widget = View(self, self._generator, files, side_of(pipe))
            self._renderer = self._new_renderer()
            self._follow()

    @property
    def settings(self) -> StudioSettings:
        """All that decides the picture; set it, and the sliders and the picture follow."""
        return self._history.present

    @settings.setter
    def settings(self, settings: StudioSettings) -> None:
        self.put(settings)

    def put(self, settings: StudioSettings) -> None:
        """Let the sliders and the picture follow these settings.

        Raises:
            ValueError: For adapters that are not loaded.
        """
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
                    f"the pipeline has no adapter {min(new - known)!r:.80}; it has: "
                    f"{listed(sorted(known), 8)}; load it first with studio.load(file)"
                )
        self._history.push(settings)
        self._follow()

    def change(self, how: Callable[[StudioSettings], StudioSettings]) -> None:
        """Go on to what a function makes of the present settings."""
        self.put(how(self.settings))

    def undo(self) -> None:
        """Go back to the settings before."""
        self._history.go(-1)
        self._follow()

    def redo(self) -> None:
        """Go forth to what was undone."""
        self._history.go(1)
        self._follow()

    def wait(self, timeout: float | None = None) -> bool:
        """Wait until the picture is what the settings say.

        Returns:
            Whether that came within `timeout` seconds.
        """
        return self._renderer.wait(timeout)

    @property
    def picture(self) -> Image.Image:
        """The present picture, of the first seed. Raises ValueError where there is none."""
        return self._present().images[0]

    @property
    def grid(self) -> ImageGrid:
        """The present images: a row for each seed where base, now and difference are compared."""
        return _grid(self._present())

    def keep(self) -> StudioImages:
        """Put the present images into the gallery, with their settings."""
        self.gallery.append(self._present())
        self.widget.gallery.show(self.gallery)
        return self.gallery[-1]

    def drop(self, images: StudioImages) -> None:
        """Take images out of the gallery."""
        self.gallery = [one for one in self.gallery if one is not images]
        self.widget.gallery.show(self.gallery)

    def code(self, dialect: str = "lorabook") -> str:
        """Code that generates the present picture elsewhere.

        Args:
            dialect: "lorabook", "diffusers", or "a1111" for the prompt of A1111.
        """
        with lock_of(self.pipe):
            return as_code(self.settings, dialect, self.pipe)

    def load(self, source) -> LoadReport:
        """Load another adapter, from all that `load_adapter` takes; it is active from now on.

        Raises:
            ValueError: As `load_adapter`. Pipeline, settings and sliders are then as before.
        """
        self._renderer.close()  # which stops what runs; the next one begins with the new adapter
        self._renderer, before, report = self._new_renderer(), self.settings, None
        with lock_of(self.pipe):
            try:
                report = load_adapter(self.pipe, source)
                self._generator.ranks.forget(report.name)
                self.put(before.with_adapter(report.name))
                self.widget.adapter.choose(report.name)
            except BaseException:
                if report is not None:
                    remove_adapter(self.pipe, report.name)
                if self.settings != before:
                    self._history.drop()
                self._renderer.request(before)
                raise
        return report

    def save_adapter(self, path: str | os.PathLike) -> SaveReport:
        """Write the active adapters as one, scales baked in. Raises ValueError where none is."""
        self.wait(_PATIENCE)
        with lock_of(self.pipe):
            self._generator.apply(self.settings)
            return export.write_adapter(self.pipe, self.settings, path)

    def save_picture(self, path: str | os.PathLike) -> Path:
        """Write the present picture as a PNG, its settings inside; several as a grid."""
        images = self._present()
        several = len(images.images) > 1 or images.base is not None
        image = _grid(images).picture() if several else images.images[0]
        return export.write_picture(image, images.settings, path)

    @staticmethod
    def settings_in(png: str | os.PathLike) -> StudioSettings:
        """The settings in a picture of `save_picture`. Raises ValueError where there are none."""
        return export.read_settings(png)

    def close(self) -> None:
        """End the studio: widgets close, blends and smaller ranks go; scales stay as they are."""
        self._renderer.close()
        self._generator.close()
        self.widget.close_all()

    def static(self) -> Image.Image:
        """The images, and where the sliders stand, as one picture."""
        grid = _grid(self._images, enlarge=True).picture() if self._images else None
        with lock_of(self.pipe):
            touched = {name: touched_blocks(self.pipe, name) for name in self.settings.adapters}
        return export.static_picture(grid, self.settings, touched)

    def __repr__(self):
        return f"ScaleStudio: {self.settings.in_words()} · {self.settings.prompt!r}"

    def _repr_mimebundle_(self, include=None, exclude=None) -> tuple[dict, dict]:
        self.wait(_PATIENCE)
        encoded = io.BytesIO()
        self.static().quantize(256, dither=Image.Dither.NONE).save(encoded, "PNG", optimize=True)
        data, metadata = display.bundle(encoded.getvalue(), repr(self))
        model = {"version_major": 2, "version_minor": 0, "model_id": self.widget.model_id}
        widget = {"application/vnd.jupyter.widget-view+json": model}
        return data | widget | {"text/plain": repr(self)}, metadata

    def _present(self) -> StudioImages:
        """The images of the present settings, in full."""
        if not self.wait(_PATIENCE):
            if lock_of(self.pipe).is_mine():
                raise ValueError(
                    "the studio draws when the block or the call that has its pipeline is at its "
                    "end; ask for the picture after it"
                )
            raise TimeoutError(
                f"the picture is not there after {_PATIENCE} seconds; call studio.wait() first"
            )
        if self._error or self._images is None:
            raise ValueError(self._error or "the studio is closed, so there is no picture")
        return self._images

    def _follow(self) -> None:
        """Let the picture and the view follow the present settings."""
        self._error = None
        # first, since it stops what runs, and the view may wait for the pipeline
        self._renderer.request(self.settings)
        self.widget.show(self.settings, self._history.can_undo, self._history.can_redo)

    def _new_renderer(self) -> Renderer:
        lock = lambda: lock_of(self.pipe)  # noqa: E731
        return Renderer(self._generator.generate, self._show, self._fail, lock)

    def _show(self, images: StudioImages) -> None:
        self._images = images
        self.widget.show_images(images)

    def _fail(self, sentence: str) -> None:
        self._error = sentence
        self.widget.say(sentence, wrong=True)


def _grid(images: StudioImages, enlarge: bool = False) -> ImageGrid:
    """Images labelled; small ones enlarged pixel for pixel to the size they have on a screen."""
    rows = [list(row.values()) for row in images.rows]
    zoom = max(1, -(-SEVERAL // rows[0][0].width)) if enlarge else 1
    if zoom > 1:
        size = (rows[0][0].width * zoom, rows[0][0].height * zoom)
        rows = [[image.resize(size, Image.NEAREST) for image in row] for row in rows]
    seeds = [f"seed {seed}" for seed in images.settings.seeds]
    title = images.settings.prompt
    if images.base is None:
        return ImageGrid([[image for row in rows for image in row]], columns=seeds, title=title)
    return ImageGrid(rows, columns=list(images.rows[0]), rows=seeds, title=title)
