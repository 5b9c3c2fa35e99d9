"""What other libraries keep to themselves, as far as it needs no adapter: each thing in one place.

Each says why there is no public way, and the version where that was seen. tests/test_upstream.py
has a test of each that fails with a sentence when upstream has changed.
"""

import threading
import warnings
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from types import SimpleNamespace
from typing import Any

import diffusers.utils.logging as diffusers_logging
import torch
import transformers.utils.logging as transformers_logging
from accelerate.state import AcceleratorState, GradientState, PartialState
from diffusers import DiffusionPipeline, ModelMixin
from diffusers.pipelines import pipeline_utils
from peft.tuners.tuners_utils import check_target_module_exists
from peft.utils.other import get_pattern_key
from torch import nn
from transformers import PreTrainedModel

# diffusers 0.42 calls `from_pretrained`'s argument `dtype`, 0.41 `torch_dtype`; the old name warns.
DTYPE = "dtype" if hasattr(pipeline_utils, "_resolve_dtype") else "torch_dtype"
_PATCHING = threading.RLock()


def execution_device(pipe: DiffusionPipeline) -> torch.device:
    """The device on which a pipeline computes; its models may wait on the CPU until they are used.

    diffusers 0.42.1 has no public name for it: `pipe.device` is where the weights wait.
    Source:
    https://github.com/huggingface/diffusers/blob/v0.42.1/src/diffusers/pipelines/pipeline_utils.py
    """
    return pipe._execution_device


@contextmanager
def without_progress_bar(pipe: DiffusionPipeline) -> Iterator[None]:
    """Let a pipeline show no progress bar within a block.

    diffusers 0.42.1 sets the bar's arguments by `set_progress_bar_config` and tells them to nobody.
    """
    before = getattr(pipe, "_progress_bar_config", {})
    pipe.set_progress_bar_config(disable=True)
    try:
        yield
    finally:
        pipe.set_progress_bar_config(**before)


def uncompiled(model: nn.Module) -> nn.Module:
    """The model beneath a `torch.compile`, or the model itself.

    torch 2.13.0 has no public name for it.
    Source: https://docs.pytorch.org/docs/stable/generated/torch.compile.html
    """
    return getattr(model, "_orig_mod", model)


@contextmanager
def quiet() -> Iterator[None]:
    """No progress bars and no warnings from diffusers and transformers within a block.

    diffusers 0.42.1 warns of every component that an adapter has no weights for, and both libraries
    show progress bars for files that are read in a moment.
    """
    bars = [
        library
        for library in (transformers_logging, diffusers_logging)
        if library.is_progress_bar_enabled()
    ]
    level = diffusers_logging.get_verbosity()
    for library in bars:
        library.disable_progress_bar()
    diffusers_logging.set_verbosity_error()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        diffusers_logging.set_verbosity(level)
        for library in bars:
            library.enable_progress_bar()


@contextmanager
def loading_infos() -> Iterator[list[tuple[str, dict]]]:
    """What each model that is loaded within a block lacked: its class's name, and the loading info.

    A pipeline's `from_pretrained` (diffusers 0.42.1) starts with random weights where a file lacks
    some, and passes `output_loading_info` to none of its models. So the models' own
    `from_pretrained` is replaced until the block ends.
    Source:
    https://huggingface.co/docs/diffusers/api/models/overview#diffusers.ModelMixin.from_pretrained
    """
    infos: list[tuple[str, dict]] = []
    with _PATCHING, ExitStack() as stack:
        for library in (ModelMixin, PreTrainedModel):
            original = library.__dict__["from_pretrained"]
            library.from_pretrained = classmethod(_recording(original.__func__, infos))
            stack.callback(setattr, library, "from_pretrained", original)
        yield infos


def _recording(original, infos: list):
    def from_pretrained(cls, *args, output_loading_info: bool = False, **kwargs):
        model, info = original(cls, *args, output_loading_info=True, **kwargs)
        infos.append((cls.__name__, info))
        return (model, info) if output_loading_info else model

    return from_pretrained


@contextmanager
def separate_accelerator() -> Iterator[None]:
    """Let an Accelerator be made within a block as if there was none; the user's own is unchanged.

    accelerate 1.15.0 holds one state a process: a second Accelerator of another precision raises.
    Several processes stay connected after the block, since the next run in them needs that.
    Source: https://huggingface.co/docs/accelerate/package_reference/state
    """
    states = (AcceleratorState, PartialState, GradientState)
    before = [dict(state._shared_state) for state in states]
    AcceleratorState._reset_state()
    try:
        yield
    finally:
        connected = PartialState._shared_state.get("num_processes", 1) > 1
        for state, shared in zip(states, before, strict=True):
            if not (connected and state is PartialState):
                state._shared_state.clear()
                state._shared_state.update(shared)


def is_targeted(config: Mapping[str, Any], module: str) -> bool:
    """Whether PEFT gives a layer adapter weights, by the settings of an adapter_config.json.

    PEFT 0.21.2 answers only by a function of its tuners, which reads a config's attributes.
    Source: https://github.com/huggingface/peft/blob/v0.21.2/src/peft/tuners/tuners_utils.py
    """
    targets = config.get("target_modules")
    names = ("exclude_modules", "layers_to_transform", "layers_pattern")
    settings = SimpleNamespace(
        target_modules=".*" if targets in (None, "all-linear") else targets,
        target_parameters=None,
        **{name: config.get(name) for name in names},
    )
    return bool(check_target_module_exists(settings, module))


def pattern_value(patterns: Mapping[str, Any], module: str) -> Any:
    """The value of PEFT's rank_pattern or alpha_pattern for a layer; None where no pattern fits.

    PEFT 0.21.2 has the rule (which of several patterns counts) in a helper of its own.
    Source: https://github.com/huggingface/peft/blob/v0.21.2/src/peft/utils/other.py
    """
    return patterns.get(get_pattern_key(patterns, module))


def version_of(tensor: torch.Tensor) -> int:
    """How many times a tensor was written into.

    torch 2.13.0 counts it for autograd and has no public name for it.
    Source: https://docs.pytorch.org/docs/stable/notes/autograd.html#in-place-correctness-checks
    """
    return tensor._version
