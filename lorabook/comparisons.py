"""Comparisons in pictures and numbers: the methods of blending side by side."""
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from tqdm.auto import tqdm

from lorabook.adapters.blend import blend
from lorabook.adapters.blend_report import BlendReport
from lorabook.adapters.manage import remove_adapter
from lorabook.adapters.merging import METHODS
from lorabook.adapters.scales import kept_scales
from lorabook.adapters.tables import as_html, as_text
from lorabook.grid import ImageGrid
from lorabook.sweeps import draw, world_of

_HEADS = ("method", "rank", "relative error against the sum of ΔW")


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
        return [(method, str(report.rank), f"{report.error['total']:.2g}") for method, report in self.reports.items()]

    def __str__(self):
        return as_text(_HEADS, self._rows())

    __repr__ = __str__

    def _repr_html_(self):
        return as_html(_HEADS, self._rows())

    def _ipython_display_(self):
        from IPython.display import HTML, display
        display(HTML(self._repr_html_()), self.grid)


def compare_blends(pipe, weights: Mapping[str, object], prompt: str | Sequence[str], *, methods: Sequence[str] = METHODS,
                   density: float | None = None, rank: int | None = None, seed: int = 0,
                   num_inference_steps: int | None = None, guidance_scale: float | None = None,
                   **call) -> BlendComparison:
    """Blend the same adapters by each method and draw the same prompts with it.

    The pipeline's adapters, scales and states are as before afterwards.

    Args:
        pipe, weights, density, rank: as in `blend`.
        prompt: one, or several for a row each.
        methods: which ones.
        seed: of the pictures, and of the dare methods.
        num_inference_steps, guidance_scale: None takes what suits the model.
        **call: passed on to the pipeline.
    Returns: a BlendComparison.
    Raises: ValueError as `blend`.
    """
    world, prompts = world_of(pipe), [prompt] if isinstance(prompt, str) else list(prompt)
    told = dict(call, seed=seed, num_inference_steps=num_inference_steps or world.num_inference_steps,
                guidance_scale=world.guidance_scale if guidance_scale is None else guidance_scale)
    reports, columns, name = {}, [], "blend_under_comparison"
    with kept_scales(pipe), tqdm(total=len(methods) * len(prompts), desc="images", leave=False) as progress:
        for method in methods:
            reports[method] = blend(pipe, weights, method=method, new_name=name, density=density, rank=rank, seed=seed)
            try:
                columns.append([])
                for text in prompts:
                    columns[-1].append(draw(pipe, prompt=text, **told))
                    progress.update()
            finally:
                remove_adapter(pipe, name)
    labels = [f"{method}\nerror {report.error['total']:.2g}" for method, report in reports.items()]
    rows = [list(row) for row in zip(*columns, strict=True)]
    return BlendComparison(reports, ImageGrid(rows, labels, prompts))
