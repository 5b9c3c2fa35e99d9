"""As many images in one denoising pass as settings and memory allow.

A LoRA layer adds `output × scaling`. A scaling with one number for each sample of the batch gives
every sample its own.
"""

from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache

import torch
from diffusers import DiffusionPipeline, StableDiffusionPipeline, StableDiffusionXLPipeline
from PIL import Image
from torch import Tensor, nn

from lorabook.live.blend import blend
from lorabook.live.generate import chunks_of, is_guided, prompt_arguments
from lorabook.live.layers import (
    LoraLayers,
    activate,
    adapter_names,
    lora_layers,
    trained_scaling,
    write_scale,
)
from lorabook.live.load import load_adapter
from lorabook.live.manage import remove_adapter
from lorabook.live.scale_schedule import set_steps, steps_on
from lorabook.live.state import lock_of, preserve_scales
from lorabook.live.upstream import is_compiled, is_out_of_memory
from lorabook.schedulers import scheduler_like
from lorabook.sweeps.cells import SWEEP_ADAPTER, Cell, LayerScales, Present
from lorabook.upstream import execution_device, without_progress_bar

AT_ONCE = 8 * 64 * 64  # places of latents in the first pass: eight images of 512 pixels
# Arguments that hold for a batch as for an image; others are left to ordinary calls.
_SHARED = {"height", "width", "eta", "guidance_rescale", "cross_attention_kwargs", "clip_skip"}


def can_batch(pipe: DiffusionPipeline, call: Mapping[str, object]) -> bool:
    """Whether images with different scales can share a pass.

    They can for plain calls of Stable Diffusion and SDXL that are not compiled.
    """
    return (
        type(pipe) in (StableDiffusionPipeline, StableDiffusionXLPipeline)
        and not is_compiled(pipe.unet)
        and not call.keys() - _SHARED
    )


def generate_image(pipe: DiffusionPipeline, *, seed: int, **call) -> Image.Image:
    """One image by an ordinary call, from the noise of this seed, without a progress bar."""
    with lock_of(pipe), without_progress_bar(pipe):
        return pipe(**call, generator=_generator(seed)).images[0]


def generate_cells(
    pipe: DiffusionPipeline,
    cells: Mapping[int, Cell],
    present: Present,
    call: Mapping[str, object],
    *,
    on_images: Callable[[Mapping[int, Image.Image]], None],
    on_steps: Callable[[int], None],
) -> None:
    """Generate cells in as few passes as possible; a pass that does not fit is halved.

    Args:
        cells: By number.
        present: The adapters before the sweep.
        call: Further arguments of the pipeline's call.
        on_images: Gets the images of a pass, by the cells' numbers.
        on_steps: Gets how many steps of how many images were taken, multiplied.
    """
    size = _first_size(pipe, call) if can_batch(pipe, call) else 1
    groups: dict[Hashable, list[int]] = {}
    for number, cell in cells.items():
        groups.setdefault(_group_of(pipe, cell, present, call), []).append(number)
    for waiting in groups.values():
        with preserve_scales(pipe), _prepared(pipe, cells[waiting[0]], present):
            while waiting:
                now = waiting[:size]
                scales = [present.scales_in(pipe, cells[number]) for number in now]
                try:
                    if can_batch(pipe, call):
                        batch = [cells[number] for number in now]
                        images = generate_batch(pipe, batch, scales, call, on_steps)
                    else:
                        images = [_generate_alone(pipe, cells[now[0]], scales[0], call)]
                        on_steps(cells[now[0]].call["num_inference_steps"])
                except (RuntimeError, MemoryError) as error:
                    if len(now) == 1 or not is_out_of_memory(error):
                        raise
                    size = len(now) // 2
                    torch.cuda.empty_cache()
                    continue
                on_images(dict(zip(now, images, strict=True)))
                waiting = waiting[len(now) :]


def generate_batch(
    pipe: DiffusionPipeline,
    cells: Sequence[Cell],
    scales: Sequence[Mapping[str, LayerScales]],
    call: Mapping[str, object],
    on_steps: Callable[[int], None] = lambda count: None,
) -> list[Image.Image]:
    """One image for each cell in one pass, each as by an ordinary call with its scales.

    Args:
        cells: With the same steps, guidance scale and scheduler, and prompts of as many chunks.
        scales: Of each cell, as `Present.scales_in` gives them.
        call, on_steps: As in `generate_cells`.
    """
    call = {key: cells[0].call[key] for key in ("num_inference_steps", "guidance_scale")} | call
    layers = lora_layers(pipe)

    def after_step(pipe, step, timestep, values):
        on_steps(len(cells))
        return values

    with preserve_scales(pipe), without_progress_bar(pipe):
        names = [n for n in adapter_names(pipe) if any(any(each[n].values()) for each in scales)]
        activate(pipe, names, layers)
        embeddings = _embeddings(pipe, layers, cells, scales, call)
        _write_sample_scales(pipe, layers["unet"], scales, 2 if is_guided(pipe, call) else 1)
        call.pop("clip_skip", None)
        generators = [_generator(cell.call["seed"]) for cell in cells]
        return pipe(
            **embeddings, **call, generator=generators, callback_on_step_end=after_step
        ).images


def _generate_alone(
    pipe: DiffusionPipeline,
    cell: Cell,
    scales: Mapping[str, LayerScales],
    call: Mapping[str, object],
) -> Image.Image:
    """The image of a cell by an ordinary call of any pipeline."""
    layers = lora_layers(pipe)
    with preserve_scales(pipe):
        _write_scales(layers, scales)
        activate(pipe, [name for name in scales if any(scales[name].values())], layers)
        call = {key: cell.call[key] for key in cell.call if key not in ("seed", "scheduler")} | call
        prompts = call.pop("prompt"), call.pop("negative_prompt", None)
        call |= prompt_arguments(pipe, *prompts, call)
        return generate_image(pipe, seed=cell.call["seed"], **call)


def _embeddings(
    pipe: DiffusionPipeline,
    layers: LoraLayers,
    cells: Sequence[Cell],
    scales: Sequence,
    call: Mapping,
) -> dict[str, Tensor]:
    """Those of the prompts, each encoded once at each setting of the text encoders' scales."""
    encoded: dict[tuple, dict[str, Tensor]] = {}
    rows = []
    for cell, adapters in zip(cells, scales, strict=True):
        text_scales = {
            name: {key: scale for key, scale in named.items() if key[0].startswith("text_encoder")}
            for name, named in adapters.items()
        }
        prompts = cell.call["prompt"], cell.call.get("negative_prompt")
        key = *prompts, repr(text_scales)
        if key not in encoded:
            _write_scales(layers, text_scales)
            encoded[key] = prompt_arguments(pipe, *prompts, call)
        rows.append(encoded[key])
    return {name: torch.cat([row[name] for row in rows]) for name in rows[0]}


def _write_scales(layers: LoraLayers, scales: Mapping[str, LayerScales]) -> None:
    for name, named in scales.items():
        for (component, module), scale in named.items():
            write_scale(layers[component][module], name, scale)


def _write_sample_scales(
    pipe: DiffusionPipeline, layers: Mapping[str, nn.Module], scales: Sequence, repeat: int
) -> None:
    """One number for each sample where they differ, as a tensor that fits the layer's output."""

    @cache
    def column(numbers: tuple, trained: float, dtype: torch.dtype, dimensions: int) -> Tensor:
        values = torch.tensor(numbers * repeat, device=execution_device(pipe)) * trained
        return values.to(dtype).view(-1, *[1] * (dimensions - 1))

    for module, layer in layers.items():
        for name in layer.scaling:
            numbers = tuple(each[name]["unet", module] for each in scales)
            if len(set(numbers)) == 1:
                write_scale(layer, name, numbers[0])
                continue
            # (batch, channels, height, width), (batch, tokens, width); (batch, width) for the time
            is_convolution = isinstance(layer.get_base_layer(), nn.Conv2d)
            dimensions = 4 if is_convolution else 3 if ".attentions." in module else 2
            dtype = layer.lora_B[name].weight.dtype
            layer.scaling[name] = column(numbers, trained_scaling(layer, name), dtype, dimensions)


def _first_size(pipe: DiffusionPipeline, call: Mapping[str, object]) -> int:
    """How many images to begin with."""
    latents = 1
    for side in ("height", "width"):
        pixels = call.get(side)
        latents *= pixels // pipe.vae_scale_factor if pixels else pipe.unet.config.sample_size
    return max(1, AT_ONCE // max(latents, 1))


def _group_of(pipe: DiffusionPipeline, cell: Cell, present: Present, call: Mapping) -> Hashable:
    """What the cells of one pass have in common."""
    same = ("guidance_scale", "num_inference_steps", "scheduler")
    prompts = cell.call["prompt"], cell.call["negative_prompt"]
    return (
        *(cell.call.get(key) for key in same),
        chunks_of(pipe, *prompts, cell.call | call),
        None if cell.source is None else id(cell.source),
        cell.method,
        repr(present.weights(cell)),
        repr(present.schedule_in(cell)),
    )


@contextmanager
def _prepared(pipe: DiffusionPipeline, cell: Cell, present: Present) -> Iterator[None]:
    """Let the pipeline have what a cell needs: an adapter, a blend, a schedule, a scheduler."""
    scheduler = pipe.scheduler
    try:
        if cell.source is not None:
            load_adapter(pipe, cell.source, SWEEP_ADAPTER)
        if cell.method is not None:
            weights = present.weights(cell)
            blend(pipe, weights, method=cell.method, new_name=SWEEP_ADAPTER, seed=0)
        if cell.call.get("scheduler"):
            pipe.scheduler = scheduler_like(scheduler.config, cell.call["scheduler"])
        set_steps(pipe, dict.fromkeys(steps_on(pipe), ()) | present.schedule_in(cell))
        yield
    finally:
        pipe.scheduler = scheduler
        is_ours = cell.source is not None or cell.method is not None
        if is_ours and SWEEP_ADAPTER in adapter_names(pipe):
            remove_adapter(pipe, SWEEP_ADAPTER)


def _generator(seed: int) -> torch.Generator:
    return torch.Generator("cpu").manual_seed(seed)
