"""Grids of images in which one or two things vary and all else stays."""
from collections.abc import Mapping, Sequence

import torch
from tqdm.auto import tqdm

from lorabook.adapters.layers import adapter_names
from lorabook.adapters.scales import kept_scales, set_scales
from lorabook.grid import ImageGrid
from lorabook.worlds import BUNDLED, HUB

SETTINGS = ("prompt", "negative_prompt", "seed", "guidance_scale", "num_inference_steps")


def sweep(pipe, prompt: str | None = None, *, columns: Mapping[str, Sequence], rows: Mapping[str, Sequence] | None = None,
          num_inference_steps: int | None = None, guidance_scale: float | None = None, seed: int = 0,
          title: str = "", **call) -> ImageGrid:
    """Draw a grid of images along one or two axes.

    An axis is a dictionary with one entry, what varies and its values: the scale of an adapter by its name
    ({"creatures": [0, 0.5, 1]}), or "prompt", "negative_prompt", "seed", "guidance_scale", "num_inference_steps".
    Every image starts from the noise of `torch.Generator("cpu").manual_seed(seed)`. The adapters' scales are put
    back afterwards.

    Args:
        pipe: a diffusers pipeline.
        prompt: what to draw; may be left out where an axis has it.
        columns, rows: the axes; `rows` may be None.
        num_inference_steps, guidance_scale: None takes what suits the model (15 and 4 for the bundled one, 25 and 7.5
            else).
        seed: the seed where no axis varies it.
        title: what stands above the grid.
        **call: passed on to the pipeline's call (height, width, clip_skip …).
    Returns: an ImageGrid with `images[row][column]`.
    Raises: ValueError for an unknown axis, an empty one, or no prompt.
    """
    axes = [_axis(pipe, columns, "columns"), _axis(pipe, rows, "rows") if rows else None]
    if rows and axes[0][0] == axes[1][0]:
        raise ValueError(f"columns and rows both vary {axes[0][0]!r}; let one of them vary something else")
    given = {axis[0] for axis in axes if axis}
    if prompt is None and "prompt" not in given:
        raise ValueError("sweep needs a prompt, or an axis {\"prompt\": [...]}")
    world = world_of(pipe)
    base = dict(call, prompt=prompt, seed=seed,
                num_inference_steps=num_inference_steps or world.num_inference_steps,
                guidance_scale=world.guidance_scale if guidance_scale is None else guidance_scale)
    (across, values), (down, others) = axes[0], axes[1] or (None, [None])
    images = []
    with kept_scales(pipe), tqdm(total=len(values) * len(others), desc="images", leave=False) as progress:
        for other in others:
            images.append([])
            for value in values:
                images[-1].append(_draw(pipe, base, {across: value} | ({down: other} if down else {})))
                progress.update()
    return ImageGrid(images, [_label(across, v) for v in values], [_label(down, v) for v in others] if down else [], title)


def _draw(pipe, base: dict, varied: dict):
    """One image, with adapter scales and call settings as `varied` says."""
    scales = {key: value for key, value in varied.items() if key not in SETTINGS}
    if scales:
        set_scales(pipe, scales)
    return draw(pipe, **base | {key: value for key, value in varied.items() if key in SETTINGS})


def draw(pipe, *, seed: int, **call):
    """One image by an ordinary call of the pipeline, from the noise of this seed, without a progress bar."""
    generator = torch.Generator("cpu").manual_seed(seed)
    bar = getattr(pipe, "_progress_bar_config", {})
    pipe.set_progress_bar_config(disable=True)
    try:
        return pipe(**call, generator=generator).images[0]
    finally:
        pipe.set_progress_bar_config(**bar)


def _axis(pipe, axis: Mapping[str, Sequence], name: str) -> tuple[str, list]:
    if not isinstance(axis, Mapping) or len(axis) != 1:
        raise ValueError(f"{name} must be a dictionary with one entry, as {{\"seed\": [0, 1, 2]}}; got {axis!r}")
    (what, values), = axis.items()
    known = adapter_names(pipe)
    if what not in SETTINGS and what not in known:
        raise ValueError(f"{name}: {what!r} cannot vary; what can is {', '.join(SETTINGS)}, "
                         f"and the scale of an adapter ({', '.join(known) or 'none loaded'})")
    values = list(values)
    if not values:
        raise ValueError(f"{name}: {what!r} has no values")
    return what, values


def world_of(pipe):
    """The defaults that suit a pipeline, by the size of image it was made for."""
    size = pipe.unet.config.sample_size * pipe.vae_scale_factor if hasattr(pipe, "unet") else HUB.resolution
    return BUNDLED if size == BUNDLED.resolution else HUB


def _label(what: str, value) -> str:
    if what in ("prompt", "negative_prompt"):
        return str(value)
    short = {"guidance_scale": "guidance", "num_inference_steps": "steps"}.get(what, what)
    return f"{short} {value:g}" if isinstance(value, float) else f"{short} {value}"
