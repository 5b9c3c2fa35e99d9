"""What lorabook keeps on a model: one attribute, `model.lorabook`; and the lock of a pipeline."""

import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import wraps
from threading import Lock, RLock
from typing import Any

from diffusers import DiffusionPipeline
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from lorabook.checks import listed
from lorabook.live.layers import (
    LoraLayers,
    activate,
    active_adapters,
    adapter_names,
    denoiser,
    flat,
    lora_layers,
    models_of,
    trained_scaling,
    write_scale,
)
from lorabook.live.upstream import (
    TEXT_ENCODERS,
    LoraLayer,
    Scaling,
    hook_calls,
    restore_scalings,
    scalings_of,
)
from lorabook.lora.adapter import Adapter


class PipelineLock:
    """A lock that its owner may take again; whoever lets it go comes after those who wait."""

    def __init__(self):
        self._next, self._lock = Lock(), RLock()  # an RLock alone does not promise the order

    def acquire(self, timeout: float = -1) -> bool:
        """Whether the lock came within `timeout` seconds; −1 is for ever."""
        if self.is_mine():
            return self._lock.acquire()
        if not self._next.acquire(timeout=timeout):
            return False
        try:
            return self._lock.acquire(timeout=timeout)
        finally:
            self._next.release()

    def release(self) -> None:
        """Let the lock go, once for each time it was taken."""
        self._lock.release()

    def is_mine(self) -> bool:
        """Whether the calling thread has the lock."""
        return self._lock._is_owned()

    def __enter__(self):
        self.acquire()

    def __exit__(self, *_):
        self.release()

    def __reduce__(self):
        return PipelineLock, ()  # a copy of a model has a lock of its own


class PipelineRef:
    """A weak reference to a pipeline; its copy refers to the copy, a pickle to none."""

    def __init__(self, pipe: DiffusionPipeline | None = None):
        self._ref = None if pipe is None else weakref.ref(pipe)

    def __call__(self) -> DiffusionPipeline | None:
        return self._ref and self._ref()

    def __deepcopy__(self, memo: dict):
        pipe = self()
        return PipelineRef(memo.get(id(pipe), pipe))

    def __reduce__(self):
        return PipelineRef, ()


@dataclass(frozen=True)
class LoadedAdapter:
    """Where an adapter on a model came from."""

    config: Any  # PEFT's of this adapter; with another one, other code has replaced the adapter
    adapter: Adapter  # as it was loaded; tensors of layers that are no plain LoRA only


@dataclass(frozen=True)
class FusedLayer:
    """An adapter in one layer's weight."""

    layer: LoraLayer  # PEFT's, as it was around the weight
    entries: Mapping[str, Any]  # what the adapter had in it, by PEFT's attribute
    up: Tensor  # (out, rank, …)
    down: Tensor  # (rank, in, …)
    scale: float  # at which it was fused
    scaling: float  # that times alpha / rank


@dataclass(frozen=True)
class FusedAdapter:
    """An adapter in a model's weights, with all that puts it back beside them."""

    layers: Mapping[str, FusedLayer]  # by module
    config: Any  # PEFT's
    loaded: LoadedAdapter | None
    active: bool  # before it was fused
    order: list[str]  # the pipeline's adapters at that time


@dataclass
class AdapterState:
    """What lorabook knows of the adapters on one model: the attribute `lorabook` of the model."""

    # adapters by name: beside the weights, and in them, in the order they were fused
    loaded: dict[str, LoadedAdapter] = field(default_factory=dict)
    fused: dict[str, FusedAdapter] = field(default_factory=dict)
    # in the weights too, but their originals were let go
    fused_for_good: tuple[str, ...] = ()
    # the original of each weight that fusing changed, by module, on the CPU
    base_weights: dict[str, Tensor] = field(default_factory=dict)
    # a ScaleSchedule, where scales change over the denoising
    schedule: Any = None
    # to be put back when the running call of the denoiser ends
    scalings_before_call: list[Scaling] = field(default_factory=list)
    # of a text encoder, as they were last set
    scalings: list[Scaling] = field(default_factory=list)
    # the one that was last worked with
    pipeline: PipelineRef = field(default_factory=PipelineRef)
    # what is fused, so that a call's own scale does nothing to it, as was said
    warned_of: list[str] = field(default_factory=list)
    # on the denoiser, while there are adapters
    hooks: list[RemovableHandle] = field(default_factory=list)
    # for whoever changes adapters or weights, or generates; the denoiser's counts
    lock: PipelineLock = field(default_factory=PipelineLock)

    def end_call(self) -> None:
        """Put back what a call of the denoiser changed of the scalings."""
        restore_scalings(self.scalings_before_call)
        self.scalings_before_call = []


def state_of(model: nn.Module) -> AdapterState:
    """The model's AdapterState, made where it has none."""
    if "lorabook" not in vars(model):
        vars(model).setdefault("lorabook", AdapterState())  # atomic: another thread may be first
    return model.lorabook


def fused_names(pipe: DiffusionPipeline) -> list[str]:
    """The adapters fused into any model of a pipeline, in the order they were fused."""
    states = [state_of(model) for model in models_of(pipe).values()]
    return list(dict.fromkeys(name for state in states for name in state.fused))


def check_known(
    pipe: DiffusionPipeline, names: Iterable[str], layers: LoraLayers | None = None
) -> None:
    """Raise ValueError for an adapter that the pipeline does not have, or that is fused."""
    layers = lora_layers(pipe) if layers is None else layers
    known, fused = adapter_names(pipe, layers), fused_names(pipe)
    for name in names:
        if name in fused:
            raise ValueError(f"adapter {name!r} is fused; call unfuse(pipe, {name!r}) first")
        if name not in known:
            there = listed([f"{each:.60}" for each in known], 8)
            raise ValueError(f"the pipeline has no adapter {name!r:.80}; it has: {there}")
    if any(layer.merged for layer in flat(layers)):
        raise ValueError("adapters were fused by diffusers itself; call pipe.unfuse_lora() first")


def original_weight(model: nn.Module, module: str, weight: Tensor) -> Tensor:
    """A layer's weight as the base model has it, whatever is fused; `weight` is the present one."""
    original = state_of(model).base_weights.get(module)
    return weight.detach() if original is None else original.to(weight)


def keep_over_calls(pipe: DiffusionPipeline, layers: LoraLayers | None = None) -> None:
    """Let calls of the pipeline leave the scales as they are now; see `hook_calls` in upstream.py.

    Called after each change of adapters or scales. With the last adapter the hooks go.
    """
    model = denoiser(pipe)
    if model is None:
        return
    layers = lora_layers(pipe) if layers is None else layers
    state = state_of(model)
    state.pipeline = PipelineRef(pipe)
    for component in layers.keys() & set(TEXT_ENCODERS):
        text_encoder = state_of(models_of(pipe)[component])
        text_encoder.scalings = scalings_of(layers[component].values())
    states = [state_of(each) for each in models_of(pipe).values()]
    if not (flat(layers) or any(each.fused or each.fused_for_good for each in states)):
        while state.hooks:
            state.hooks.pop().remove()
    elif not state.hooks:
        state.hooks = hook_calls(model)


@contextmanager
def preserve_scales(pipe: DiffusionPipeline) -> Iterator[None]:
    """Put scales and schedules, and which adapters are active, back at the end of the block."""
    model, layers = denoiser(pipe), lora_layers(pipe)
    state = AdapterState() if model is None else state_of(model)
    state.end_call()
    schedule, pipeline = state.schedule, state.pipeline
    active = active_adapters(pipe, layers)
    before = scalings_of(flat(layers))
    trained = [trained_scaling(layer, name) for layer, name, *_ in before]
    try:
        yield
    finally:
        state.end_call()
        for (layer, name, value, number), scaling in zip(before, trained, strict=True):
            if name in layer.scaling and trained_scaling(layer, name) == scaling:
                restore_scalings([(layer, name, value, number)])
            elif name in layer.scaling:  # swapped, or no DoRA any more
                write_scale(layer, name, float(number) / scaling if scaling else 0.0)
        state.schedule = schedule
        present = adapter_names(pipe)
        activate(pipe, [name for name in active if name in present])
        keep_over_calls(pipe)
        state.pipeline = pipeline  # whose run the schedule is for


def lock_of(pipe: DiffusionPipeline) -> PipelineLock:
    """The lock of a pipeline's denoiser; what is no pipeline gets a lock of its own."""
    return _lock_of(pipe) or PipelineLock()


def locked(function: Callable) -> Callable:
    """Let a function have all pipelines among its arguments to itself while it runs."""

    @wraps(function)
    def alone(*args, **kwargs):
        locks = {lock for lock in map(_lock_of, (*args, *kwargs.values())) if lock}
        with ExitStack() as stack:
            # in one order, so that no two calls wait for each other
            for lock in sorted(locks, key=id):
                stack.enter_context(lock)
            return function(*args, **kwargs)

    return alone


def _lock_of(pipe: Any) -> PipelineLock | None:
    model = next(iter(models_of(pipe).values()), None)
    return state_of(model).lock if isinstance(model, nn.Module) else None
