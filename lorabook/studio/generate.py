"""Settings on a pipeline, and their pictures."""

import copy
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache

import torch
from PIL import Image

from lorabook.live.layers import (
    activate,
    active_adapters,
    adapter_names,
    base_weight,
    denoiser,
    layers_of,
    models_of,
    read_scale,
    walk,
)
from lorabook.live.merged_weights import Room, folded
from lorabook.live.state import lock_of
from lorabook.live.upstream import is_out_of_memory
from lorabook.pipelines import world_of
from lorabook.schedulers import scheduler_like
from lorabook.studio.apply import BLEND, Applied
from lorabook.studio.drawable import check_drawable
from lorabook.studio.from_scales import nearest_settings
from lorabook.studio.prompt_encoding import Encoder
from lorabook.studio.settings import StudioSettings
from lorabook.worlds import BUNDLED

STEPS = 4  # the bundled model's pictures look as with 30 already: benchmarks/studio.py
_PREVIEW, _MOST_BASES = (
    {True: 2, False: 5},
    4,
)  # steps of a preview, of the bundled model and of others; base pictures kept


class Stopped(Exception):
    """A run was stopped because newer settings wait."""


@dataclass(frozen=True)
class Painted:
    """Pictures of some settings.

    Attributes:
        settings: what they show.
        images: one for each seed.
        base: the base model's, one for each seed; None where the settings do not compare.
        seconds: how long it took.
        preview: whether they were drawn in few steps.
    """

    settings: StudioSettings
    images: list[Image.Image]
    base: list[Image.Image] | None
    seconds: float
    preview: bool


def settings_of(pipe, prompt: str | None = None, **changes) -> StudioSettings:
    """Settings to begin with: the pipeline's adapters as they are now, and what suits the model.

    Args:
        prompt: None takes one that the model knows.
        **changes: further fields of StudioSettings.
    """
    world, active = world_of(pipe), active_adapters(pipe)
    adapters = {}
    for name in adapter_names(pipe):
        if name != BLEND:
            factors = {
                part: {module: read_scale(layer, name) for module, layer in found.items()}
                for part, found in layers_of(pipe, name).items()
            }
            at_zero = not any(value for found in factors.values() for value in found.values())
            adapters[name] = nearest_settings(factors, on=name in active or at_zero)
    told = {
        "prompt": world.adapter_prompt if prompt is None else prompt,
        "adapters": adapters,
        "num_inference_steps": STEPS if world is BUNDLED else world.num_inference_steps,
        "guidance_scale": world.guidance_scale,
    }
    return StudioSettings(**told | changes)


def size_of(pipe, settings: StudioSettings) -> dict[str, int]:
    """Width and height for the pipeline's call: both or none, since it takes no notice of one alone."""
    if settings.width is None and settings.height is None:
        return {}
    return {"width": settings.width or side_of(pipe), "height": settings.height or side_of(pipe)}


def side_of(pipe) -> int:
    """The pixels across of the pictures that a model draws by itself."""
    side = getattr(denoiser(pipe).config, "sample_size", None)
    return (side if isinstance(side, int) else 64) * pipe.vae_scale_factor


class Painter:
    """Applies settings to a pipeline and draws them.

    The pipeline's adapters then really are as the settings say, so that an ordinary call draws the same. All else of it
    is left alone: the call is made on a shallow copy with a scheduler of its own.
    """

    def __init__(self, pipe):
        self.pipe = pipe
        check_drawable(pipe)
        self._applied, self._encoder = Applied(pipe), Encoder()
        self._room: Room = {}
        self._bases: dict[tuple, list[Image.Image]] = {}

    def paint(
        self,
        settings: StudioSettings,
        *,
        preview: bool = False,
        stopped: Callable[[], bool] = lambda: False,
    ) -> Painted:
        """Put the settings on the pipeline and draw them.

        Args:
            preview: draw in few steps.
            stopped: asked before each step whether to give up.
        Raises: Stopped; ValueError in one sentence for settings that do not fit the pipeline.
        """
        with lock_of(self.pipe):
            start = time.perf_counter()
            check_drawable(self.pipe)
            steps = (
                min(settings.num_inference_steps, _PREVIEW[world_of(self.pipe) is BUNDLED])
                if preview
                else (settings.num_inference_steps)
            )
            self.apply(settings)
            base = self._base(settings, steps, stopped) if settings.compare else None
            images = self._drawn(settings, steps, stopped)
            if steps == settings.num_inference_steps:
                self._room.clear()  # a drag has come to rest; the next one makes it anew
            return Painted(
                settings,
                images,
                base,
                time.perf_counter() - start,
                steps < settings.num_inference_steps,
            )

    def apply(self, settings: StudioSettings) -> None:
        """Put the settings on the pipeline without drawing: scales, ranks, blends."""
        with lock_of(self.pipe):
            self._applied.apply(settings)

    def largest_rank(self, name: str) -> int:
        """The largest rank that an adapter has as trained; known at once after the first time."""
        return self._applied.ranks.largest(name)

    def energy_kept(self, name: str, rank: int) -> float:
        """The share of an adapter's ‖ΔW‖² that is left at a rank, 0 to 1; known at once after the first time."""
        return self._applied.ranks.energy(name, rank)

    def forget(self, name: str) -> None:
        """Say that another adapter has this name now, or that it was removed."""
        with lock_of(self.pipe):
            self._applied.ranks.forget(name)

    def close(self) -> None:
        """Take blends and smaller ranks back; scales stay as they are."""
        with lock_of(self.pipe):
            self._applied.close()
            self._room.clear()
            self._bases.clear()

    def _base(
        self, settings: StudioSettings, steps: int, stopped: Callable[[], bool]
    ) -> list[Image.Image]:
        key = _base_key(self.pipe, settings, steps)
        if key not in self._bases:
            with _without_adapters(self.pipe):
                drawn = self._drawn(settings, steps, stopped)
            while len(self._bases) >= _MOST_BASES:
                self._bases.pop(next(iter(self._bases)))
            self._bases[key] = drawn
        return self._bases[key]

    def _drawn(
        self, settings: StudioSettings, steps: int, stopped: Callable[[], bool]
    ) -> list[Image.Image]:
        pipe = _own_copy(self.pipe, settings.scheduler)
        told = {
            "num_inference_steps": steps,
            "guidance_scale": settings.guidance_scale,
            **self._encoder(
                pipe, settings.prompt, settings.negative_prompt, settings.guidance_scale
            ),
            **size_of(self.pipe, settings),
        }
        try:
            with folded(pipe, components=("unet", "transformer"), room=self._room):
                return _called(pipe, told, settings.seeds, stopped)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
        self._room.clear()
        return _in_parts(pipe, told, settings.seeds, stopped)


def _in_parts(
    pipe, told: Mapping, seeds: Sequence[int], stopped: Callable[[], bool]
) -> list[Image.Image]:
    """A picture for each seed in one batch; in two where the memory is too small for it."""
    try:
        return _called(pipe, told, seeds, stopped)
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        if len(seeds) == 1:
            raise ValueError(
                "the picture does not fit into the memory; choose a smaller size"
            ) from None
    half = len(seeds) // 2
    return [
        image
        for some in (seeds[:half], seeds[half:])
        for image in _in_parts(pipe, told, some, stopped)
    ]


def _called(
    pipe, told: Mapping, seeds: Sequence[int], stopped: Callable[[], bool]
) -> list[Image.Image]:
    """A picture for each seed in one batch."""

    def step_ended(*_):
        if stopped():
            raise Stopped
        return {}

    step_ended()
    generators = [torch.Generator("cpu").manual_seed(seed) for seed in seeds]
    return pipe(
        **told,
        num_images_per_prompt=len(seeds),
        generator=generators,
        callback_on_step_end=step_ended,
    ).images


def _own_copy(pipe, scheduler: str | None):
    """The pipeline with the same models, a scheduler of its own and no progress bar."""
    own = copy.copy(pipe)
    if not any(
        hasattr(model, "_hf_hook") or hasattr(model, "_diffusers_hook")
        for model in models_of(pipe).values()
    ):
        own.__class__ = _with_known_device(type(pipe))
        own.known_device = next(next(iter(models_of(pipe).values())).parameters()).device
    own.scheduler = (
        copy.deepcopy(pipe.scheduler)
        if scheduler is None
        else scheduler_like(pipe.scheduler.config, scheduler)
    )
    own.set_progress_bar_config(disable=True)
    return own


@lru_cache
def _with_known_device(kind: type) -> type:
    """A pipeline's class that does not walk over all modules, five times a call, to learn where they are."""
    return type(
        kind.__name__, (kind,), {"_execution_device": property(lambda self: self.known_device)}
    )


@contextmanager
def _without_adapters(pipe):
    before = active_adapters(pipe)
    activate(pipe, [])
    try:
        yield
    finally:
        activate(pipe, before)


def _base_key(pipe, settings: StudioSettings, steps: int) -> tuple:
    """All that decides the base model's pictures; fusing and the like write into its weights."""
    said = settings.with_(adapters={}, num_inference_steps=steps, blend_method=None).to_dict()
    weights = [
        (id(model), sum(base_weight(layer)._version for _, layer in walk(model)))
        for model in models_of(pipe).values()
    ]
    return repr(said), repr(weights), type(pipe.scheduler), repr(pipe.scheduler.config)
