"""What the studio writes: adapters as they stand, and pictures with their settings inside."""

import json
import os
from pathlib import Path

from PIL import Image
from PIL.PngImagePlugin import PngInfo

from lorabook.live.inject import adapter_of
from lorabook.live.layers import active_adapters
from lorabook.live.match import base_weights
from lorabook.live.save import SaveReport, baked, save_adapter
from lorabook.live.scales import scales_of
from lorabook.lora.merge import merge
from lorabook.studio.settings import StudioSettings

KEY = "lorabook"  # in a PNG's metadata


def write_adapter(pipe, path: str | os.PathLike) -> SaveReport:
    """Write what takes part on a pipeline as one adapter, scales baked in; of several their exact sum.

    Raises: ValueError where none takes part, or as `save_adapter`.
    """
    names = active_adapters(pipe)
    if not names:
        raise ValueError("no adapter takes part, so there is nothing to save; switch one on")
    if len(names) == 1:
        return save_adapter(pipe, path, name=names[0], bake_scales=True)
    table, found, bases = scales_of(pipe), {}, {}
    for name in names:
        adapter = adapter_of(pipe, name)
        own = base_weights(pipe, adapter)
        found[name] = baked(adapter, table[name], own)
        for part, weights in own.items():
            bases.setdefault(part, {}).update(weights)
    return save_adapter(merge(found, dict.fromkeys(names, 1.0), method="cat", bases=bases), path)


def write_picture(image: Image.Image, settings: StudioSettings, path: str | os.PathLike) -> Path:
    """Write a PNG with the settings in its metadata; returns its path."""
    path, about = Path(path), PngInfo()
    about.add_itxt(KEY, json.dumps({"studio": settings.to_dict()}))
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path, "PNG", pnginfo=about)
    return path


def read_settings(png: str | os.PathLike) -> StudioSettings:
    """The settings in a picture that `write_picture` wrote.

    Raises: FileNotFoundError if there is no such file; ValueError where it has no settings.
    """
    if not Path(png).is_file():
        raise FileNotFoundError(f"there is no picture {png}")
    try:
        with Image.open(png) as picture:
            return StudioSettings.from_dict(json.loads(picture.info[KEY])["studio"])
    except (KeyError, TypeError, OSError, ValueError) as error:
        raise ValueError(
            f"{png} holds no settings of a studio ({type(error).__name__}); ScaleStudio.save_picture writes "
            "such files"
        ) from None
