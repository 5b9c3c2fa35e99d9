"""The cells of a grid shared out to denoising passes: as many at once as settings and memory allow."""

from collections.abc import Callable, Hashable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial

import torch

from lorabook.live.blend import blend
from lorabook.live.generate import chunks_of
from lorabook.live.layers import adapter_names
from lorabook.live.load import load_adapter
from lorabook.live.manage import remove_adapter
from lorabook.live.scale_schedule import set_steps, steps_on
from lorabook.live.state import preserve_scales
from lorabook.live.upstream import is_out_of_memory
from lorabook.schedulers import scheduler_like
from lorabook.sweeps.batched import can_batch, draw_alone, draw_batch
from lorabook.sweeps.cells import SWEPT, Cell, Present, factors_of, schedule_of

AT_ONCE = 8 * 64 * 64  # latents' places in one pass to begin with: eight pictures of 512 pixels


def draw_cells(
    pipe,
    cells: Mapping[int, Cell],
    present: Present,
    told: Mapping[str, object],
    *,
    drawn: Callable[[dict], None],
    stepped: Callable[[int], None],
) -> None:
    """Draw cells in as few passes as may be.

    Args:
        cells: by number.
        present: the adapters before the sweep.
        told: further arguments of the call.
        drawn: gets the images of a pass by the cells' numbers.
        stepped: called after each step with the number of images that took it.
    """
    steps = steps_on(pipe)
    size = _at_once(pipe, told)
    for group in _groups(pipe, cells, told).values():
        with preserve_scales(pipe), _prepared(pipe, cells[group[0]]):
            set_steps(
                pipe, dict.fromkeys(steps_on(pipe), ()) | schedule_of(pipe, cells[group[0]], steps)
            )
            size = _draw_group(
                pipe,
                {number: cells[number] for number in group},
                present,
                told,
                size,
                drawn,
                stepped,
            )


def _draw_group(
    pipe, cells: Mapping[int, Cell], present: Present, told, size: int, drawn, stepped
) -> int:
    """The cells of a group, halving the pass when memory runs out; returns what fitted at once."""
    waiting = list(cells)
    chunks = {
        number: chunks_of(pipe, cell.call["prompt"], cell.call["negative_prompt"], cell.call | told)
        for number, cell in cells.items()
    }
    factors = {number: factors_of(pipe, cell, present) for number, cell in cells.items()}
    while waiting:
        now = [number for number in waiting if chunks[number] == chunks[waiting[0]]][:size]
        try:
            if can_batch(pipe, told):
                images = draw_batch(
                    pipe,
                    [cells[n] for n in now],
                    [factors[n] for n in now],
                    told,
                    partial(stepped, len(now)),
                )
            else:
                now = waiting[:1]
                images = [draw_alone(pipe, cells[now[0]], factors[now[0]], told)]
        except (RuntimeError, MemoryError) as error:
            if len(now) == 1 or not is_out_of_memory(error):
                raise
            size = len(now) // 2
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
            continue
        drawn(dict(zip(now, images, strict=True)))
        waiting = [number for number in waiting if number not in now]
    return size


def _at_once(pipe, told: Mapping[str, object]) -> int:
    """How many pictures to begin with."""
    if not hasattr(pipe, "unet"):
        return 1
    side = pipe.unet.config.sample_size
    high, wide = (
        told[key] // pipe.vae_scale_factor if told.get(key) else side for key in ("height", "width")
    )
    return max(1, AT_ONCE // max(high * wide, 1))


def _groups(
    pipe, cells: Mapping[int, Cell], told: Mapping[str, object]
) -> dict[Hashable, list[int]]:
    """Numbers of the cells that one pass can draw."""
    steps, groups = steps_on(pipe), {}
    for number, cell in cells.items():
        call = tuple(
            cell.call.get(key) for key in ("guidance_scale", "num_inference_steps", "scheduler")
        )
        weights = repr(sorted(cell.weights.items(), key=lambda item: item[0]))
        schedule = repr(schedule_of(pipe, cell, steps) if cell.source is None else {})
        key = (
            *call,
            id(cell.source) if cell.source is not None else None,
            cell.method,
            weights,
            schedule,
        )
        groups.setdefault(key, []).append(number)
    return groups


@contextmanager
def _prepared(pipe, cell: Cell) -> Iterator[None]:
    """The pipeline with what a cell needs put on it: an adapter, a blend, a scheduler; taken off again."""
    scheduler = pipe.scheduler
    try:
        if cell.source is not None:
            load_adapter(pipe, cell.source, SWEPT)
        if cell.method is not None:
            blend(pipe, cell.weights, method=cell.method, new_name=SWEPT, seed=0)
        if cell.call.get("scheduler"):
            pipe.scheduler = scheduler_like(scheduler.config, cell.call["scheduler"])
        yield
    finally:
        pipe.scheduler = scheduler
        if (cell.source is not None or cell.method is not None) and SWEPT in adapter_names(pipe):
            remove_adapter(pipe, SWEPT)
