"""Scales that change over the denoising: a hook on the UNet that looks which share of the run it is in."""

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from diffusers import DiffusionPipeline
from torch import nn

from lorabook.live.layers import denoiser
from lorabook.live.state import state_of

Steps = Sequence[tuple[float, float, float]]


@dataclass(frozen=True)
class Schedule:
    """What scales are multiplied by in shares of the run; `steps` is (from, to, factor) by adapter."""

    steps: Mapping[str, Steps]

    def factors(self, model: nn.Module, args: tuple, kwargs: dict) -> dict[str, float]:
        """The factor of each adapter in the call of a denoiser with these arguments."""
        timestep = kwargs["timestep"] if "timestep" in kwargs else args[1]
        share = share_of_run(_running(model), timestep)
        return {
            name: next((factor for start, end, factor in steps if start <= share < end), 1.0)
            for name, steps in self.steps.items()
        }


def set_steps(pipe: DiffusionPipeline, steps: Mapping[str, Steps]) -> None:
    """Let adapters' scales be multiplied by a factor in shares of the run; an empty schedule takes it away.

    Args:
        steps: (from, to, factor) by adapter, half-open shares of the run, as `steps_of` gives them.
    """
    if (model := denoiser(pipe)) is not None:
        state = state_of(model)
        state.end_call()
        all_steps = {name: each for name, each in (steps_on(pipe) | dict(steps)).items() if each}
        state.schedule = Schedule(all_steps) if all_steps else None


def steps_on(pipe: DiffusionPipeline) -> dict[str, Steps]:
    """The schedules of a pipeline's adapters, by name."""
    model = denoiser(pipe)
    if model is None:
        return {}
    state_of(model).end_call()  # a run that was interrupted may have left its share's factor
    schedule = state_of(model).schedule
    return dict(schedule.steps) if schedule else {}


def share_of_run(pipe: DiffusionPipeline, timestep) -> float:
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
