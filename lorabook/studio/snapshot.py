"""The studio as one picture, for places that cannot show widgets: what is drawn, and where the sliders stand."""

import io
import textwrap
from collections.abc import Sequence

from matplotlib import rc_context
from matplotlib.figure import Figure
from PIL import Image, ImageChops

from lorabook.show.block_plot import blocks_height, draw_blocks
from lorabook.show.plots import STYLE
from lorabook.studio.settings import AdapterSettings, StudioSettings

_WIDTH, _DPI, _GAP, _MOST = 7.0, 90, 20, 3  # inches and dots of a map, pixels between, maps at most


def static_picture(
    grid: Image.Image | None, settings: StudioSettings, touched: dict[str, list[str]]
) -> Image.Image:
    """The pictures on the left, a map of block scales for each adapter that takes part on the right.

    Args:
        grid: the pictures as one, or None where there is none.
        settings: what they show.
        touched: the blocks that have a slider, by adapter.
    """
    taking = {
        name: mine for name, mine in settings.adapters.items() if mine.on and touched.get(name)
    }
    maps = [_map(name, mine, touched[name]) for name, mine in list(taking.items())[:_MOST]]
    return _beside(
        [*([grid] if grid is not None else []), *maps] or [Image.new("RGB", (320, 32), "white")]
    )


def scale_map(mine: AdapterSettings, touched: list[str]) -> dict[str, float]:
    """The scale of each block, the adapter's own multiplied in."""
    return {block: mine.scale * mine.blocks.get(block, 1.0) for block in touched}


def _map(name: str, mine: AdapterSettings, touched: list[str]) -> Image.Image:
    values = scale_map(mine, touched)
    more = [f"{part} × {scale:g}" for part, scale in mine.parts.items()] + [f"rank {mine.rank}"] * (
        mine.rank is not None
    )
    title = textwrap.shorten(" · ".join([f"{name}: scale by block", *more]), 78, placeholder=" …")
    with rc_context(STYLE):
        figure = Figure(figsize=(_WIDTH, blocks_height(values)))
        draw_blocks(figure, values, title=title)
        encoded = io.BytesIO()
        figure.savefig(encoded, format="png", dpi=_DPI, bbox_inches="tight")
    with Image.open(encoded) as drawn:
        return _trimmed(drawn.convert("RGB"))


def _trimmed(image: Image.Image) -> Image.Image:
    """Without the white around it."""
    inside = ImageChops.invert(image).getbbox()
    return image.crop(inside) if inside else image


def _beside(images: Sequence[Image.Image]) -> Image.Image:
    """Images beside each other, on one middle line."""
    sheet = Image.new(
        "RGB",
        (
            sum(image.width for image in images) + _GAP * (len(images) + 1),
            max(image.height for image in images) + 2 * _GAP,
        ),
        "white",
    )
    x = _GAP
    for image in images:
        sheet.paste(image, (x, (sheet.height - image.height) // 2))
        x += image.width + _GAP
    return sheet
