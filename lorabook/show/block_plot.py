"""Numbers drawn where they belong on a UNet, and singular values."""

import math
import re
from collections.abc import Iterable, Mapping, Sequence

from matplotlib import colormaps, rc_context
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize, to_rgb
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import MaxNLocator

from lorabook.show.plots import GREEN, STYLE, Plot, line_look

WIDTH = 10.5  # inches, as wide as a notebook's cell
_SMALLEST = 1e-5  # of the largest singular value; smaller ones are not drawn
_GREY = "#8a8a8a"
_KEY = re.compile(r"(?P<block>(?:down|up)\.\d+|mid)(?:\.(?P<part>\w+))?")
# Widths of cells: beside the UNet, of a whole block, of the drawing. A part of a block has 1.
_BESIDE, _WHOLE, _ALL = 2.5, 2, 18
Place = tuple[float, float, float]  # x, y and width of a cell


def plot_blocks(
    values: Mapping[str, float],
    *,
    title: str = "",
    label: str = "",
    notes: Mapping[str, str] | None = None,
) -> Plot:
    """A number for each block as a heat map on the UNet's shape: down left, mid below, up right.

    Args:
        values: By block ("down.0" … "mid" … "up.3") or part of one ("down.0.attentions_1",
            "mid.resnets_0", "up.1.sampler"); other names ("text_encoder") stand beside. Where a
            number is below zero, white is the middle of the colours.
        title: What stands above.
        label: What the numbers are, with their unit.
        notes: A few letters to stand under a block's name.
    Raises: ValueError if there are no values.
    """
    with rc_context(STYLE):
        figure = Figure(figsize=(WIDTH, blocks_height(values)))
        alt = draw_blocks(figure, values, title=title, label=label, notes=notes)
    return Plot(figure, alt)


def plot_spectra(spectra: Mapping[str, Sequence[float]], *, title: str = "") -> Plot:
    """Singular values, each spectrum divided by its largest, on a logarithmic axis.

    Args:
        spectra: Falling singular values by label; names of blocks get their own colours.
        title: What stands above.
    Raises: ValueError if there are no values, or none above zero.
    """
    with rc_context(STYLE):
        figure = Figure(figsize=(WIDTH, 3.2))
        alt = draw_spectra(figure, spectra, title=title)
    return Plot(figure, alt)


def plot_adapter(
    norms: Mapping[str, float],
    shares: Mapping[str, float],
    spectra: Mapping[str, Sequence[float]],
) -> Plot:
    """‖ΔW‖ by part of a block, and spectra by block, if any; `shares` are of all ‖ΔW‖²."""
    heights = [blocks_height(norms)] + [3.4] * bool(spectra)
    with rc_context(STYLE):
        figure = Figure(figsize=(WIDTH, sum(heights)))
        parts = figure.subfigures(len(heights), 1, height_ratios=heights, squeeze=False)[:, 0]
        alt = draw_blocks(
            parts[0],
            norms,
            title="Where the adapter changes the model",
            notes={block: f"{share:.1%}" for block, share in shares.items()},
            label="‖ΔW‖ (beside each block its share of all ‖ΔW‖²)",
        )
        if spectra:
            title = "Singular values of ΔW, mean by block"
            alt += " " + draw_spectra(parts[1], spectra, title=title)
    return Plot(figure, alt)


def blocks_height(values: Mapping[str, float]) -> float:
    """The inches that `draw_blocks` wants at `WIDTH`."""
    blocks, beside = _by_block(values)
    return 1.4 + 0.62 * max(_depth(blocks) + 1, math.ceil(len(beside) * 1.1))


def draw_blocks(
    figure: Figure,
    values: Mapping[str, float],
    *,
    title: str = "",
    label: str = "",
    notes: Mapping[str, str] | None = None,
) -> str:
    """What `plot_blocks` draws, on a figure or part of one; returns the content in words."""
    if not values:
        raise ValueError("there are no values to draw by block")
    blocks, beside = _by_block(values)
    notes, colors, depth = notes or {}, _colors(values), _depth(blocks)
    parts = {side: _parts(blocks, side) for side in ("down", "mid", "up")}
    width = {side: _WHOLE if names == [""] else len(names) for side, names in parts.items()}
    left = {"down": _BESIDE + 1.7 if beside else 1.4}
    left["mid"] = left["down"] + width["down"] + 0.3
    left["up"] = left["mid"] + width["mid"] * 0.5 + 0.3
    rows = {f"down.{level}": level for level in range(depth)}
    rows |= {f"up.{level}": depth - 1 - level for level in range(depth)}
    rows |= {"mid": depth} if depth else {}

    axes = figure.subplots(gridspec_kw={"left": 0.005, "right": 0.995, "top": 0.92, "bottom": 0.06})
    for block, row in rows.items():
        side = block.partition(".")[0]
        for column, part in enumerate(parts[side]):
            if part in blocks.get(block, {}):
                place = left[side] + column, row, 1 if part else width[side]
                name = part.replace("resnets", "res").replace("attentions", "attn")
                _draw_cell(axes, place, name, blocks[block][part], colors)
        if block not in blocks:
            axes.add_patch(_box((left[side], row, width[side]), fill=False, linestyle=":"))
        name = f"{block}\n{notes[block]}" if block in notes else block
        x, aligned = left[side] - 0.15, "right"
        if side == "up":
            x, aligned = left[side] + width[side] + 0.15, "left"
        axes.text(x, row + 0.5, name, ha=aligned, va="center", fontsize=9.5)
    for row, (name, value) in enumerate(beside.items()):
        words = f"{name} · {notes[name]}" if name in notes else name
        _draw_cell(axes, (0, row * 1.1, _BESIDE), words, value, colors)

    right = left["up"] + width["up"] + 1.3 if depth else _BESIDE
    margin = max(_ALL - right, 0) / 2
    bottom = max(depth + 1, len(beside) * 1.1) + 0.05
    axes.set(xlim=(-margin, right + margin), ylim=(bottom, -0.1), title=title)
    axes.axis("off")
    look = {"orientation": "horizontal", "shrink": 0.45, "aspect": 45, "pad": 0.03}
    bar = figure.colorbar(colors, ax=axes, **look)
    bar.set_label(label, fontsize=10)
    bar.outline.set_visible(False)
    bar.ax.tick_params(labelsize=9)
    return _in_words(values, label or "Values")


def draw_spectra(figure: Figure, spectra: Mapping[str, Sequence[float]], *, title: str = "") -> str:
    """What `plot_spectra` draws, on a figure or part of one; returns the content in words."""
    shares = {
        label: [float(v) / float(values[0]) for v in values if v > _SMALLEST * values[0]]
        for label, values in spectra.items()
        if len(values) and values[0] > 0
    }
    if not shares:
        raise ValueError("there are no singular values above zero to draw")
    axes = figure.subplots(gridspec_kw={"left": 0.08, "right": 0.85, "top": 0.88, "bottom": 0.18})
    longest = max(len(values) for values in shares.values())
    has_blocks = any(_KEY.fullmatch(label) for label in spectra)
    for number, (label, values) in enumerate(shares.items()):
        look = _block_look(label) if has_blocks else line_look(number)
        look |= {"markersize": 4, "markevery": max(1, longest // 16)}
        axes.semilogy(range(1, len(values) + 1), values, label=label.replace("_", " "), **look)
    axes.set(xlabel="singular value, by size", ylabel="share of the largest", title=title)
    axes.set_xlim(1, max(longest, 2))
    axes.set_ylim(0.8 * min(0.1, *(values[-1] for values in shares.values())), 1.2)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.legend(fontsize=9, loc="center left", bbox_to_anchor=(1.01, 0.5))
    ends = ", ".join(f"{label} {values[-1]:.2g}" for label, values in shares.items())
    return f"Singular values as shares of the largest; the last one drawn: {ends}."


def _by_block(values: Mapping[str, float]) -> tuple[dict[str, dict[str, float]], dict[str, float]]:
    """The values by block and part, "" for all of it; and those that stand beside the UNet."""
    blocks, beside = {}, {}
    for key, value in values.items():
        if match := _KEY.fullmatch(key):
            blocks.setdefault(match["block"], {})[match["part"] or ""] = value
        else:
            beside[key] = value
    return blocks, beside


def _depth(blocks: Iterable[str]) -> int:
    """How many blocks lie under each other on either side."""
    return max((int(block.partition(".")[2] or 0) + 1 for block in blocks), default=0)


def _parts(blocks: Mapping[str, Mapping[str, float]], side: str) -> list[str]:
    """The parts that the blocks of a side have, in the order in which an image passes them."""

    def order(part: str) -> tuple:
        kind, _, number = part.partition("_")
        return part == "sampler", int(number) if number.isdigit() else 0, kind != "resnets", part

    names = {part for block in blocks if block.startswith(side) for part in blocks[block]}
    return sorted(names, key=order) or [""]


def _box(place: Place, **look) -> Rectangle:
    x, y, width = place
    return Rectangle((x + 0.03, y + 0.03), width - 0.06, 0.94, edgecolor=_GREY, **look)


def _draw_cell(axes: Axes, place: Place, name: str, value: float, colors: ScalarMappable) -> None:
    """A coloured box with its number, and its name below."""
    x, y, width = place
    color = colors.to_rgba(value) if math.isfinite(value) else to_rgb("#d9d9d9")
    brightness = 0.299 * color[0] + 0.587 * color[1] + 0.114 * color[2]
    look = {"ha": "center", "va": "center", "color": "black" if brightness > 0.5 else "white"}
    axes.add_patch(_box(place, facecolor=color, linewidth=0.5))
    axes.text(x + width / 2, y + (0.68 if name else 0.5), _number(value), fontsize=9, **look)
    axes.text(x + width / 2, y + 0.28, name.replace("_", " "), fontsize=8, **look)


def _colors(values: Mapping[str, float]) -> ScalarMappable:
    """Colours for the values: white to blue, or two ways from white where some are below zero."""
    finite = [value for value in values.values() if math.isfinite(value)] or [0.0]
    most = max(map(abs, finite)) or 1.0
    if min(finite) < 0:
        return ScalarMappable(Normalize(-most, most), colormaps["PuOr"])
    return ScalarMappable(Normalize(0, most), colormaps["Blues"])


def _block_look(label: str) -> dict:
    """Blues going down, oranges going up: lightness tells the blocks of a side apart."""
    match = _KEY.fullmatch(label)
    if match is None:
        color = GREEN if label.startswith("text") else _GREY
        return {"color": color, "linestyle": "--", "marker": "x" if label.endswith("2") else "v"}
    side, _, level = match["block"].partition(".")
    if side == "mid":
        return {"color": "black", "marker": "o"}
    colormap = colormaps["Blues" if side == "down" else "Oranges"]
    return {"color": colormap(max(0.95 - 0.17 * int(level), 0.3)), "marker": "os^D"[int(level) % 4]}


def _number(value: float) -> str:
    if 1 <= abs(value) < 1e5:
        return f"{value:.1f}" if abs(value) < 10 else f"{value:.0f}"
    return f"{value:.2g}"


def _in_words(values: Mapping[str, float], label: str) -> str:
    finite = {key: value for key, value in values.items() if math.isfinite(value)}
    if not finite:
        return f"{label} by block; none is finite."
    ends = [min(finite, key=finite.get), max(finite, key=finite.get)]
    low, high = (f"{_number(finite[block])} in {block}" for block in ends)
    return f"{label} by block, {len(values)} in all: from {low} to {high}."
