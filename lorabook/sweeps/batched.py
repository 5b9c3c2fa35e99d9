"""Several pictures in one denoising pass, each with adapters at its own scales.

A LoRA layer adds `output × scaling`; a scaling with one number for each sample of the batch gives every sample its own.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from lorabook.live.generate import is_guided, prompt_arguments
from lorabook.live.layers import (
    LoraLayers,
    activate,
    adapter_names,
    lora_layers,
    trained_scaling,
    write_scale,
)
from lorabook.live.state import lock_of
from lorabook.sweeps.cells import Cell, Factors
from lorabook.upstream import without_progress_bar

TOGETHER = {
    "height",
    "width",
    "eta",
    "guidance_rescale",
    "cross_attention_kwargs",
    "clip_skip",
}  # the same for a batch


def can_batch(pipe, call: Mapping[str, object]) -> bool:
    """Whether pictures with different scales can share a pass: Stable Diffusion and SDXL, not compiled, plain calls."""
    return (
        type(pipe) in (StableDiffusionPipeline, StableDiffusionXLPipeline)
        and not hasattr(pipe.unet, "_orig_mod")
        and not call.keys() - TOGETHER
    )


def draw_batch(
    pipe,
    cells: Sequence[Cell],
    factors: Sequence[Factors],
    told: Mapping[str, object],
    stepped: Callable[[], None] | None = None,
) -> list:
    """One picture for each cell, in one pass of the pipeline.

    Each is the picture of an ordinary call with these scales, to rounding.

    Args:
        cells: with the same steps, guidance scale and scheduler, and prompts of as many chunks.
        factors: of each cell.
        told: further arguments of the call.
        stepped: called after each step of the denoising.
    Returns: PIL images.
    """
    call = {key: cells[0].call[key] for key in ("num_inference_steps", "guidance_scale")} | dict(
        told
    )
    layers, names = lora_layers(pipe), adapter_names(pipe)
    with _kept(layers):
        activate(
            pipe, [name for name in names if any(_works(each[name]) for each in factors)], layers
        )
        embeddings = _encoded(pipe, layers, cells, factors, call)
        _scale_samples(pipe, layers["unet"], factors, 2 if is_guided(pipe, call) else 1)
        call.pop("clip_skip", None)
        generators = [torch.Generator("cpu").manual_seed(cell.call["seed"]) for cell in cells]
        with without_progress_bar(pipe):
            return pipe(
                **embeddings,
                **call,
                generator=generators,
                callback_on_step_end=_after_step(stepped),
            ).images


def generate_image(pipe, *, seed: int, **call):
    """One image by an ordinary call of the pipeline, from the noise of this seed, without a progress bar."""
    with lock_of(pipe), without_progress_bar(pipe):
        return pipe(**call, generator=torch.Generator("cpu").manual_seed(seed)).images[0]


def draw_alone(pipe, cell: Cell, factors: Factors, told: Mapping[str, object]):
    """The picture of a cell by an ordinary call of any pipeline."""
    call = {key: value for key, value in cell.call.items() if key not in ("seed", "scheduler")}
    layers = lora_layers(pipe)
    with _kept(layers), without_progress_bar(pipe):
        for name, parts in factors.items():
            for part, found in parts.items():
                for module, factor in found.items():
                    write_scale(layers[part][module], name, factor)
        activate(pipe, [name for name in adapter_names(pipe) if _works(factors[name])], layers)
        call |= told
        call |= prompt_arguments(pipe, call.pop("prompt"), call.pop("negative_prompt", None), call)
        return pipe(**call, generator=torch.Generator("cpu").manual_seed(cell.call["seed"])).images[
            0
        ]


@contextmanager
def _kept(layers: LoraLayers) -> Iterator[None]:
    """Put the very scalings back: a compiled model holds on to them."""
    before = [(layer, dict(layer.scaling)) for found in layers.values() for layer in found.values()]
    inside = [
        (value, value.clone())
        for _, scaling in before
        for value in scaling.values()
        if isinstance(value, Tensor)
    ]
    try:
        yield
    finally:
        for layer, scaling in before:
            layer.scaling.update(scaling)
        for value, number in inside:
            value.copy_(number)


def _works(parts: Mapping[str, Mapping[str, float]]) -> bool:
    return any(factor for layers in parts.values() for factor in layers.values())


def _scale_samples(
    pipe, layers: Mapping[str, LoraLayer], factors: Sequence[Factors], repeat: int
) -> None:
    """One number for each sample where they differ, as a tensor that fits the layer's output."""
    made: dict[tuple, Tensor] = {}
    device = pipe._execution_device
    for module, layer in layers.items():
        for name in layer.scaling:
            numbers = tuple(each[name]["unet"][module] for each in factors)
            if len(set(numbers)) == 1:
                write_scale(layer, name, numbers[0])
                continue
            trained, weight = trained_scaling(layer, name), layer.lora_B[name].weight
            key = numbers, trained, weight.dtype, _dimensions(module, layer)
            if key not in made:
                column = (
                    torch.tensor(numbers * repeat, device=device, dtype=torch.float32) * trained
                )
                made[key] = column.to(weight.dtype).view(-1, *[1] * (key[3] - 1))
            layer.scaling[name] = made[key]


def _dimensions(module: str, layer: LoraLayer) -> int:
    """Of a layer's output: (batch, channels, height, width), (batch, tokens, width), or (batch, width) for the time."""
    if isinstance(layer.get_base_layer(), nn.Conv2d):
        return 4
    return 3 if ".attentions." in module else 2


def _encoded(
    pipe,
    layers: LoraLayers,
    cells: Sequence[Cell],
    factors: Sequence[Factors],
    call: Mapping[str, object],
) -> dict[str, Tensor]:
    """The prompts' embeddings, each prompt encoded once at each setting of the text encoders' scales."""
    encoders = {part: found for part, found in layers.items() if part.startswith("text_encoder")}
    made: dict[tuple, dict[str, Tensor]] = {}
    rows = []
    for cell, each in zip(cells, factors, strict=True):
        scales = tuple(
            (part, module, name, each[name][part][module])
            for part, found in encoders.items()
            for module, layer in found.items()
            for name in layer.scaling
        )
        key = cell.call["prompt"], cell.call.get("negative_prompt"), scales
        if key not in made:
            for part, module, name, factor in scales:
                write_scale(encoders[part][module], name, factor)
            made[key] = prompt_arguments(pipe, *key[:2], call)
        rows.append(made[key])
    return {name: torch.cat([row[name] for row in rows]) for name in rows[0]}


def _after_step(stepped: Callable[[], None] | None):
    def after(pipe, step, timestep, values):
        if stepped:
            stepped()
        return values

    return after
