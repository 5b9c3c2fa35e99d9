"""The sliders: a pipeline's adapters in a person's hands, and the picture that follows."""

import io
import json
import os
from pathlib import Path

from diffusers import DiffusionPipeline
from PIL import Image, ImageChops

from lorabook.live.blend import blend
from lorabook.live.load import LoadReport, load_adapter
from lorabook.live.manage import remove_adapter
from lorabook.live.save import SaveReport, save_adapter
from lorabook.live.state import check_known, lock_of, preserve_scales
from lorabook.pipelines import world_of
from lorabook.show.block_plot import plot_blocks
from lorabook.show.display import KEY, bundle, png_of, write
from lorabook.show.grid import ImageGrid
from lorabook.studio.adapters import touched_blocks
from lorabook.studio.code import as_code
from lorabook.studio.generate import StudioGenerator, StudioImages, first_settings, side_of
from lorabook.studio.settings import History, StudioSettings
from lorabook.studio.shelf import adapter_files
from lorabook.studio.view import View
from lorabook.studio.worker import Renderer
from lorabook.sweeps.cells import Present
from lorabook.worlds import BUNDLED, DATA

_PATIENCE = 120  # seconds to wait for an image that is asked for
_SUM = "studio_sum"  # the adapter that several are saved as


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
            self.widget = View(self, files, side_of(pipe))
            self._renderer = Renderer(
                self._generator.generate, self._show, self._fail, lambda: lock_of(pipe)
            )
            self._follow()

    @property
    def settings(self) -> StudioSettings:
        """All that decides the picture; set it, and the sliders and the picture follow.

        Raises:
            ValueError: For adapters that are not loaded.
        """
        return self._history.present

    @settings.setter
    def settings(self, settings: StudioSettings) -> None:
        if not isinstance(settings, StudioSettings):
            raise ValueError(
                f"settings must be StudioSettings, not {settings!r:.80}; change them as "
                "studio.settings.with_(prompt=...)"
            )
        if new := settings.adapters.keys() - self.settings.adapters.keys():
            with lock_of(self.pipe):
                check_known(self.pipe, new)
        self._history.push(settings)
        self._follow()

    def undo(self) -> None:
        """Go back to the settings before."""
        self._history.undo()
        self._follow()

    def redo(self) -> None:
        """Go forth to what was undone."""
        self._history.redo()
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
        return self._present().grid

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
            dialect: "lorabook" or "diffusers".
        """
        with lock_of(self.pipe):
            return as_code(self.settings, dialect, self.pipe)

    def load(self, source) -> LoadReport:
        """Load another adapter, from all that `load_adapter` takes; it is active from now on.

        Raises:
            ValueError: As `load_adapter`. Pipeline, settings and sliders are then as before.
        """
        with lock_of(self.pipe):
            report = load_adapter(self.pipe, source)
            self.settings = self.settings.with_adapter(report.name)
            self.widget.adapter.choose(report.name)
        return report

    def save_adapter(self, path: str | os.PathLike) -> SaveReport:
        """Write the active adapters as one, scales baked in. Raises ValueError where none is."""
        self.wait(_PATIENCE)
        with lock_of(self.pipe):
            self._generator.apply(self.settings)
            present = Present.of(self.pipe)
            if not present.active:
                raise ValueError(
                    "no adapter takes part, so there is nothing to save; switch one on"
                )
            if len(present.active) == 1:
                return save_adapter(self.pipe, path, name=present.active[0], bake_scales=True)
            scales = {name: present.scales_of(name) for name in present.active}
            with preserve_scales(self.pipe):
                blend(self.pipe, scales, new_name=_SUM, across_bases=True)
                try:
                    return save_adapter(self.pipe, path, name=_SUM)
                finally:
                    remove_adapter(self.pipe, _SUM)

    def save_picture(self, path: str | os.PathLike) -> Path:
        """Write the present picture as a PNG, its settings inside; several as a grid."""
        images = self._present()
        several = len(images.images) > 1 or images.base is not None
        image = images.grid.picture() if several else images.picture
        return write(path, png_of(image, {"studio": images.settings.to_dict()}))

    @staticmethod
    def settings_in(png: str | os.PathLike) -> StudioSettings:
        """The settings in a picture of `save_picture`. Raises ValueError where there are none."""
        if not Path(png).is_file():
            raise FileNotFoundError(f"there is no picture {png}")
        try:
            with Image.open(png) as picture:
                return StudioSettings.from_dict(json.loads(picture.info[KEY])["studio"])
        except (KeyError, TypeError, OSError, ValueError) as error:
            raise ValueError(
                f"{png} holds no settings of a studio ({type(error).__name__}); "
                "ScaleStudio.save_picture writes such files"
            ) from None

    def close(self) -> None:
        """End the studio: widgets close, scales stay as they are."""
        self._renderer.close()
        self.widget.close_all()

    def static(self) -> Image.Image:
        """The images, and on their right a map of the blocks of each active adapter."""
        parts, gap = [self._images.grid.picture(smallest=256)] if self._images else [], 20
        active = [name for name, adapter in self.settings.adapters.items() if adapter.on]
        for name in active[:3]:
            adapter = self.settings.adapters[name]
            with lock_of(self.pipe):
                touched = touched_blocks(self.pipe, name)
            if values := {b: adapter.scale * adapter.blocks.get(b, 1.0) for b in touched}:
                plot = plot_blocks(values, title=f"{name:.60}: scale by block")
                with Image.open(io.BytesIO(plot._repr_png_())) as drawn:
                    part = drawn.convert("RGB")
                parts.append(part.crop(ImageChops.invert(part).getbbox()))
        parts = parts or [Image.new("RGB", (320, 32), "white")]
        width = sum(part.width + gap for part in parts) + gap
        height, left = max(part.height for part in parts) + 2 * gap, gap
        sheet = Image.new("RGB", (width, height), "white")
        for part in parts:
            sheet.paste(part, (left, (height - part.height) // 2))
            left += part.width + gap
        return sheet

    def __repr__(self):
        return f"ScaleStudio: {self.settings.in_words()} · {self.settings.prompt!r}"

    def _repr_mimebundle_(self, include=None, exclude=None) -> tuple[dict, dict]:
        self.wait(_PATIENCE)
        static = self.static().quantize(256, dither=Image.Dither.NONE)
        data, metadata = bundle(png_of(static, optimize=True), repr(self))
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
        self.widget.show(self._history)

    def _show(self, images: StudioImages) -> None:
        self._images = images
        self.widget.show_images(images)

    def _fail(self, sentence: str) -> None:
        self._error = sentence
        self.widget.say(sentence, wrong=True)
