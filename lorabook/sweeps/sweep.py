"""Grids of images in which one or two things vary and all else stays."""

import json
import math
import os
from collections.abc import Mapping, Sequence

from lorabook.live.generate import OTHER_PROMPTS, check_call, check_prompt
from lorabook.live.layers import active_adapters, adapter_names
from lorabook.live.scale_schedule import steps_on
from lorabook.live.scales import scales_of, set_scales
from lorabook.live.state import locked, preserve_scales
from lorabook.lora.source import read_source
from lorabook.pipelines import world_of
from lorabook.show.grid import ImageGrid
from lorabook.sweeps.axes import INSTEAD, Axis, check_seed, check_together, read_axis
from lorabook.sweeps.cells import Present, as_scales, cells_of
from lorabook.sweeps.live_grid import Live
from lorabook.sweeps.passes import draw_cells

MANY = 150  # pictures that nobody draws by a slip
# what would draw other pictures than the grid's, and what says it instead
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
    pipe,
    prompt: str | None = None,
    *,
    columns: Mapping[str, Sequence],
    rows: Mapping[str, Sequence] | None = None,
    num_inference_steps: int | None = None,
    guidance_scale: float | None = None,
    seed: int = 0,
    negative_prompt: str | None = None,
    scales: Mapping[str, object] | None = None,
    title: str = "",
    confirm: bool = False,
    **call,
) -> ImageGrid:
    """Draw a grid of images along one or two axes.

    An axis is a dictionary with one entry, what varies and its values:

    - "prompt", "negative_prompt", "seed", "guidance_scale", "num_inference_steps", "scheduler";
    - an adapter's name, with scales as in `set_scales`: {"ink": [0, 0.5, 1]}, or presets by name;
    - a path into its scales, {"ink.unet.up.block_1": [0, 1]}, "ink.text_encoder", "ink.unet.cross-attention",
      "ink.unet.*.attn2.to_k"; the layers that the path does not speak of keep their scale;
    - "ink.steps", shares of the denoising in which it takes part: [(0, 0.5), (0.5, 1)], or schedules;
    - "adapter", one at a time: names on the pipeline, or what `load_adapter` takes; None is the base;
    - "checkpoint", folders of a run's checkpoints, or the TrainingRun itself for all of them;
    - "ink:creatures", the share of the second against the first, from 0 to 1;
    - "method" of `blend`, for the ratio of the other axis or else the adapters that take part;
    - "scale", a number that multiplies the scales of whatever takes part.

    Settings that differ only in scales, prompts and seeds are drawn in one denoising pass, each sample with its own
    scale; pipelines other than Stable Diffusion's and SDXL's, and compiled ones, draw one by one. Prompts are read as
    `generate` reads them: `(word:1.3)`, `[word]`, BREAK, any length. Adapters that no axis and no `scales` name take part
    as they do now. Every image starts from
    the noise of `torch.Generator("cpu").manual_seed(seed)`, and equals the one of an ordinary call with these settings.
    Interrupting keeps what is drawn. Under `accelerate launch` the processes share the pictures out. Afterwards the
    pipeline is as it was.

    Args:
        pipe: a diffusers pipeline.
        prompt, negative_prompt: what to draw; the prompt may be left out where an axis has it.
        columns, rows: the axes; `rows` may be None.
        num_inference_steps, guidance_scale: None takes what suits the model (15 and 4 for the bundled one, 25 and 7.5
            else).
        seed: the seed where no axis varies it.
        scales: of adapters, in place of the present ones; those that are not named do not take part.
        title: what stands above the grid.
        confirm: draw more than 150 pictures too.
        **call: passed on to the pipeline's call (height, width, clip_skip …); what it does not know is an error.
    Returns: an ImageGrid with `images[row][column]`, and `settings` that repeat it: `sweep(pipe, **grid.settings)`.
    Raises: ValueError for an unknown axis, adapter or block, an empty axis, two that cannot be combined, a seed that is no
        whole number, no prompt, one that cannot be read or names an adapter as `<lora:ink:1>`, arguments of the call that
        a grid cannot show (num_images_per_prompt …), or too many pictures. Nothing is drawn then.
    """
    axes = [read_axis(pipe, columns, "columns")] + (
        [read_axis(pipe, rows, "rows")] if rows is not None else []
    )
    check_together(axes)
    check_seed(seed, "seed")
    _check_call(pipe, call, axes)
    if prompt is None and "prompt" not in [axis.what for axis in axes]:
        raise ValueError('sweep needs a prompt, or an axis {"prompt": [...]}')
    for what, text in (("prompt", prompt), ("negative_prompt", negative_prompt)):
        if text is not None:
            check_prompt(text, what, INSTEAD)
    count = math.prod(len(axis.values) for axis in axes)
    if count > MANY and not confirm:
        raise ValueError(
            f"this sweep would draw {count} pictures; give fewer values, or confirm=True if that is meant"
        )
    world = world_of(pipe)
    base = {
        "prompt": prompt,
        "negative_prompt": negative_prompt,
        "seed": seed,
        "num_inference_steps": world.num_inference_steps
        if num_inference_steps is None
        else num_inference_steps,
        "guidance_scale": world.guidance_scale if guidance_scale is None else guidance_scale,
    }
    call = {name: value for name, value in call.items() if name not in _REFUSED}
    with preserve_scales(pipe):
        if scales is not None:
            set_scales(pipe, scales, only=True)
        settings = _settings(pipe, base, axes, call, title)
        return _drawn(
            pipe, axes, base, call, ImageGrid(_empty(axes), *_labels(axes), title, settings)
        )


def _check_call(pipe, call: Mapping, axes: Sequence[Axis]) -> None:
    """Raise ValueError for arguments of the pipeline's call that a sweep could only pass over."""
    for name, (meant, instead) in _REFUSED.items():
        if name in call and call[name] not in meant:
            raise ValueError(f"a sweep takes no {name}={call[name]!r:.60}: {instead}")
    if call.get("latents") is not None and "seed" in [axis.what for axis in axes]:
        raise ValueError(
            "latents are the noise, which the axis 'seed' varies; leave one of them out"
        )
    check_call(pipe, call, "sweep", OTHER_PROMPTS)


def _drawn(pipe, axes: Sequence[Axis], base: Mapping, call: Mapping, grid: ImageGrid) -> ImageGrid:
    present = Present.of(pipe)
    cells = cells_of(pipe, axes, base, present)
    for cell in cells:
        if cell.source is not None:
            read_source(cell.source)  # what cannot be read is better said before anything is drawn
        if cell.factor != 1 and not (present.active or cell.chosen or cell.weights):
            raise ValueError(
                "'scale' multiplies the scales of the adapters that take part, and none does; enable one"
            )
    rank, processes = _place()
    mine = {number: cell for number, cell in enumerate(cells) if number % processes == rank}
    steps = sum(cell.call["num_inference_steps"] for cell in mine.values())
    live = Live(grid, steps, shown=rank == 0)
    try:
        draw_cells(pipe, mine, present, call, drawn=live.drew, stepped=live.stepped)
    except KeyboardInterrupt:
        if not any(image is not None for row in grid.images for image in row):
            raise
        print("interrupted; what was drawn is kept")
    finally:
        live.close()
    return _gathered(grid, processes)


def _gathered(grid: ImageGrid, processes: int) -> ImageGrid:
    """The grid with what all processes drew, on each of them."""
    if processes > 1:
        from accelerate.utils import gather_object

        width = len(grid.images[0])
        mine = [
            (y * width + x, image)
            for y, row in enumerate(grid.images)
            for x, image in enumerate(row)
            if image
        ]
        for number, image in gather_object(mine):
            grid.images[number // width][number % width] = image
    return grid


def _place() -> tuple[int, int]:
    """This process' number and how many there are, where `accelerate launch` or torchrun started several."""
    if int(os.environ.get("WORLD_SIZE", 1)) < 2:
        return 0, 1
    from accelerate import PartialState

    state = PartialState()
    return state.process_index, state.num_processes


def _empty(axes: Sequence[Axis]) -> list[list[None]]:
    return [
        [None] * len(axes[0].values) for _ in range(len(axes[1].values) if len(axes) > 1 else 1)
    ]


def _labels(axes: Sequence[Axis]) -> tuple[list[str], list[str]]:
    return list(axes[0].labels), list(axes[1].labels) if len(axes) > 1 else []


def _settings(pipe, base: Mapping, axes: Sequence[Axis], call: Mapping, title: str) -> dict:
    """The arguments that repeat the sweep, as far as JSON can hold them."""
    told = {key: value for key, value in base.items() if value is not None} | dict(call)
    told |= {
        name: {axis.what: list(axis.values)}
        for name, axis in zip(("columns", "rows"), axes, strict=False)
    }
    table, active, steps = scales_of(pipe), active_adapters(pipe), steps_on(pipe)
    scales = {name: as_scales(table[name]) for name in adapter_names(pipe) if name in active}
    for name, shares in steps.items():
        if name in scales:
            said = scales[name]
            whole = said if isinstance(said, Mapping) else {part: said for part in table[name]}
            scales[name] = {**whole, "steps": [list(share) for share in shares]}
    told |= {"scales": scales} if scales else {}
    told |= {"title": title} if title else {}
    return {
        key: json.loads(json.dumps(value, default=str))
        for key, value in told.items()
        if _is_plain(value)
    }


def _is_plain(value) -> bool:
    try:
        json.dumps(value, default=os.fspath)
    except (TypeError, ValueError):
        return False
    return True
