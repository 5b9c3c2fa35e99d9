"""Grids of images in which one or two things vary and all else stays."""

import json
import math
import os
from collections.abc import Mapping, Sequence
from itertools import product
from pathlib import Path

from diffusers import DiffusionPipeline
from IPython.display import display
from PIL import Image
from tqdm.auto import tqdm

from lorabook.live.generate import OTHER_PROMPTS, check_call, check_prompt
from lorabook.live.inject import convert_doras
from lorabook.live.layers import adapter_names
from lorabook.live.scales import set_scales
from lorabook.live.state import locked, preserve_scales
from lorabook.lora.source import read_source
from lorabook.pipelines import world_of
from lorabook.show.display import in_notebook
from lorabook.show.grid import ImageGrid
from lorabook.sweeps.axes import INSTEAD, KINDS, Axis, RatioAxis, ScaleAxis, check_seed
from lorabook.sweeps.batched import Passes
from lorabook.sweeps.cells import Cell, Present
from lorabook.types import Scales

MANY = 150  # images that nobody asks for by a slip
# Arguments of the call at which a grid would hold other images, what they may be, and what to do.
_REFUSED = {
    "num_images_per_prompt": (
        (None, 1),
        'rows={"seed": [0, 1, 2, 3]} draws several pictures of each setting',
    ),
    "generator": ((None,), 'seed= or an axis {"seed": [...]} says which noise to draw'),
    "output_type": ((None, "pil"), "a grid holds PIL images; draw with pipe(...) for others"),
    "return_dict": ((None, True), "a sweep returns an ImageGrid"),
}


@locked
def sweep(
    pipe: DiffusionPipeline,
    prompt: str | None = None,
    *,
    columns: Mapping[str, Sequence],
    rows: Mapping[str, Sequence] | None = None,
    num_inference_steps: int | None = None,
    guidance_scale: float | None = None,
    seed: int = 0,
    negative_prompt: str | None = None,
    scales: Mapping[str, Scales] | None = None,
    title: str = "",
    confirm: bool = False,
    **call,
) -> ImageGrid:
    """Generate a grid of images along one or two axes.

    An axis is a dictionary with one entry, what varies and its values:

    - "prompt", "negative_prompt", "seed", "guidance_scale", "num_inference_steps", "scheduler";
    - an adapter's name, with scales as in `set_scales`: {"ink": [0, 0.5, 1]}, or presets by name;
    - a path into its scales, {"ink.unet.up.block_1": [0, 1]}, "ink.text_encoder",
      "ink.unet.cross-attention", "ink.unet.*.attn2.to_k"; other layers keep their scale;
    - "ink.steps", shares of the denoising in which it acts: [(0, 0.5), (0.5, 1)], or schedules;
    - "adapter", one at a time: names on the pipeline, or what `load_adapter` takes; None is no one;
    - "checkpoint", folders of a run's checkpoints, or the TrainingRun itself for all of them;
    - "ink:creatures", the share of the second against the first, from 0 to 1;
    - "method" of `blend`, for the ratio of the other axis or else the active adapters;
    - "scale", a number that multiplies the scales of all active adapters.

    Settings that differ only in scales, prompts and seeds share one denoising pass, each sample
    with its own scale. Pipelines other than Stable Diffusion's and SDXL's, and compiled ones,
    generate image by image. Prompts are read as `generate` reads them: `(word:1.3)`, `[word]`,
    BREAK, any length. Every image starts from the noise of
    `torch.Generator("cpu").manual_seed(seed)`, and equals that of an ordinary call with these
    settings. An interrupt keeps the images so far. Under `accelerate launch` the processes share
    the images. Afterwards the pipeline is as it was.

    Args:
        pipe: A diffusers pipeline.
        prompt, negative_prompt: The prompt may be left out where an axis has it.
        columns, rows: The axes; `rows` may be None.
        num_inference_steps, guidance_scale: None takes what suits the model: 15 and 4 for the
            bundled one, else 25 and 7.5.
        seed: Of all images, where no axis varies it.
        scales: Of adapters, in place of the present ones; others are then not active.
        title: What stands above the grid.
        confirm: Generate more than 150 images too.
        **call: For the pipeline's call (height, width, clip_skip …); an unknown name is an error.
    Returns: An ImageGrid with `images[row][column]`, and `settings` that repeat it:
        `sweep(pipe, **grid.settings)`.
    Raises: ValueError for an unknown axis, adapter or block, an empty axis, two that cannot be
        combined, a seed that is no whole number, no prompt, one that cannot be read or names an
        adapter as `<lora:ink:1>`, arguments of the call that a grid cannot show, or too many
        images. Nothing is generated then.
    """
    axes = [read_axis(pipe, columns, "columns")]
    if rows is not None:
        axes.append(read_axis(pipe, rows, "rows"))
        _check_together(*axes)
    check_seed(seed, "seed")
    names = [axis.name for axis in axes]
    _check_call(pipe, call, names)
    if prompt is None and "prompt" not in names:
        raise ValueError('sweep needs a prompt, or an axis {"prompt": [...]}')
    count = math.prod(len(axis.values) for axis in axes)
    if count > MANY and not confirm:
        raise ValueError(
            f"this sweep would draw {count} pictures; give fewer values, or confirm=True if that "
            "is meant"
        )
    world, fixed = world_of(pipe), {"prompt": prompt, "negative_prompt": negative_prompt}
    for name, text in fixed.items():
        if text is not None:
            check_prompt(text, name, INSTEAD)
    steps, guidance = num_inference_steps, guidance_scale
    fixed |= {
        "seed": seed,
        "num_inference_steps": world.num_inference_steps if steps is None else steps,
        "guidance_scale": world.guidance_scale if guidance is None else guidance,
    }
    call = {name: value for name, value in call.items() if name not in _REFUSED}
    convert_doras(pipe, adapter_names(pipe))
    with preserve_scales(pipe):
        if scales is not None:
            set_scales(pipe, scales, only=True)
        present = Present.of(pipe)
        cells = _cells(axes, fixed, present)
        images = [[None] * len(axes[0].values) for _ in range(count // len(axes[0].values))]
        labels = [[axis.label(value) for value in axis.values] for axis in axes]
        settings = _settings(fixed | call, axes, present, title)
        grid = ImageGrid(images, labels[0], labels[1] if rows is not None else [], title, settings)
        return _generate(pipe, cells, present, call, grid)


def read_axis(pipe: DiffusionPipeline, axis: Mapping[str, Sequence], place: str) -> Axis:
    """An axis as it was given to `sweep` as `place`, "columns" or "rows", checked."""
    if not isinstance(axis, Mapping) or len(axis) != 1:
        raise ValueError(
            f'{place} must be a dictionary with one entry, as {{"seed": [0, 1, 2]}}; '
            f"got {axis!r:.120}"
        )
    ((name, values),) = axis.items()
    if not isinstance(name, str):
        raise ValueError(f"{place}: {name!r:.60} is no name of what varies")
    if name == "checkpoint" and hasattr(values, "folder"):
        values = _checkpoints_of(values)
    if isinstance(values, (str, bytes, Mapping)) or not hasattr(values, "__iter__"):
        raise ValueError(f"{place}: the values of {name!r} must be a list, not {values!r:.80}")
    kind = KINDS.get(name, RatioAxis if ":" in name else ScaleAxis)
    axis = kind(pipe, place, name, list(values))
    if not axis.values:
        raise ValueError(f"{place}: {name!r} has no values")
    axis.check_name()
    for value in axis.values:
        axis.check(value)
    return axis


def _check_together(one: Axis, other: Axis) -> None:
    if one.name == other.name:
        raise ValueError(
            f"columns and rows both vary {one.name!r}; let one of them vary something else"
        )
    if one.excludes(other) or other.excludes(one):
        raise ValueError(
            f"the axes {one.name!r} and {other.name!r} cannot be combined, since both say how "
            "strongly adapters take part; vary 'scale' beside one of them"
        )


def _check_call(pipe: DiffusionPipeline, call: Mapping, axes: Sequence[str]) -> None:
    """Raise ValueError for arguments of the pipeline's call that a sweep could only pass over."""
    for name, (accepted, remedy) in _REFUSED.items():
        if name in call and call[name] not in accepted:
            raise ValueError(f"a sweep takes no {name}={call[name]!r:.60}: {remedy}")
    if call.get("latents") is not None and "seed" in axes:
        raise ValueError(
            "latents are the noise, which the axis 'seed' varies; leave one of them out"
        )
    if twice := call.keys() & set(axes):
        name = min(twice)
        raise ValueError(f"{name}={call[name]!r:.60} is what an axis varies; leave it out")
    check_call(pipe, call, "sweep", OTHER_PROMPTS)


def _checkpoints_of(run: object) -> list[Path]:
    """The checkpoints of a TrainingRun in order, and its adapter where it learned on after them."""
    folders = [path for path in Path(run.folder).glob("checkpoint-*") if path.is_dir()]
    checkpoints = {int(path.name.rpartition("-")[2]): path for path in folders}
    last = max((record["step"] for record in run.history), default=0)
    ordered = [checkpoints[step] for step in sorted(checkpoints)]
    return ordered if last in checkpoints else [*ordered, Path(run.adapter)]


def _cells(axes: Sequence[Axis], fixed: Mapping, present: Present) -> list[Cell]:
    """The cells row by row, with all that can be wrong about them checked."""
    across, *down = axes
    cells = []
    for values in product(*(axis.values for axis in down), across.values):
        cell = Cell(fixed)
        for axis, value in zip((*down, across), values, strict=True):
            cell = axis.apply(cell, value)
        if cell.source is not None:
            read_source(cell.source)
        if cell.factor != 1 and not (present.active or cell.only or cell.scales):
            raise ValueError(
                "'scale' multiplies the scales of the adapters that take part, and none does; "
                "enable one"
            )
        present.weights(cell)
        cells.append(cell)
    return cells


def _generate(
    pipe: DiffusionPipeline, cells: Sequence[Cell], present: Present, call: Mapping, grid: ImageGrid
) -> ImageGrid:
    """Fill the grid; of several processes, each generates a part and gets the others'."""
    width, rank, processes = len(grid.images[0]), 0, 1
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        from accelerate import PartialState
        from accelerate.utils import gather_object

        rank, processes = PartialState().process_index, PartialState().num_processes
    mine = {number: cells[number] for number in range(rank, len(cells), processes)}
    progress = _Progress(grid, mine.values(), is_shown=rank == 0)
    passes = Passes(pipe, present, call, progress.advance)
    try:
        passes.generate(mine, progress.add)
    except KeyboardInterrupt:
        if not any(image for row in grid.images for image in row):
            raise
        print("interrupted; what was drawn is kept")
    finally:
        progress.close()
    if processes > 1:
        own = [(n, grid.images[n // width][n % width]) for n in mine]
        progress.add({number: image for number, image in gather_object(own) if image})
    return grid


class _Progress:
    """A bar over the steps of all images, and in a notebook the grid as far as it goes."""

    def __init__(self, grid: ImageGrid, cells, *, is_shown: bool):
        self.grid, self.handle, self.is_shown = grid, None, is_shown
        steps = sum(cell.call["num_inference_steps"] for cell in cells)
        self.bar = tqdm(total=steps, desc="steps of all images", leave=False, disable=not is_shown)

    def advance(self, count: int) -> None:
        self.bar.update(min(count, self.bar.total - self.bar.n))  # some schedulers take more steps

    def add(self, images: Mapping[int, Image.Image]) -> None:
        width = len(self.grid.images[0])
        for number, image in images.items():
            self.grid.images[number // width][number % width] = image
        if self.is_shown and in_notebook() and not self.grid.is_whole:
            if self.handle is None:
                self.handle = display(self.grid, display_id=True)
            else:
                self.handle.update(self.grid)

    def close(self) -> None:
        self.bar.close()
        if self.handle is not None:  # the grid is shown as the sweep's result
            self.handle.update({"text/plain": ""}, raw=True)


def _settings(fixed: Mapping, axes: Sequence[Axis], present: Present, title: str) -> dict:
    """The arguments that repeat the sweep, as far as JSON can hold them."""
    scales = {name: present.scales_of(name) for name in present.active}
    settings = {name: value for name, value in fixed.items() if value is not None}
    settings |= {axis.place: {axis.name: list(axis.values)} for axis in axes}
    settings |= {"scales": scales} if scales else {}
    settings |= {"title": title} if title else {}
    plain = {}
    for name, value in settings.items():
        try:
            plain[name] = json.loads(json.dumps(value, default=os.fspath))
        except (TypeError, ValueError):
            continue
    return plain
