"""Comparisons in pictures and numbers: the methods of blending, and the blocks of an adapter, side by side."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from lorabook.blocks import block_map
from lorabook.live.blend import BlendReport, blend
from lorabook.live.inject import adapter_of
from lorabook.live.layers import adapter_names, layers_of
from lorabook.live.manage import remove_adapter
from lorabook.live.state import check_known, locked, preserve_scales
from lorabook.lora.layer_stats import layer_table, norm_of
from lorabook.lora.merge import METHODS
from lorabook.metrics import image_similarity
from lorabook.pipelines import world_of
from lorabook.show.block_plot import plot_blocks
from lorabook.show.grid import ImageGrid
from lorabook.show.plots import Plot
from lorabook.show.tables import as_html, as_text
from lorabook.sweeps.sweep import sweep

_HEADS = ("method", "rank", "relative error against the sum of ΔW")
_EFFECTS = (
    "block",
    "‖ΔW‖",
    "share of the spectrum",
    "change in the picture",
    "change to CLIP's eye",
)


@dataclass(frozen=True, repr=False)
class BlendComparison:
    """The same adapters and weights blended by several methods; shows itself as a table and a picture.

    Attributes:
        reports: by method.
        grid: a row for each prompt, a column for each method.
    """

    reports: Mapping[str, BlendReport]
    grid: ImageGrid

    def _rows(self) -> list[tuple[str, str, str]]:
        return [
            (method, str(report.rank), f"{report.error['total']:.2g}")
            for method, report in self.reports.items()
        ]

    def __str__(self):
        return as_text(_HEADS, self._rows())

    __repr__ = __str__

    def _repr_html_(self):
        return as_html(_HEADS, self._rows())

    def _ipython_display_(self):
        from IPython.display import HTML, display

        display(HTML(self._repr_html_()), self.grid)


@locked
def compare_blends(
    pipe,
    weights: Mapping[str, object],
    prompt: str | Sequence[str],
    *,
    methods: Sequence[str] = METHODS,
    density: float | None = None,
    rank: int | None = None,
    seed: int = 0,
    num_inference_steps: int | None = None,
    guidance_scale: float | None = None,
    **call,
) -> BlendComparison:
    """Blend the same adapters by each method and draw the same prompts with it, and with nothing else.

    Other adapters are switched off while it draws; the pipeline's adapters, scales and states are as before afterwards,
    after an error or an interrupt too.

    Args:
        pipe, weights, density, rank: as in `blend`.
        prompt: one, or several for a row each; read as in `sweep`.
        methods: which ones.
        seed: of the pictures, and of the dare methods.
        num_inference_steps, guidance_scale: None takes what suits the model.
        **call: as in `sweep`.
    Returns: a BlendComparison.
    Raises: ValueError as `blend` and `sweep`.
    """
    prompts = [prompt] if isinstance(prompt, str) else list(prompt)
    before, reports, columns, name = adapter_names(pipe), {}, [], "blend_under_comparison"
    with preserve_scales(pipe):
        try:
            for method in methods:
                reports[method] = blend(
                    pipe,
                    weights,
                    method=method,
                    new_name=name,
                    density=density,
                    rank=rank,
                    seed=seed,
                )
                drawn = sweep(
                    pipe,
                    columns={"prompt": prompts},
                    scales={name: 1},
                    seed=seed,
                    num_inference_steps=num_inference_steps,
                    guidance_scale=guidance_scale,
                    **call,
                )
                if not drawn.is_whole:  # a sweep keeps what was drawn before an interrupt
                    raise KeyboardInterrupt
                columns += drawn.images
                remove_adapter(pipe, name)
        finally:
            if name not in before and name in adapter_names(pipe):
                remove_adapter(pipe, name)
    labels = [f"{method}\nerror {report.error['total']:.2g}" for method, report in reports.items()]
    rows = [list(row) for row in zip(*columns, strict=True)]
    return BlendComparison(reports, ImageGrid(rows, labels, prompts))


@dataclass(frozen=True)
class BlockEffect:
    """How much one block of an adapter matters.

    Attributes:
        norm: ‖ΔW‖ of its layers together.
        spectrum: its share of the sum of all singular values, 0 to 1.
        pixels: root mean square difference of the picture with this block alone from the base, 0 to 1.
        likeness: 1 − CLIP's cosine similarity of the two pictures.
    """

    norm: float
    spectrum: float
    pixels: float
    likeness: float


@dataclass(frozen=True, repr=False)
class BlockEffects:
    """How much each block of an adapter matters by three measures; shows itself as a table, a heat map and pictures.

    Attributes:
        adapter: its name.
        blocks: a BlockEffect by block, in the UNet's order, text encoders after it.
        grid: the base, the adapter with each block alone, and all of it.
    """

    adapter: str
    blocks: Mapping[str, BlockEffect]
    grid: ImageGrid

    @cached_property
    def ranks(self) -> dict[str, dict[str, int]]:
        """Each block's place, 1 the strongest, by "norm", "spectrum" and "pixels"."""
        found = {}
        for measure in ("norm", "spectrum", "pixels"):
            order = sorted(self.blocks, key=lambda block: -getattr(self.blocks[block], measure))
            found[measure] = {block: order.index(block) + 1 for block in self.blocks}
        return found

    @cached_property
    def agreement(self) -> dict[str, float]:
        """Spearman's rank correlation of each two measures: 1 the same order, 0 none, −1 the reverse."""
        pairs = (("norm", "spectrum"), ("norm", "pixels"), ("spectrum", "pixels"))
        if len(self.blocks) < 2:
            return {f"{one} and {other}": 1.0 for one, other in pairs}
        places = {measure: list(ranks.values()) for measure, ranks in self.ranks.items()}
        return {
            f"{one} and {other}": float(np.corrcoef(places[one], places[other])[0, 1])
            for one, other in pairs
        }

    def plot(self) -> Plot:
        """The change in the picture on the UNet's shape; below each name its places by norm, spectrum and picture."""
        places = {
            block: " · ".join(str(self.ranks[measure][block]) for measure in self.ranks)
            for block in self.blocks
        }
        return plot_blocks(
            {block: effect.pixels for block, effect in self.blocks.items()},
            notes=places,
            title=f"{self.adapter}: each block alone (places by norm · spectrum · picture)",
            label="change in the picture, root mean square",
        )

    def _rows(self) -> list[tuple[str, ...]]:
        return [
            (
                block,
                f"{effect.norm:.3g}",
                f"{effect.spectrum:.1%}",
                f"{effect.pixels:.3f}",
                f"{effect.likeness:.3f}",
            )
            for block, effect in self.blocks.items()
        ]

    def __str__(self):
        agreed = ", ".join(f"{pair} {value:.2f}" for pair, value in self.agreement.items())
        return f"{as_text(_EFFECTS, self._rows())}\nagreement of the places: {agreed}"

    __repr__ = __str__

    def _repr_html_(self):
        agreed = ", ".join(f"{pair} {value:.2f}" for pair, value in self.agreement.items())
        return f"{as_html(_EFFECTS, self._rows())}<p>agreement of the places: {agreed}</p>"

    def _ipython_display_(self):
        from IPython.display import HTML, display

        display(HTML(self._repr_html_()), self.plot(), self.grid)


@locked
def block_effects(
    pipe, adapter: str, prompt: str, *, seeds: Sequence[int] = (0, 1), **call
) -> BlockEffects:
    """How much each block of an adapter matters: by its weights, and by what it alone does to the picture.

    The pictures come from one batched pass: the base, each block alone as trained, and all blocks. Other adapters keep
    their scales; afterwards all is as it was.

    Args:
        pipe: a pipeline with the adapter.
        adapter: its name.
        prompt: what to draw.
        seeds: whole numbers; the change is the mean over them.
        **call: as in `sweep` (num_inference_steps, guidance_scale …).
    Returns: a BlockEffects.
    Raises: ValueError for an adapter that the pipeline does not have or that is fused, and as `sweep`.
    """
    check_known(pipe, [adapter])
    table = layer_table(adapter_of(pipe, adapter))
    sums = table["spectrum"].map(lambda spectrum: float(spectrum.sum()))
    blocks = _layers_by_block(pipe, adapter)
    columns = [
        0.0,
        *(
            {
                part: {module: float(module in blocks[block].get(part, ())) for module in layers}
                for part, layers in layers_of(pipe, adapter).items()
            }
            for block in blocks
        ),
        1.0,
    ]
    grid = sweep(pipe, prompt, columns={adapter: columns}, rows={"seed": list(seeds)}, **call)
    grid.columns = ["base", *(f"{block} alone" for block in blocks), "all blocks"]
    found = {}
    for number, block in enumerate(blocks, 1):
        mine = table["block"] == block
        pairs = [(row[number], row[0]) for row in grid.images]
        found[block] = BlockEffect(
            norm_of(table[mine]),
            sums[mine].sum() / sums.sum(),
            float(np.mean([_root_mean_square(*pair) for pair in pairs])),
            _unlike(pipe, pairs),
        )
    return BlockEffects(adapter, found, grid)


def _layers_by_block(pipe, adapter: str) -> dict[str, dict[str, set[str]]]:
    """The adapter's layers by block and component; a text encoder is a block of its own."""
    found: dict[str, dict[str, set[str]]] = {}
    for part, layers in layers_of(pipe, adapter).items():
        if part.startswith("text_encoder"):
            found[part] = {part: set(layers)}
        else:
            found |= {block: {part: set(modules)} for block, modules in block_map(layers).items()}
    return found


def _root_mean_square(one, other) -> float:
    return float(np.sqrt(np.mean((np.asarray(one, float) - np.asarray(other, float)) ** 2)) / 255)


def _unlike(pipe, pairs: Sequence[tuple]) -> float:
    """1 − the mean similarity of pairs of pictures."""
    alike = image_similarity(*map(list, zip(*pairs, strict=True)), model=world_of(pipe).judge)
    return 1 - float(alike.diagonal().mean())
