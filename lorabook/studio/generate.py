"""Settings on a pipeline, and their images."""

import copy
import time
from collections.abc import Callable
from dataclasses import dataclass

from diffusers import DiffusionPipeline
from PIL import Image, ImageChops

from lorabook.live.generate import check_prompt
from lorabook.live.layers import activate, base_weight, denoiser, lora_layers, models_of, walk
from lorabook.live.manage import disable_adapters
from lorabook.live.merged_weights import Room, folded
from lorabook.live.scales import set_scales
from lorabook.live.state import check_known, lock_of, preserve_scales
from lorabook.live.upstream import TEXT_ENCODERS, is_out_of_memory
from lorabook.pipelines import world_of
from lorabook.show.display import bundle, png_of
from lorabook.show.grid import ImageGrid
from lorabook.studio.adapters import check_supported, present_settings
from lorabook.studio.settings import StudioSettings
from lorabook.sweeps.batched import Passes
from lorabook.sweeps.cells import Cell, Present
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
    def grid(self) -> ImageGrid:
        """All that is shown, labelled: a row for each seed where it is compared with the base."""
        seeds = [f"seed {seed}" for seed in self.settings.seeds]
        title = self.settings.prompt
        if self.base is None:
            return ImageGrid([self.images], columns=seeds, title=title)
        rows = [list(row.values()) for row in self.rows]
        return ImageGrid(rows, columns=list(self.rows[0]), rows=seeds, title=title)

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
        alt = f"{self.settings.prompt}: {self.settings.in_words()}"
        return bundle(png_of(self.picture), alt)


def first_settings(pipe: DiffusionPipeline, prompt: str | None = None, **changes) -> StudioSettings:
    """Settings to begin with: the pipeline's adapters as they are, and what suits the model."""
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
    """The two prompts, None for no negative one; adapters in them are refused, having sliders."""
    prompt = check_prompt(settings.prompt, "prompt", _INSTEAD)
    return prompt, check_prompt(settings.negative_prompt, "negative_prompt", _INSTEAD) or None


class StudioGenerator:
    """Puts settings on a pipeline and generates their images.

    The pipeline's adapters are then as the settings say, so that an ordinary call generates the
    same. All else of it is left alone: the call is that of a shallow copy with its own scheduler.
    """

    def __init__(self, pipe: DiffusionPipeline):
        """Raise ValueError for a pipeline that cannot be used."""
        check_supported(pipe)
        self.pipe = pipe
        self._room: Room = {}
        self._weights: list[int] = []  # of which these are
        self._encoded: dict = {}
        self._bases: dict[str, list[Image.Image]] = {}

    def generate(
        self,
        settings: StudioSettings,
        *,
        preview: bool = False,
        stopped: Callable[[], bool] = lambda: False,
    ) -> StudioImages:
        """Put the settings on the pipeline and generate their images, as a preview in few steps.

        Raises:
            Stopped: Where `stopped`, which is asked before each step, said so.
            ValueError: In one sentence, for settings that do not fit the pipeline.
        """
        with lock_of(self.pipe):
            start, steps = time.perf_counter(), settings.num_inference_steps
            check_supported(self.pipe)
            if preview:
                steps = min(steps, _PREVIEW_STEPS[world_of(self.pipe) is BUNDLED])
            call = settings.with_(num_inference_steps=steps)
            self.apply(settings)
            self._forget_stale()
            base = self._base_images(call, stopped) if settings.compare else None
            images = self._images(call, stopped)
            is_preview = steps < settings.num_inference_steps
            if not is_preview:
                self._room.clear()  # a drag has come to rest; the next one fills it anew
            return StudioImages(settings, images, base, time.perf_counter() - start, is_preview)

    def apply(self, settings: StudioSettings) -> None:
        """Let the adapters be as the settings say; those that they do not name stay as they are."""
        with lock_of(self.pipe):
            check_known(self.pipe, settings.adapters)
            components = models_of(self.pipe)
            active = {name: one for name, one in settings.adapters.items() if one.on}
            set_scales(self.pipe, {name: one.scales(components) for name, one in active.items()})
            if off := settings.adapters.keys() - active.keys():
                disable_adapters(self.pipe, off)

    def _base_images(self, call: StudioSettings, stopped: Callable[[], bool]) -> list[Image.Image]:
        """The images without adapters; the same ones again as long as nothing else changes."""
        key = repr((call.with_(adapters={}), self.pipe.scheduler))
        if key not in self._bases:
            with preserve_scales(self.pipe):
                activate(self.pipe, [])
                self._bases[key] = self._images(call, stopped)
        return self._bases[key]

    def _images(self, call: StudioSettings, stopped: Callable[[], bool]) -> list[Image.Image]:
        """An image for each seed, in as few passes as fit into the memory."""
        pipe = copy.copy(self.pipe)
        pipe.scheduler = copy.deepcopy(pipe.scheduler)
        prompt, negative_prompt = read_prompts(call)
        fixed = {
            "prompt": prompt,
            "negative_prompt": negative_prompt,
            "num_inference_steps": call.num_inference_steps,
            "guidance_scale": call.guidance_scale,
            "scheduler": call.scheduler,
        }
        cells = {n: Cell(fixed | {"seed": seed}) for n, seed in enumerate(call.seeds)}
        images: dict[int, Image.Image] = {}

        def check(_: int = 0) -> None:
            if stopped():
                raise Stopped

        check()
        passes = Passes(pipe, Present.of(pipe), size_of(pipe, call), check, self._encoded)
        try:
            with folded(pipe, components=("unet", "transformer"), room=self._room):
                passes.generate(cells, images.update)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            reason = "the picture does not fit into the memory; choose a smaller size"
            raise ValueError(reason) from None
        return [images[number] for number in cells]

    def _forget_stale(self) -> None:
        """Forget what was made of other weights, since fusing and training write into them."""
        weights = [len(self.pipe.tokenizer)]
        for model in models_of(self.pipe).values():
            weights += [id(model), sum(version_of(base_weight(layer)) for _, layer in walk(model))]
        if weights != self._weights or len(self._bases) > _MOST_RECENT:
            self._weights = weights
            self._bases.clear()
            self._encoded.clear()
        layers = lora_layers(self.pipe)
        if len(self._encoded) > _MOST_RECENT or any(layers.get(name) for name in TEXT_ENCODERS):
            self._encoded.clear()
