"""What leaves the studio: an adapter, an image with its settings inside, a static picture."""

import io
import json
import os
import textwrap
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

import ipywidgets as widgets
from diffusers import DiffusionPipeline
from PIL import Image, ImageChops
from PIL.PngImagePlugin import PngInfo

from lorabook.live.blend import blend
from lorabook.live.layers import active_adapters, models_of
from lorabook.live.manage import remove_adapter
from lorabook.live.save import SaveReport, save_adapter
from lorabook.live.state import preserve_scales
from lorabook.show.block_plot import plot_blocks
from lorabook.studio import controls as ui
from lorabook.studio.code import DIALECTS
from lorabook.studio.settings import StudioSettings

KEY = "lorabook"  # of the settings in a PNG's metadata
_SUM = "studio_sum"  # the adapter that several are saved as


class ExportPanel(widgets.VBox):
    """The settings as code, and names to save the adapter and the image by.

    Attributes:
        dialect, code: The menu and the text.
    """

    def __init__(self, code: Callable, save_adapter: Callable, save_picture: Callable):
        self._code = code
        dialects = [(name.replace("a1111", "A1111 prompt"), name) for name in DIALECTS]
        self.dialect = ui.menu("as", dialects, lambda _: self.refresh(), "whose code")
        copy = ui.button("copy", "copy the code", lambda: None, "lorabook-copy")  # see studio.js
        self.code = widgets.Textarea(
            description="code", rows=11, layout={"width": "auto"}, style={"description_width": "0"}
        )
        ui.classes(self.code, "lorabook-code")
        rows = []
        for label, start, about, act in (
            ("adapter", "studio-adapter", "folder or .safetensors file to write", save_adapter),
            ("picture", "studio.png", "PNG file to write", save_picture),
        ):
            path = ui.line(label, lambda _: None, about)
            path.value = start
            press = partial(lambda act, path: act(path.value), act, path)
            rows.append(ui.row(path, ui.button(f"save {label}", f"write the {label}", press)))
        note = "Scales are baked into the adapter; the settings are kept inside the picture."
        super().__init__([ui.row(self.dialect, copy), self.code, ui.text(note), *rows])
        ui.classes(self, "lorabook-take")

    def refresh(self) -> None:
        """Let the code say what the settings are now."""
        self.code.value = self._code(self.dialect.value)


def write_adapter(
    pipe: DiffusionPipeline, settings: StudioSettings, path: str | os.PathLike
) -> SaveReport:
    """Write what is active on a pipeline as one adapter, scales baked in; of several their sum.

    Raises:
        ValueError: Where none is active, or as `save_adapter`.
    """
    names = active_adapters(pipe)
    if not names:
        raise ValueError("no adapter takes part, so there is nothing to save; switch one on")
    if len(names) == 1:
        return save_adapter(pipe, path, name=names[0], bake_scales=True)
    components = models_of(pipe)
    scales = {name: settings.adapters[name].scales(components) for name in names}
    with preserve_scales(pipe):
        blend(pipe, scales, new_name=_SUM, across_bases=True)
        try:
            return save_adapter(pipe, path, name=_SUM)
        finally:
            remove_adapter(pipe, _SUM)


def write_picture(image: Image.Image, settings: StudioSettings, path: str | os.PathLike) -> Path:
    """Write a PNG with the settings in its metadata; returns its path."""
    path, metadata = Path(path), PngInfo()
    metadata.add_itxt(KEY, json.dumps({"studio": settings.to_dict()}))
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path, "PNG", pnginfo=metadata)
    return path


def read_settings(png: str | os.PathLike) -> StudioSettings:
    """The settings in a picture that `write_picture` wrote.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: Where it has no settings.
    """
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


def static_picture(
    grid: Image.Image | None, settings: StudioSettings, touched: Mapping[str, list[str]]
) -> Image.Image:
    """The images on the left, a map of block scales for each active adapter on the right.

    Args:
        grid: The images as one, or None where there is none.
        settings: What they show.
        touched: The blocks that have a slider, by adapter.
    """
    images, gap = [grid] if grid else [], 20
    active = [name for name, adapter in settings.adapters.items() if adapter.on and touched[name]]
    for name in active[:3]:
        adapter = settings.adapters[name]
        values = {b: adapter.scale * adapter.blocks.get(b, 1.0) for b in touched[name]}
        words = [f"{name}: scale by block", *(f"{p} × {s:g}" for p, s in adapter.parts.items())]
        words += [f"rank {adapter.rank}"] * bool(adapter.rank)
        title = textwrap.shorten(" · ".join(words), 78, placeholder=" …")
        with Image.open(io.BytesIO(plot_blocks(values, title=title)._repr_png_())) as image:
            image = image.convert("RGB")
        images.append(image.crop(ImageChops.invert(image).getbbox()))
    images = images or [Image.new("RGB", (320, 32), "white")]
    width = sum(image.width + gap for image in images) + gap
    height, left = max(image.height for image in images) + 2 * gap, gap
    sheet = Image.new("RGB", (width, height), "white")
    for image in images:
        sheet.paste(image, (left, (height - image.height) // 2))
        left += image.width + gap
    return sheet
