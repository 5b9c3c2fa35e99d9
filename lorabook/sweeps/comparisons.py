"""Methods of blending, and the blocks of an adapter, side by side in images and numbers."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from diffusers import DiffusionPipeline
from IPython.display import HTML, display
from pandas import DataFrame

from lorabook.blocks import group_by_block
from lorabook.live.blend import BlendReport, blend
from lorabook.live.inject import adapter_of
from lorabook.live.layers import layers_of
from lorabook.live.manage import remove_adapter
from lorabook.live.state import check_known, locked, preserve_scales
from lorabook.lora.inspect import layer_table, norm_of
from lorabook.lora.merge import METHODS
from lorabook.metrics import image_similarity
from lorabook.pipelines import world_of
from lorabook.show.block_plot import plot_blocks
from lorabook.show.grid import ImageGrid
from lorabook.show.plots import Plot
from lorabook.show.tables import Report
from lorabook.sweeps.sweep import sweep
from lorabook.types import Scales

_NAME = "blend_under_comparison"


@dataclass(frozen=True, eq=False, repr=False)
class BlendComparison(Report):
    """The same adapters and weights blended by several methods.

    Attributes:
        reports: BlendReports by method.
        grid: A row for each prompt, a column for each method.
        table: A row for each method: its rank and its error against the sum of ΔW.
    """

    reports: Mapping[str, BlendReport]
    grid: ImageGrid
    heads = {"error": "relative error against the sum of ΔW"}
    formats = {"error": "{:.2g}"}

    @cached_property
    def table(self) -> DataFrame:
        rows = [(method, r.rank, r.error["total"]) for method, r in self.reports.items()]
        return DataFrame(rows, columns=["method", "rank", "error"])

    def _ipython_display_(self):
        display(HTML(self._repr_html_()), self.grid)


@locked
def compare_blends(
    pipe: DiffusionPipeline,
    weights: Mapping[str, Scales],
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
    """Blend the same adapters by each method, and generate images with each blend alone.

    Afterwards the pipeline's adapters and scales are as before, after an error or interrupt too.

    Args:
        pipe, weights, density, rank: As in `blend`.
        prompt: One, or several for a row each; read as in `sweep`.
        methods: Which ones.
        seed: Of the images, and of the dare methods.
        num_inference_steps, guidance_scale: None takes what suits the model.
        **call: As in `sweep`.
    Returns: A BlendComparison.
    Raises: ValueError as `blend` and `sweep`.
    """
    prompts = [prompt] if isinstance(prompt, str) else list(prompt)
    call |= {"num_inference_steps": num_inference_steps, "guidance_scale": guidance_scale}
    blending = {"density": density, "rank": rank, "seed": seed, "new_name": _NAME}
    reports, columns = {}, []
    with preserve_scales(pipe):
        for method in methods:
            reports[method] = blend(pipe, weights, method=method, **blending)
            try:
                grid = sweep(
                    pipe, columns={"prompt": prompts}, scales={_NAME: 1}, seed=seed, **call
                )
            finally:
                remove_adapter(pipe, _NAME)
            if not grid.is_whole:  # a sweep keeps the images before an interrupt
                raise KeyboardInterrupt
            columns.append(grid.images[0])
    labels = [f"{method}\nerror {report.error['total']:.2g}" for method, report in reports.items()]
    rows = [list(row) for row in zip(*columns, strict=True)]
    return BlendComparison(reports, ImageGrid(rows, labels, prompts))


@dataclass(frozen=True, eq=False, repr=False)
class BlockEffects(Report):
    """How much each block of an adapter matters by several measures.

    Attributes:
        adapter: Its name.
        table: A row for each block in the UNet's order, text encoders after it. `norm` is ‖ΔW‖ of
            its layers together; `spectrum` its share of the sum of all singular values, 0 to 1;
            `pixels` the root mean square difference of the image with this block alone from the
            base, 0 to 1; `likeness` 1 − CLIP's cosine similarity of these two images.
        grid: The base, the adapter with each block alone, and all of it.
    """

    adapter: str
    table: DataFrame
    grid: ImageGrid
    heads = {
        "norm": "‖ΔW‖",
        "spectrum": "share of the spectrum",
        "pixels": "change in the picture",
        "likeness": "change to CLIP's eye",
    }
    formats = {"norm": "{:.3g}", "spectrum": "{:.1%}", "pixels": "{:.3f}", "likeness": "{:.3f}"}

    @property
    def blocks(self) -> dict[str, tuple]:
        """The rows of the table by block, as named tuples."""
        return {row.block: row for row in self.table.itertuples(index=False, name="BlockEffect")}

    @property
    def ranks(self) -> DataFrame:
        """Each block's place, 1 the strongest, by "norm", "spectrum" and "pixels"."""
        measures = self.table.set_index("block")[["norm", "spectrum", "pixels"]]
        return measures.rank(ascending=False, method="first").astype(int)

    @property
    def agreement(self) -> dict[str, float]:
        """Spearman's correlation of each two measures: 1 the same order, −1 the reverse."""
        pairs = (("norm", "spectrum"), ("norm", "pixels"), ("spectrum", "pixels"))
        correlation = self.ranks.corr().fillna(1.0)  # of a single block
        return {f"{one} and {other}": float(correlation[one][other]) for one, other in pairs}

    @property
    def note(self) -> str:
        """The agreement in a sentence."""
        pairs = [f"{pair} {value:.2f}" for pair, value in self.agreement.items()]
        return f"agreement of the places: {', '.join(pairs)}"

    def plot(self) -> Plot:
        """The change in the image on the UNet's shape; below each name the block's places."""
        places = self.ranks.astype(str).agg(" · ".join, axis=1)
        return plot_blocks(
            dict(zip(self.table.block, self.table.pixels, strict=True)),
            notes=places.to_dict(),
            title=f"{self.adapter}: each block alone (places by norm · spectrum · picture)",
            label="change in the picture, root mean square",
        )

    def _ipython_display_(self):
        display(HTML(self._repr_html_()), self.plot(), self.grid)


@locked
def block_effects(
    pipe: DiffusionPipeline, adapter: str, prompt: str, *, seeds: Sequence[int] = (0, 1), **call
) -> BlockEffects:
    """How much each block of an adapter matters: by its weights, and by what it alone changes.

    The images share passes: the base, each block alone as trained, and all blocks. Other adapters
    keep their scales; afterwards all is as it was.

    Args:
        pipe: A pipeline with the adapter.
        adapter: Its name.
        prompt: What to generate.
        seeds: Whole numbers; the change is the mean over them.
        **call: As in `sweep` (num_inference_steps, guidance_scale …).
    Returns: A BlockEffects.
    Raises: ValueError for an adapter that the pipeline does not have or that is fused, and as
        `sweep`.
    """
    check_known(pipe, [adapter])
    weights, layers = layer_table(adapter_of(pipe, adapter)), layers_of(pipe, adapter)
    sums = weights["spectrum"].map(lambda spectrum: float(spectrum.sum()))
    blocks = group_by_block((name, module) for name in layers for module in layers[name])
    alone = [
        {
            component: {module: float((component, module) in inside) for module in modules}
            for component, modules in layers.items()
        }
        for inside in map(set, blocks.values())
    ]
    columns = {adapter: [0.0, *alone, 1.0]}
    grid = sweep(pipe, prompt, columns=columns, rows={"seed": list(seeds)}, **call)
    grid.columns = ["base", *(f"{block} alone" for block in blocks), "all blocks"]
    rows = []
    base, *others = zip(*grid.images, strict=True)
    for block, changed in zip(blocks, others, strict=False):
        mine = weights["block"] == block
        alike = image_similarity(changed, base, model=world_of(pipe).judge).diagonal()
        norm, share = norm_of(weights[mine]), sums[mine].sum() / sums.sum()
        pixels = float(np.mean(list(map(_root_mean_square, changed, base))))
        rows.append((block, norm, share, pixels, 1 - float(alike.mean())))
    table = DataFrame(rows, columns=["block", *BlockEffects.heads])
    return BlockEffects(adapter, table, grid)


def _root_mean_square(one, other) -> float:
    return float(np.sqrt(np.mean((np.asarray(one, float) - np.asarray(other, float)) ** 2)) / 255)
