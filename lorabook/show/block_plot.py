"""Numbers drawn where they belong on a UNet, and the singular values of what changes it."""

import math
import re
from collections.abc import Mapping, Sequence

from matplotlib import colormaps, rc_context
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize, to_rgb
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import MaxNLocator

from lorabook.show.plots import GREEN, STYLE, Plot, line_look

WIDTH = 10.5  # inches, as wide as a notebook's cell
SMALLEST = 1e-5  # of the largest singular value; what is below is not drawn
_GREY, _BLOCK = "#8a8a8a", re.compile(r"(?:(down|up)\.(\d+)|(mid))(?:\.(\w+))?")
_BESIDE, _WHOLE, _ALL = (
    2.5,
    2,
    18,
)  # widths of cells beside the UNet, of whole blocks, of the drawing; of parts 1
_SHORT = {"resnets": "res", "attentions": "attn"}
_MARGINS = {"left": 0.005, "right": 0.995, "top": 0.92, "bottom": 0.06}


def plot_blocks(
    values: Mapping[str, float],
    *,
    title: str = "",
    label: str = "",
    notes: Mapping[str, str] | None = None,
) -> Plot:
    """A number for each block as a heat map on the UNet's shape: down on the left, mid at the bottom, up on the right.

    Args:
        values: by block ("down.0" … "mid" … "up.3") or part of one ("down.0.attentions_1", "mid.resnets_0",
            "up.1.sampler"); all other names ("text_encoder", "outside") stand beside. Numbers below zero get a scale of
            colours with white in the middle.
        title: what stands above.
        label: what the numbers are, with their unit.
        notes: a few letters to stand under a block's name.
    Raises: ValueError if there are no values.
    """
    with rc_context(STYLE):
        figure = Figure(figsize=(WIDTH, blocks_height(values)))
        alt = draw_blocks(figure, values, title=title, label=label, notes=notes)
    return Plot(figure, alt)


def plot_spectra(spectra: Mapping[str, Sequence[float]], *, title: str = "") -> Plot:
    """Singular values, each spectrum divided by its largest, on a logarithmic axis.

    Args:
        spectra: falling singular values by label; the labels of blocks get colours of their own.
        title: what stands above.
    Raises: ValueError if there are no values, or none above zero.
    """
    with rc_context(STYLE):
        figure = Figure(figsize=(WIDTH, 3.2))
        alt = draw_spectra(figure, spectra, title=title)
    return Plot(figure, alt)


def blocks_height(values: Mapping[str, float]) -> float:
    """The inches that `draw_blocks` wants at `WIDTH`."""
    return 1.4 + 0.62 * max(_depth(values) + 1, math.ceil(len(_beside(values)) * 1.1))


def draw_blocks(
    figure,
    values: Mapping[str, float],
    *,
    title: str = "",
    label: str = "",
    notes: Mapping[str, str] | None = None,
) -> str:
    """What `plot_blocks` draws, on a figure or part of one; returns the content in words."""
    if not values:
        raise ValueError("there are no values to draw by block")
    axes, shade, notes = figure.subplots(gridspec_kw=_MARGINS), _shades(values), notes or {}
    columns = {side: _columns(values, side) for side in ("down", "mid", "up")}
    left = _BESIDE + 1.7 if _beside(values) else 1.4
    wide = {side: _WHOLE if parts == [""] else len(parts) for side, parts in columns.items()}
    mid = left + wide["down"] + 0.3
    starts = {"down": left, "mid": mid, "up": mid + wide["mid"] * 0.5 + 0.3}
    depth = _depth(values)
    for side, number in [(side, i) for i in range(depth) for side in ("down", "up")] + [
        ("mid", None)
    ] * bool(depth):
        block = side if number is None else f"{side}.{number}"
        row = depth if side == "mid" else number if side == "down" else depth - 1 - number
        _draw_block(axes, block, values, (starts[side], row, wide[side]), columns[side], shade)
        at_end = side == "up"
        x = starts[side] + wide[side] + 0.15 if at_end else starts[side] - 0.15
        name = f"{block}\n{notes[block]}" if block in notes else block
        axes.text(x, row + 0.5, name, ha="left" if at_end else "right", va="center", fontsize=9.5)
    for row, name in enumerate(_beside(values)):
        _cell(
            axes,
            0,
            row * 1.1,
            _BESIDE,
            name.replace("_", " ") + (f" · {notes[name]}" if name in notes else ""),
            values[name],
            shade,
        )
    right = starts["up"] + wide["up"] + 1.3 if depth else _BESIDE
    spare = max(_ALL - right, 0) / 2
    axes.set(
        xlim=(-spare, right + spare),
        ylim=(max(depth + 1, len(_beside(values)) * 1.1) + 0.05, -0.1),
        title=title,
    )
    axes.axis("off")
    bar = figure.colorbar(
        shade, ax=axes, orientation="horizontal", shrink=0.45, aspect=45, pad=0.03
    )
    bar.set_label(label, fontsize=10)
    bar.outline.set_visible(False)
    bar.ax.tick_params(labelsize=9)
    return _in_words(values, label)


def draw_spectra(figure, spectra: Mapping[str, Sequence[float]], *, title: str = "") -> str:
    """What `plot_spectra` draws, on a figure or part of one; returns the content in words."""
    shares = {
        label: [float(value) / float(values[0]) for value in values if value > SMALLEST * values[0]]
        for label, values in spectra.items()
        if len(values) and values[0] > 0
    }
    if not shares:
        raise ValueError("there are no singular values above zero to draw")
    axes = figure.subplots(gridspec_kw={"left": 0.08, "right": 0.85, "top": 0.88, "bottom": 0.18})
    longest = max(len(values) for values in shares.values())
    for number, (label, values) in enumerate(shares.items()):
        axes.semilogy(
            range(1, len(values) + 1),
            values,
            label=label.replace("_", " "),
            markersize=4,
            markevery=max(1, longest // 16),
            **_line(label, number, spectra),
        )
    axes.set(
        xlabel="singular value, by size",
        ylabel="share of the largest",
        title=title,
        xlim=(1, max(longest, 2)),
    )
    axes.set_ylim(0.8 * min(0.1, *(min(values) for values in shares.values())), 1.2)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.legend(frameon=False, fontsize=9, loc="center left", bbox_to_anchor=(1.01, 0.5))
    ends = ", ".join(f"{label} {values[-1]:.2g}" for label, values in shares.items())
    return f"Singular values as shares of the largest; the last one drawn: {ends}."


def _draw_block(axes, block: str, values, place: tuple, columns: list[str], shade) -> None:
    """The cells of one block in their columns, from `place` (x, y, width); an empty frame where it has none."""
    left, row, width = place
    mine = {
        (_BLOCK.fullmatch(key)[4] or ""): value
        for key, value in values.items()
        if _block(key) == block
    }
    for column, part in enumerate(columns):
        if part in mine:
            _cell(
                axes, left + column, row, 1 if part else width, _part_name(part), mine[part], shade
            )
    if not mine:
        axes.add_patch(
            Rectangle(
                (left + 0.03, row + 0.03),
                width - 0.06,
                0.94,
                fill=False,
                linestyle=":",
                edgecolor=_GREY,
            )
        )


def _cell(axes, x: float, y: float, width: float, name: str, value: float, shade) -> None:
    color = shade.to_rgba(value) if math.isfinite(value) else to_rgb("#d9d9d9")
    bright = sum(weight * part for weight, part in zip((0.299, 0.587, 0.114), color, strict=False))
    ink = "black" if bright > 0.5 else "white"
    axes.add_patch(
        Rectangle(
            (x + 0.03, y + 0.03),
            width - 0.06,
            0.94,
            facecolor=color,
            edgecolor=_GREY,
            linewidth=0.5,
        )
    )
    axes.text(
        x + width / 2,
        y + (0.68 if name else 0.5),
        _number(value),
        ha="center",
        va="center",
        color=ink,
        fontsize=9,
    )
    axes.text(x + width / 2, y + 0.28, name, ha="center", va="center", color=ink, fontsize=8)


def _shades(values: Mapping[str, float]) -> ScalarMappable:
    """Colours for the values: white to blue, or two ways from white where some are below zero."""
    finite = [value for value in values.values() if math.isfinite(value)] or [0.0]
    most = max(abs(value) for value in finite) or 1.0
    signed = min(finite) < 0
    return ScalarMappable(
        Normalize(-most if signed else 0, most), colormaps["PuOr" if signed else "Blues"]
    )


def _number(value: float) -> str:
    if not math.isfinite(value):
        return str(value)
    if 1 <= abs(value) < 1e5:
        return f"{value:.1f}" if abs(value) < 10 else f"{value:.0f}"
    return f"{value:.2g}"


def _part_name(part: str) -> str:
    what, _, number = part.partition("_")
    return f"{_SHORT.get(what, what)} {number}".strip()


def _block(key: str) -> str | None:
    """The block of the UNet that a key speaks of, or None."""
    found = _BLOCK.fullmatch(key)
    return None if found is None else found[3] or f"{found[1]}.{found[2]}"


def _beside(values: Mapping[str, float]) -> list[str]:
    return [key for key in values if _block(key) is None]


def _depth(values: Mapping[str, float]) -> int:
    """How many blocks lie under each other on either side."""
    found = [_BLOCK.fullmatch(key) for key in values]
    return max((int(match[2] or 0) + 1 for match in found if match), default=0)


def _columns(values: Mapping[str, float], side: str) -> list[str]:
    """The parts that the blocks of a side have, in the order in which an image passes them."""

    def order(part: str) -> tuple:
        what, _, number = part.partition("_")
        return (part == "sampler", int(number) if number.isdigit() else 0, what != "resnets", part)

    parts = {
        _BLOCK.fullmatch(key)[4] or ""
        for key in values
        if (_block(key) or "").split(".")[0] == side
    }
    return sorted(parts, key=order) or [""]


def _line(label: str, number: int, labels: Mapping) -> dict:
    """Colour and marker: blues going down, oranges going up, so that lightness tells the blocks of a side apart."""
    found = _BLOCK.fullmatch(label)
    if not any(_BLOCK.fullmatch(other) for other in labels):
        return line_look(number)
    if not found:
        return {
            "color": GREEN if label.startswith("text") else _GREY,
            "linestyle": "--",
            "marker": "vx"[label.endswith("2")],
        }
    if found[3]:
        return {"color": "black", "marker": "o"}
    level = int(found[2])
    shade = colormaps["Blues" if found[1] == "down" else "Oranges"](max(0.95 - 0.17 * level, 0.3))
    return {"color": shade, "marker": "os^D"[level % 4]}


def _in_words(values: Mapping[str, float], label: str) -> str:
    finite = {key: value for key, value in values.items() if math.isfinite(value)}
    if not finite:
        return f"{label or 'Values'} by block; none is finite."
    low, high = min(finite, key=finite.get), max(finite, key=finite.get)
    return (
        f"{label or 'Values'} by block, {len(values)} in all: from {_number(finite[low])} in {low} to "
        f"{_number(finite[high])} in {high}."
    )
