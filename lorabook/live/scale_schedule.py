"""Scales that change over the denoising: a hook on the UNet that looks which share of the run it is in."""

import sys
from collections.abc import Mapping, Sequence

import torch
from diffusers import DiffusionPipeline
from torch import nn

from lorabook.live.layers import models_of, walk

_KEPT, _HOOKED, _PUT_BACK = "_scale_schedule", "_scale_hooks", "_unscheduled"
Steps = Sequence[tuple[float, float, float]]


def set_steps(pipe, steps: Mapping[str, Steps]) -> None:
    """Let adapters' scales be multiplied by a factor in shares of the run; an empty schedule takes it away.

    Args:
        steps: (from, to, factor) by adapter, half-open shares of the run, as `steps_of` gives them.
    """
    model = denoiser(pipe)
    if model is None or not (any(steps.values()) or model.__dict__.get(_KEPT)):
        return
    _end(model)
    kept = {
        name: shares
        for name, shares in (model.__dict__.get(_KEPT, {}) | dict(steps)).items()
        if shares
    }
    model.__dict__[_KEPT] = kept
    called = (
        pipe.transformer if getattr(pipe, "unet", None) is None else pipe.unet
    )  # of a compiled one, the wrapper
    if _HOOKED not in called.__dict__:
        called.__dict__[_HOOKED] = True
        called.register_forward_pre_hook(_begin, with_kwargs=True)
        called.register_forward_hook(_end, always_call=True)


def steps_on(pipe) -> dict[str, Steps]:
    """The schedules of a pipeline's adapters, by name."""
    model = denoiser(pipe)
    if model is None:
        return {}
    _end(model)  # a run that was interrupted may have left its share's factor
    return dict(model.__dict__.get(_KEPT, {}))


def denoiser(pipe) -> nn.Module | None:
    """The pipeline's UNet or transformer."""
    models = models_of(pipe)
    return models.get("unet", models.get("transformer"))


def share_of_run(pipe, timestep) -> float:
    """How much of the run lies behind, 0 to below 1; image to image runs the last timesteps of the scheduler only.

    Args:
        timestep: the one the model is asked about.
    """
    times, index = pipe.scheduler.timesteps, getattr(pipe.scheduler, "step_index", None)
    first = getattr(pipe.scheduler, "begin_index", None)
    if first is None:
        first = max(0, len(times) - getattr(pipe, "num_timesteps", len(times)))
    if hasattr(pipe.scheduler, "counter"):  # PNDM's, which repeats a timestep
        index = first + pipe.scheduler.counter
    if index is None:  # before the first step, and with schedulers that do not count
        found = (times[first:] == timestep.flatten()[0].to(times)).nonzero()
        index = first + (int(found[0]) if len(found) else 0)
    return (index - first) / max(len(times) - first, 1)


@torch.compiler.disable
def _begin(model: nn.Module, args: tuple, kwargs: dict) -> None:
    model = getattr(model, "_orig_mod", model)
    _end(model)
    if not (kept := model.__dict__.get(_KEPT)):
        return
    share = share_of_run(_running(model), kwargs["timestep"] if "timestep" in kwargs else args[1])
    factors = {
        name: next((factor for start, end, factor in steps if start <= share < end), 1.0)
        for name, steps in kept.items()
    }
    before = model.__dict__.setdefault(_PUT_BACK, [])
    for _, layer in walk(model):
        for name in factors.keys() & getattr(layer, "scaling", {}).keys():
            before.append((layer, name, layer.scaling[name]))
            layer.scaling[name] = layer.scaling[name] * factors[name]


@torch.compiler.disable
def _end(model: nn.Module, *_) -> None:
    model = getattr(model, "_orig_mod", model)
    for layer, name, scaling in model.__dict__.get(_PUT_BACK, []):
        layer.scaling[name] = scaling
    model.__dict__[_PUT_BACK] = []


def _running(model: nn.Module) -> DiffusionPipeline:
    """The pipeline in whose call the model is: several may share it, each with a scheduler and a run of its own.

    Nothing that a model is given tells its pipeline, so this looks who called.
    """
    frame = sys._getframe(1)
    while frame is not None:
        caller = frame.f_locals.get("self")
        if isinstance(caller, DiffusionPipeline) and denoiser(caller) is model:
            return caller
        frame = frame.f_back
    raise ValueError(
        "scales over the denoising need a pipeline's own call, which tells the share of the run; set them "
        "without steps, or call the pipeline"
    )
