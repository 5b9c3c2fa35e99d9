"""As many images in one denoising pass as settings and memory allow.

A LoRA layer adds `output × scaling`. A scaling with one number for each sample of the batch gives
every sample its own.
"""

import inspect
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
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
from lorabook.live.scales import set_steps, steps_on
from lorabook.live.state import lock_of, preserve_scales
from lorabook.live.upstream import is_compiled, is_out_of_memory
from lorabook.schedulers import scheduler_like
from lorabook.sweeps.cells import SWEEP_ADAPTER, Cell, LayerScales, Present
from lorabook.upstream import execution_device, without_progress_bar

AT_ONCE = 8 * 64 * 64  # places of latents in the first pass: eight images of 512 pixels
# What each image of a pass has of its own, and what is set on the pipeline before one.
_OWN, _ON_PIPELINE = {"prompt", "negative_prompt", "seed"}, {"scheduler"}
# Arguments that hold for a batch as for an image; others are left to ordinary calls.
_SHARED = {"height", "width", "eta", "guidance_rescale", "cross_attention_kwargs", "clip_skip"}


def generate_image(pipe: DiffusionPipeline, *, seed: int, **call) -> Image.Image:
    """One image by an ordinary call, from the noise of this seed, without a progress bar."""
    with lock_of(pipe), without_progress_bar(pipe):
        return pipe(**call, generator=_generator(seed)).images[0]


@dataclass(frozen=True)
class Passes:
    """Generates the cells of a sweep, as many in one denoising pass as fit.

    Attributes:
        pipe: The pipeline.
        present: The adapters on it before the sweep.
        call: Further arguments of the pipeline's call.
        on_steps: Gets how many steps of how many images were taken, multiplied.
        encoded: Embeddings of prompts, kept from pass to pass.
    """

    pipe: DiffusionPipeline
    present: Present
    call: Mapping[str, object]
    on_steps: Callable[[int], None] = lambda count: None
    encoded: dict[tuple, dict[str, Tensor]] = field(default_factory=dict)

    @property
    def can_batch(self) -> bool:
        """Whether images share passes: those of Stable Diffusion and SDXL, not compiled, do."""
        return (
            type(self.pipe) in (StableDiffusionPipeline, StableDiffusionXLPipeline)
            and not is_compiled(self.pipe.unet)
            and not self.call.keys() - _SHARED - {"output_type"}
        )

    def generate(
        self, cells: Mapping[int, Cell], on_images: Callable[[dict[int, Image.Image]], None]
    ) -> None:
        """Generate cells in as few passes as fit; `on_images` gets each pass's, by number."""
        size = self._first_size() if self.can_batch else 1
        groups: dict[Hashable, list[int]] = {}
        for number, cell in cells.items():
            groups.setdefault(self._group_of(cell), []).append(number)
        for waiting in groups.values():
            with preserve_scales(self.pipe), _prepared(self.pipe, cells[waiting[0]], self.present):
                while waiting:
                    now = waiting[:size]
                    try:
                        images = self.generate_pass([cells[number] for number in now])
                    except (RuntimeError, MemoryError) as error:
                        if len(now) == 1 or not is_out_of_memory(error):
                            raise
                        size = len(now) // 2
                        torch.cuda.empty_cache()
                        continue
                    on_images(dict(zip(now, images, strict=True)))
                    waiting = waiting[len(now) :]

    def generate_pass(self, cells: Sequence[Cell]) -> list[Image.Image]:
        """One image for each cell of a group, each as by an ordinary call; its scales stay."""
        pipe, layers = self.pipe, lora_layers(self.pipe)
        scales = [self.present.scales_in(layers, cell) for cell in cells]
        names = adapter_names(pipe, layers)
        active = [name for name in names if any(any(each[name].values()) for each in scales)]
        activate(pipe, active, layers)
        if not self.can_batch:
            return [self._generate_alone(cells[0], scales[0], layers)]
        call = _arguments(cells[0]) | self.call
        embeddings = self._embeddings(cells, scales, layers, call)
        _write_sample_scales(pipe, layers["unet"], scales, 2 if is_guided(pipe, call) else 1)
        call.pop("clip_skip", None)
        call["generator"] = [_generator(cell.call["seed"]) for cell in cells]
        call["callback_on_step_end"] = self._counting(len(cells))
        with without_progress_bar(pipe):
            return pipe(**embeddings, **call).images

    def _generate_alone(self, cell: Cell, scales: Mapping, layers: LoraLayers) -> Image.Image:
        """The image of a cell by an ordinary call of any pipeline."""
        _write_scales(layers, scales)
        call = _arguments(cell) | self.call
        prompts = cell.call["prompt"], cell.call.get("negative_prompt")
        call |= prompt_arguments(self.pipe, *prompts, call)
        if "callback_on_step_end" in inspect.signature(type(self.pipe).__call__).parameters:
            call.setdefault("callback_on_step_end", self._counting(1))
        return generate_image(self.pipe, seed=cell.call["seed"], **call)

    def _counting(self, count: int) -> Callable:
        """A callback that counts each step of so many images."""

        def after_step(*arguments):
            self.on_steps(count)
            return arguments[-1]

        return after_step

    def _embeddings(
        self, cells: Sequence[Cell], scales: Sequence, layers: LoraLayers, call: Mapping
    ) -> dict[str, Tensor]:
        """The prompts', each encoded once at each setting of the text encoders' scales."""
        rows = []
        for cell, adapters in zip(cells, scales, strict=True):
            text_scales = {
                name: {key: one for key, one in named.items() if key[0].startswith("text_encoder")}
                for name, named in adapters.items()
            }
            prompts = cell.call["prompt"], cell.call.get("negative_prompt")
            is_guided_call = is_guided(self.pipe, call)
            key = *prompts, repr(text_scales), is_guided_call, self._adapters_of(cell)
            if key not in self.encoded:
                _write_scales(layers, text_scales)
                self.encoded[key] = prompt_arguments(self.pipe, *prompts, call)
            rows.append(self.encoded[key])
        return {name: torch.cat([row[name] for row in rows]) for name in rows[0]}

    def _first_size(self) -> int:
        """How many images to begin with."""
        latents = 1
        for side in ("height", "width"):
            pixels, unet = self.call.get(side), self.pipe.unet
            latents *= pixels // self.pipe.vae_scale_factor if pixels else unet.config.sample_size
        return max(1, AT_ONCE // max(latents, 1))

    def _group_of(self, cell: Cell) -> Hashable:
        """What the cells of one pass have in common."""
        prompts = cell.call["prompt"], cell.call["negative_prompt"]
        return (
            repr({key: value for key, value in cell.call.items() if key not in _OWN}),
            chunks_of(self.pipe, *prompts, cell.call | self.call),
            self._adapters_of(cell),
            repr(self.present.schedule_in(cell)),
        )

    def _adapters_of(self, cell: Cell) -> Hashable:
        """Which adapters a cell puts on the pipeline; those of two cells may share a name."""
        source = None if cell.source is None else id(cell.source)
        return source, cell.method, repr(self.present.weights(cell))


def _arguments(cell: Cell) -> dict[str, object]:
    """The arguments of the pipeline's call that all cells of a pass have in common."""
    return {key: value for key, value in cell.call.items() if key not in _OWN | _ON_PIPELINE}


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
