"""Scales that change over the denoising: a hook on the UNet that looks which share of the run it is in."""
import weakref
from collections.abc import Mapping, Sequence

from torch import nn

from lorabook.adapters.layers import components, layers_of

_KEPT = "_scale_schedule"
Steps = Sequence[tuple[float, float, float]]


def set_steps(pipe, steps: Mapping[str, Steps]) -> None:
    """Let adapters' scales be multiplied by a factor in shares of the run; an empty schedule takes it away.

    The run is that of this pipeline's scheduler, also where other pipelines share the model.

    Args:
        steps: (from, to, factor) by adapter, half-open shares of the run, as `steps_of` gives them.
    """
    model = denoiser(pipe)
    if model is None or not (steps or _KEPT in model.__dict__):
        return
    kept = model.__dict__.setdefault(_KEPT, {})
    kept.update(steps)
    for name in [name for name, shares in kept.items() if not shares]:
        del kept[name]
    hooks = model.__dict__.setdefault("_scale_hooks", [])
    while hooks:
        hooks.pop().remove()
    if kept:
        owner = weakref.ref(pipe)
        hooks += [model.register_forward_pre_hook(lambda m, args, named: _begin(owner(), m, args, named), with_kwargs=True),
                  model.register_forward_hook(lambda m, args, out: _end(m), always_call=True)]


def steps_on(pipe) -> dict[str, Steps]:
    """The schedules of a pipeline's adapters, by name."""
    model = denoiser(pipe)
    return dict(model.__dict__.get(_KEPT, {})) if model is not None else {}


def denoiser(pipe) -> nn.Module | None:
    """The pipeline's UNet or transformer."""
    models = components(pipe)
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
    if index is None:  # before the first step, and with schedulers that do not count
        found = (times[first:] == timestep.flatten()[0].to(times)).nonzero()
        index = first + (int(found[0]) if len(found) else 0)
    return (index - first) / max(len(times) - first, 1)


def _begin(pipe, model: nn.Module, args: tuple, kwargs: dict) -> None:
    if pipe is None:
        return
    timestep = kwargs["timestep"] if "timestep" in kwargs else args[1]
    share = share_of_run(pipe, timestep)
    before = model.__dict__.setdefault("_unscheduled", [])
    for name, steps in model.__dict__.get(_KEPT, {}).items():
        factor = next((factor for start, end, factor in steps if start <= share < end), 1.0)
        for layers in layers_of(pipe, name).values() if factor != 1 else ():
            for layer in layers.values():
                before.append((layer, name, layer.scaling[name]))
                layer.scaling[name] = layer.scaling[name] * factor


def _end(model: nn.Module) -> None:
    for layer, name, scaling in model.__dict__.get("_unscheduled", []):
        layer.scaling[name] = scaling
    model.__dict__["_unscheduled"] = []
