"""The shelf: adapter files that a click loads."""

import os
import re
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path

import ipywidgets as widgets
from PIL import Image, ImageColor, ImageDraw, ImageFont, ImageOps

from lorabook.live.layers import module_name
from lorabook.studio import controls as ui
from lorabook.studio.settings import StudioSettings

MOST_CARDS = 24
_PREVIEWS = [
    middle + end for middle in ("", ".preview") for end in (".png", ".jpg", ".jpeg", ".webp")
]
_PLAIN_NAMES = ("pytorch_lora_weights", "adapter_model")


class Shelf(widgets.VBox):
    """A card for each adapter file, and a line for anything else that can be loaded.

    Attributes:
        cards: The buttons, by name.
        other: The line that loads.
    """

    def __init__(self, files: Mapping[str, Path], load: Callable, choose: Callable):
        self._files, self._load, self._choose = files, load, choose
        self._loaded: Sequence[str] = ()
        self.cards: dict[str, widgets.Button] = {}
        boxes = []
        for name, file in list(files.items())[:MOST_CARDS]:
            about = f"load {name}, {file.stat().st_size / 1e6:.1f} MB"
            self.cards[name] = ui.button(name, about, partial(self._press, name))
            place = ui.picture(width="84px", height="84px")
            place.value = thumbnail(name, file)
            boxes.append(ui.stack(place, self.cards[name], kind="lorabook-card"))
        more = len(files) - MOST_CARDS
        words = f"{more} more; type a name below to load it" if more > 0 else ""
        about = "a file, a folder, a Hub id or an address"
        self.other = ui.line("other", self._type, f"{about}; Enter loads it", about)
        press = ui.button("load", "load what stands beside", lambda: self._type(self.other.value))
        wall, note = (
            ui.row(*boxes, kind="lorabook-wall"),
            words if files else "no adapter files here",
        )
        super().__init__([wall, ui.text(note), ui.row(self.other, press)])
        ui.classes(self, "lorabook-stack")

    def show(self, settings: StudioSettings) -> None:
        """Mark what is loaded."""
        self._loaded = tuple(settings.adapters)
        for name, card in self.cards.items():
            card.description = "✓ " * (module_name(name) in self._loaded) + name

    def _press(self, name: str) -> None:
        if module_name(name) in self._loaded:
            self._choose(module_name(name))
        else:
            self._load(self._files[name])

    def _type(self, source: str) -> None:
        source = source.strip()
        if source and self._load(self._files.get(source, source)):
            self.other.value = ""  # leaving the line for the button beside must not load twice


def adapter_files(folder: str | os.PathLike) -> dict[str, Path]:
    """The adapters in a folder and in the folders inside it, by name.

    Raises:
        FileNotFoundError: If there is no such folder.
    """
    folder = Path(folder).expanduser()
    if not folder.is_dir():
        raise FileNotFoundError(f"there is no folder {folder} to show adapters from")
    files = {}
    for path in [*folder.glob("*.safetensors"), *folder.glob("*/*.safetensors")]:
        files[path.parent.name if path.stem in _PLAIN_NAMES else path.stem] = path
    return dict(sorted(files.items(), key=lambda item: item[0].lower()))


def thumbnail(name: str, file: Path) -> bytes:
    """A small PNG for an adapter's file: the picture beside it, else a tile with its first letters.

    That picture has the file's name before its ending or before ".preview"; any "image_….png" of a
    folder with one adapter will do too.
    """
    beside = [file.with_name(file.stem + end) for end in _PREVIEWS]
    if len(list(file.parent.glob("*.safetensors"))) == 1:
        beside += sorted(file.parent.glob("image_*"))
    for path in beside:
        try:
            with Image.open(path) as image:
                return ui.png(ImageOps.fit(image.convert("RGB"), (128, 128)))
        except (OSError, ValueError, Image.DecompressionBombError):
            continue  # no picture, or a damaged one: no reason to hide the adapter
    words = re.findall(r"[^\W_]+", name) or ["?"]
    letters = "".join(word[0] for word in words[:3]) if len(words) > 1 else words[0][:2]
    hue = sum(map(ord, name)) * 37 % 360
    tile = Image.new("RGB", (128, 128), ImageColor.getrgb(f"hsl({hue}, 35%, 80%)"))
    font, middle = ImageFont.load_default(44), (64, 64)
    ImageDraw.Draw(tile).text(middle, letters.upper(), (60, 60, 66), font, anchor="mm")
    return ui.png(tile)
