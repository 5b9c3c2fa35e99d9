"""Scales that change over the denoising."""

from collections.abc import Mapping
from dataclasses import dataclass

from diffusers import DiffusionPipeline
from torch import Tensor, nn

from lorabook.live.expand import Steps
from lorabook.live.layers import denoiser
from lorabook.live.state import state_of


@dataclass(frozen=True)
class ScaleSchedule:
    """What scales are multiplied by in shares of the run: (from, to, factor) by adapter."""

    steps: Mapping[str, Steps]

    def factors(self, model: nn.Module, args: tuple, kwargs: dict) -> dict[str, float]:
        """The factor of each adapter in one call of the denoiser with these arguments.

        The share of the run is that of the pipeline that `set_scales`, `generate` or `sweep` was
        last called with: a model that several pipelines share does not know which of them calls it.

        Raises: ValueError outside of a pipeline's own call.
        """
        pipe = state_of(model).pipeline()
        timestep = kwargs["timestep"] if "timestep" in kwargs else args[1]
        share = 1.0 if pipe is None else share_of_run(pipe, timestep)
        if not 0 <= share < 1:
            raise ValueError(
                "scales over the denoising need a pipeline's own call, which tells the share of "
                "the run; set them without steps, or call the pipeline that they were set on"
            )
        return {
            name: next((factor for start, end, factor in steps if start <= share < end), 1.0)
            for name, steps in self.steps.items()
        }


def set_steps(pipe: DiffusionPipeline, steps: Mapping[str, Steps]) -> None:
    """Let adapters' scales be multiplied by a factor in shares of the run.

    Args:
        steps: half-open shares by adapter, as `steps_of` gives them; none takes a schedule away.
    """
    if (model := denoiser(pipe)) is not None:
        by_adapter = steps_on(pipe) | dict(steps)
        by_adapter = {name: shares for name, shares in by_adapter.items() if shares}
        state_of(model).schedule = ScaleSchedule(by_adapter) if by_adapter else None


def steps_on(pipe: DiffusionPipeline) -> dict[str, Steps]:
    """The schedules of a pipeline's adapters, by name."""
    model = denoiser(pipe)
    if model is None:
        return {}
    state_of(model).end_call()  # a run that was interrupted may have left its share's factor
    schedule = state_of(model).schedule
    return dict(schedule.steps) if schedule else {}


def share_of_run(pipe: DiffusionPipeline, timestep: Tensor) -> float:
    """How much of the run lies behind, from 0 to below 1; 1 where the pipeline is not running.

    Image to image runs the last timesteps of the scheduler only.

    Args:
        timestep: the one that the model is asked about.
    """
    scheduler = pipe.scheduler
    times, index = scheduler.timesteps, getattr(scheduler, "step_index", None)
    is_counted = hasattr(type(pipe), "num_timesteps")
    steps = getattr(pipe, "num_timesteps", None if is_counted else len(times))
    if steps is None:  # the pipeline was never called
        return 1.0
    first = getattr(scheduler, "begin_index", None)
    if first is None:
        first = max(0, len(times) - steps)
    if hasattr(scheduler, "counter"):  # PNDM's, which repeats a timestep
        index = first + scheduler.counter
    if index is None:  # before the first step, and with schedulers that do not count
        places = (times[first:] == timestep.flatten()[0].to(times)).nonzero()
        index = first + (int(places[0]) if len(places) else 0)
    return (index - first) / max(len(times) - first, 1)
