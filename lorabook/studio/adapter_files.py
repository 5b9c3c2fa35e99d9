"""The adapter files of a folder, and a small picture for each."""

import colorsys
import os
import re
import zlib
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont, ImageOps

from lorabook.studio.controls import png

SIDE = 128  # pixels of a preview
_PICTURES = (".png", ".jpg", ".jpeg", ".webp")
_PLAIN_NAMES = ("pytorch_lora_weights", "adapter_model")


@dataclass(frozen=True)
class ShelfFile:
    """An adapter that can be loaded.

    Attributes:
        name: what it is called on the shelf.
        path: what `load_adapter` reads.
        preview: a picture beside it, or None.
        megabytes: of its weights.
    """

    name: str
    path: Path
    preview: Path | None
    megabytes: float


def adapter_files(folder: str | os.PathLike) -> list[ShelfFile]:
    """The adapters in a folder and in the folders inside it, by name.

    A file's picture has the file's name before its ending or before ".preview"; any "image_….png" of a folder with one
    adapter will do too.

    Raises: FileNotFoundError if there is no such folder.
    """
    folder = Path(folder).expanduser()
    if not folder.is_dir():
        raise FileNotFoundError(f"there is no folder {folder} to show adapters from")
    found = [*folder.glob("*.safetensors"), *folder.glob("*/*.safetensors")]
    return sorted((_on_shelf(path) for path in found), key=lambda file: file.name.lower())


def thumbnail(file: ShelfFile) -> bytes:
    """A file's picture as a small PNG; where there is none to read, a tile with its first letters."""
    if file.preview is not None:
        try:
            with Image.open(file.preview) as picture:
                return png(ImageOps.fit(picture.convert("RGB"), (SIDE, SIDE)))
        except (
            OSError,
            ValueError,
            Image.DecompressionBombError,
        ):  # a damaged picture is no reason to hide the adapter
            pass
    return png(_tile(file.name))


def _on_shelf(path: Path) -> ShelfFile:
    name = path.parent.name if path.stem in _PLAIN_NAMES else path.stem
    return ShelfFile(name, path, _preview(path), path.stat().st_size / 1e6)


def _preview(path: Path) -> Path | None:
    beside = [
        path.with_name(f"{path.stem}{middle}{end}")
        for middle in ("", ".preview")
        for end in _PICTURES
    ]
    if len(list(path.parent.glob("*.safetensors"))) == 1:
        beside += sorted(
            one for one in path.parent.glob("image_*") if one.suffix.lower() in _PICTURES
        )
    return next((one for one in beside if one.is_file()), None)


def _tile(name: str) -> Image.Image:
    """Stripes of two shades, by the name's checksum, and its first letters."""
    number = zlib.crc32(name.encode())
    light, dark = (
        tuple(round(255 * part) for part in colorsys.hls_to_rgb(number % 360 / 360, shade, 0.35))
        for shade in (0.82, 0.76)
    )
    tile = Image.new("RGB", (SIDE, SIDE), light)
    draw = ImageDraw.Draw(tile)
    for start in range(-SIDE, SIDE, 32):
        draw.polygon(
            [(start, SIDE), (start + 16, SIDE), (start + 16 + SIDE, 0), (start + SIDE, 0)], dark
        )
    draw.text(
        (SIDE / 2, SIDE / 2), _initials(name), (60, 60, 66), ImageFont.load_default(44), anchor="mm"
    )
    return tile


def _initials(name: str) -> str:
    parts = re.findall(r"[^\W_]+", name) or ["?"]
    return ("".join(part[0] for part in parts[:3]) if len(parts) > 1 else parts[0][:2]).upper()
