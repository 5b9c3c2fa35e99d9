"""One slider for each block that an adapter touches, where the block stands in the UNet."""

from collections.abc import Callable, Sequence

import ipywidgets as widgets

from lorabook.studio.controls import ScaleSlider, row, stack, words
from lorabook.studio.settings import AdapterSettings

_SHIFT = 12  # pixels from one row of the U to the next
_LONG = {
    "outside": "outside of the blocks",
    "text_encoder": "text encoder",
    "text_encoder_2": "text encoder 2",
}


class BlockSliders:
    """The sliders of one adapter, of DOM class `lorabook-scale`: down on the left, mid below, up on the right.

    Attributes:
        box: the widget.
        sliders: by block.
    """

    def __init__(
        self,
        name: str,
        touched: Sequence[str],
        blocks: Sequence[str],
        moved: Callable[[str, float], None],
    ):
        """Args: the adapter's name; its blocks; all of the UNet's; what takes a block and its new scale."""
        self.sliders = {block: self._slider(name, block, moved) for block in touched}
        beside = [self.sliders[block].box for block in touched if block in _LONG]
        drawn = [_unet(blocks, self.sliders)] if blocks else []
        self.box = stack(*drawn, *([row(*beside, kind="lorabook-beside")] if beside else []))

    def _slider(self, name: str, block: str, moved: Callable[[str, float], None]) -> ScaleSlider:
        label, kind = (
            _LONG.get(block, block),
            "beside-one" if block in _LONG else block.split(".")[0],
        )
        made = ScaleSlider(
            label,
            lambda value: moved(block, value),
            about=f"{name}: {label}",
            kind=f"lorabook-{kind}",
        )
        made.slider.add_class("lorabook-scale")
        made.slider.add_class(f"lorabook-block-{block.replace('.', '-')}")
        return made

    def show(self, settings: AdapterSettings) -> None:
        """Let the sliders stand as the settings say."""
        for block, slider in self.sliders.items():
            slider.show(settings.blocks.get(block, 1.0))


def _unet(blocks: Sequence[str], sliders: dict[str, ScaleSlider]) -> widgets.GridBox:
    """The U: rows of one resolution beside each other, and the middle at the bottom."""
    sides = {
        side: sorted(block for block in blocks if block.startswith(side)) for side in ("down", "up")
    }
    depth = max(map(len, sides.values()))
    cells = []
    for level in range(depth):
        down = sides["down"][level] if level < len(sides["down"]) else ""
        up = sides["up"][depth - 1 - level] if level < len(sides["up"]) else ""
        inward, outward = f"{level * _SHIFT}px", f"{(depth - 1 - level) * _SHIFT}px"
        cells += [
            _cell(down, sliders, f"0 {outward} 0 {inward}"),
            words(kind="lorabook-skip"),
            _cell(up, sliders, f"0 {inward} 0 {outward}"),
        ]
    middle = _cell("mid", sliders, "0")
    middle.add_class("lorabook-bottom")
    return widgets.GridBox(
        [*cells, middle],
        layout={
            "grid_template_columns": "minmax(0, 1fr) 30px minmax(0, 1fr)",
            "grid_gap": "5px 0",
            "width": "100%",
        },
    )


def _cell(block: str, sliders: dict[str, ScaleSlider], margin: str) -> widgets.Widget:
    """A block's slider, or a dotted frame where the adapter does not touch it."""
    if block in sliders:
        made = sliders[block].box
    else:
        made = words(f"{block} · untouched" if block else "", kind="lorabook-untouched")
    made.layout.margin = margin
    return made
