"""Settings on a pipeline, and their images."""

import copy
import io
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

import torch
from diffusers import DiffusionPipeline
from PIL import Image, ImageChops

from lorabook.live.blend import blend
from lorabook.live.generate import check_prompt, prompt_arguments, takes_embeddings
from lorabook.live.layers import (
    activate,
    adapter_names,
    base_weight,
    denoiser,
    lora_layers,
    models_of,
    walk,
)
from lorabook.live.manage import disable_adapters, remove_adapter
from lorabook.live.merged_weights import Room, folded
from lorabook.live.scales import set_scales
from lorabook.live.state import check_known, lock_of, preserve_scales
from lorabook.live.upstream import is_out_of_memory
from lorabook.pipelines import world_of
from lorabook.schedulers import scheduler_like
from lorabook.show.display import bundle
from lorabook.studio.adapters import BLEND, Ranks, check_supported, present_settings
from lorabook.studio.settings import StudioSettings
from lorabook.upstream import version_of
from lorabook.worlds import BUNDLED

_MOST_RECENT = 8
STEPS = 4  # the bundled model's images look as with 30 already: benchmarks/studio.py
BASE, NOW, DIFFERENCE = "base", "now", "difference"
_PREVIEW_STEPS = {True: 2, False: 5}  # of the bundled model, and of others
_INSTEAD = "load {name!r} from the shelf or by studio.load(file), and set its slider to {weight}"


class Stopped(Exception):
    """A run was stopped because newer settings wait."""


@dataclass(frozen=True)
class StudioImages:
    """The images of some settings.

    Attributes:
        settings: What they show.
        images: One for each seed.
        base: The base model's, one for each seed; None where the settings do not compare.
        seconds: How long they took.
        preview: Whether they were made in few steps.
    """

    settings: StudioSettings
    images: list[Image.Image]
    base: list[Image.Image] | None
    seconds: float
    preview: bool

    @property
    def picture(self) -> Image.Image:
        """The first of the images."""
        return self.images[0]

    @property
    def rows(self) -> list[dict[str, Image.Image]]:
        """For each seed the images that are shown, by what they are, from left to right."""
        if self.base is None:
            return [{NOW: image} for image in self.images]
        pairs = [
            (base.convert("RGB"), image.convert("RGB"))
            for base, image in zip(self.base, self.images, strict=True)
        ]
        return [{BASE: b, NOW: n, DIFFERENCE: ImageChops.difference(b, n)} for b, n in pairs]

    def _repr_mimebundle_(self, include=None, exclude=None) -> tuple[dict, dict]:
        encoded = io.BytesIO()
        self.picture.save(encoded, "PNG")
        return bundle(encoded.getvalue(), f"{self.settings.prompt}: {self.settings.in_words()}")


def first_settings(pipe: DiffusionPipeline, prompt: str | None = None, **changes) -> StudioSettings:
    """Settings to begin with: the pipeline's adapters as they are, and what suits the model.

    Args:
        prompt: None takes one that the model knows.
        **changes: Further fields of StudioSettings.
    """
    world = world_of(pipe)
    fields = {
        "prompt": world.adapter_prompt if prompt is None else prompt,
        "adapters": present_settings(pipe),
        "num_inference_steps": STEPS if world is BUNDLED else world.num_inference_steps,
        "guidance_scale": world.guidance_scale,
    }
    return StudioSettings(**fields | changes)


def side_of(pipe: DiffusionPipeline) -> int:
    """The pixels across of the images that a model makes by itself."""
    side = getattr(denoiser(pipe).config, "sample_size", None)
    return (side if isinstance(side, int) else 64) * pipe.vae_scale_factor


def size_of(pipe: DiffusionPipeline, settings: StudioSettings) -> dict[str, int]:
    """Width and height for the pipeline's call: both or none, since it ignores one alone."""
    if settings.width is None and settings.height is None:
        return {}
    return {"width": settings.width or side_of(pipe), "height": settings.height or side_of(pipe)}


def read_prompts(settings: StudioSettings) -> tuple[str, str | None]:
    """The two prompts, None for no negative one.

    Raises:
        ValueError: For what `generate` cannot read, and for adapters, which have sliders.
    """
    prompt = check_prompt(settings.prompt, "prompt", _INSTEAD)
    return prompt, check_prompt(settings.negative_prompt, "negative_prompt", _INSTEAD) or None


class StudioGenerator:
    """Puts settings on a pipeline and generates their images.

    The pipeline's adapters are then as the settings say, so that an ordinary call generates the
    same. All else of it is left alone: the call is that of a shallow copy with its own scheduler.

    Attributes:
        pipe: The pipeline.
        ranks: What the adapters are cut to.
    """

    def __init__(self, pipe: DiffusionPipeline):
        """Raise ValueError for a pipeline that cannot be used."""
        check_supported(pipe)
        self.pipe, self.ranks = pipe, Ranks(pipe)
        self._blended: tuple = ()  # method, scales and ranks of the blend that is on the pipeline
        self._room: Room = {}
        self._recent: dict[object, object] = {}  # embeddings of prompts, images of the base model

    def generate(
        self,
        settings: StudioSettings,
        *,
        preview: bool = False,
        stopped: Callable[[], bool] = lambda: False,
    ) -> StudioImages:
        """Put the settings on the pipeline and generate their images.

        Args:
            settings: What to show.
            preview: Take few steps.
            stopped: Asked before each step whether to give up.

        Raises:
            Stopped: Where `stopped` said so.
            ValueError: In one sentence, for settings that do not fit the pipeline.
        """
        with lock_of(self.pipe):
            start, full = time.perf_counter(), settings.num_inference_steps
            check_supported(self.pipe)
            limit = _PREVIEW_STEPS[world_of(self.pipe) is BUNDLED] if preview else full
            steps, base = min(full, limit), None
            self.apply(settings)
            if settings.compare:
                call = settings.with_(adapters={}, num_inference_steps=steps, blend_method=None)
                key = repr((call, self.pipe.scheduler)), self._weights()
                base = self._once(key, lambda: self._without_adapters(settings, steps, stopped))
            images = self._images(settings, steps, stopped)
            if steps == full:
                self._room.clear()  # a drag has come to rest; the next one fills it anew
            seconds = time.perf_counter() - start
            return StudioImages(settings, images, base, seconds, steps < full)

    def apply(self, settings: StudioSettings) -> None:
        """Let the adapters be as the settings say; those that they do not name stay as they are.

        Raises:
            ValueError: For an adapter or a block that the pipeline lacks, or an unknown method.
        """
        with lock_of(self.pipe):
            check_known(self.pipe, settings.adapters)
            active = {name: adapter for name, adapter in settings.adapters.items() if adapter.on}
            scales = {name: one.scales(models_of(self.pipe)) for name, one in active.items()}
            method, wanted = settings.blend_method, ()
            if method not in (None, "cat") and active:
                wanted = (method, scales, [adapter.rank for adapter in active.values()])
            if wanted != self._blended:
                self._remove_blend()
            for name, adapter in settings.adapters.items():
                self.ranks.cut(name, adapter.rank)
            set_scales(self.pipe, scales)
            if wanted and BLEND not in adapter_names(self.pipe):
                blend(self.pipe, scales, method=method, new_name=BLEND, across_bases=True)
                self._blended = wanted
            off = [name for name in settings.adapters if wanted or name not in active]
            disable_adapters(self.pipe, off)

    def close(self) -> None:
        """Take blends and smaller ranks back; scales stay, and what was blended is active."""
        with lock_of(self.pipe):
            scales = dict(self._blended[1]) if self._blended else {}
            self._remove_blend()
            self.ranks.close()
            names = adapter_names(self.pipe)
            set_scales(self.pipe, {n: s for n, s in scales.items() if n in names})
            self._room.clear()
            self._recent.clear()

    def _remove_blend(self) -> None:
        self._blended = ()
        if BLEND in adapter_names(self.pipe):
            remove_adapter(self.pipe, BLEND)

    def _without_adapters(self, *run) -> list[Image.Image]:
        with preserve_scales(self.pipe):
            activate(self.pipe, [])
            return self._images(*run)

    def _images(
        self, settings: StudioSettings, steps: int, stopped: Callable[[], bool]
    ) -> list[Image.Image]:
        """An image for each seed: in one batch, or in smaller ones where the memory is short."""
        pipe = copy.copy(self.pipe)
        pipe.scheduler = copy.deepcopy(pipe.scheduler)
        if settings.scheduler:
            pipe.scheduler = scheduler_like(pipe.scheduler.config, settings.scheduler)
        pipe.set_progress_bar_config(disable=True)
        arguments = {
            "num_inference_steps": steps,
            "guidance_scale": settings.guidance_scale,
            **self._prompt_arguments(pipe, settings),
            **size_of(self.pipe, settings),
        }

        def check(*_) -> dict:
            if stopped():
                raise Stopped
            return {}

        seeds, count = settings.seeds, len(settings.seeds)
        while True:
            images: list[Image.Image] = []
            try:
                with folded(pipe, components=("unet", "transformer"), room=self._room):
                    while len(images) < len(seeds):
                        check()
                        some = seeds[len(images) : len(images) + count]
                        images += pipe(
                            **arguments,
                            num_images_per_prompt=len(some),
                            generator=[torch.Generator("cpu").manual_seed(seed) for seed in some],
                            callback_on_step_end=check,
                        ).images
                return images
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
                if count == 1:
                    reason = "the picture does not fit into the memory; choose a smaller size"
                    raise ValueError(reason) from None
                count = -(-count // 2)

    def _prompt_arguments(self, pipe: DiffusionPipeline, settings: StudioSettings) -> Mapping:
        """The prompts for the pipeline's call: embeddings, or texts where it takes those only."""
        prompts, call = read_prompts(settings), {"guidance_scale": settings.guidance_scale}
        encode = partial(prompt_arguments, pipe, *prompts, call)
        layers = [
            layer
            for component, modules in lora_layers(pipe).items()
            for layer in modules.values()
            if component.startswith("text_encoder")
        ]
        has_adapters = any(layer.scaling.keys() & set(layer.active_adapters) for layer in layers)
        if has_adapters or not takes_embeddings(pipe, call):
            return encode()
        is_guided = settings.guidance_scale > 1
        return self._once((prompts, is_guided, len(pipe.tokenizer), self._weights()), encode)

    def _weights(self) -> tuple:
        """The base model's weights, as a key: fusing and training write into them."""
        models = models_of(self.pipe).values()
        return tuple((id(m), sum(version_of(base_weight(w)) for _, w in walk(m))) for m in models)

    def _once(self, key: object, compute: Callable):
        """What was computed for this key, where that was lately."""
        if key not in self._recent:
            while len(self._recent) >= _MOST_RECENT:
                del self._recent[next(iter(self._recent))]
            self._recent[key] = compute()
        return self._recent[key]
