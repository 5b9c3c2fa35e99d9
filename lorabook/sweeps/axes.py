"""What can vary along an axis of a sweep: one small class for each kind.

A kind says which values it takes (`check`), how a value reads (`label`), and what it changes of a
cell (`apply`). A new kind is a class here and an entry in `KINDS`.
"""

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar

from diffusers import DiffusionPipeline

from lorabook.checks import is_number, listed
from lorabook.live.generate import check_prompt
from lorabook.live.layers import adapter_names
from lorabook.live.state import check_known
from lorabook.lora.merge import METHODS
from lorabook.schedulers import scheduler_named
from lorabook.sweeps.cells import SWEEP_ADAPTER, Cell, as_schedule, scales_at
from lorabook.types import Scales

INSTEAD = (
    'say columns={{"{name}": [{weight}]}} or scales={{"{name}": {weight}}}, since a sweep sets the '
    "scales so, or draw it with generate(pipe, prompt)"
)


@dataclass(frozen=True)
class Axis:
    """One thing that varies, and its values: the base of all kinds.

    Attributes:
        pipe: The pipeline.
        place: "columns" or "rows", for errors.
        name: What varies, as "seed" or "ink.unet.up".
        values: As they were given.
        takes, accepts: Which values the kind takes, in words and as a check.
        words: How a value reads.
    """

    pipe: DiffusionPipeline
    place: str
    name: str
    values: Sequence
    takes: ClassVar[str] = ""
    accepts: ClassVar[Callable[[object], bool]] = staticmethod(lambda value: True)
    words: ClassVar[str] = "{name} {value}"

    def check_name(self) -> None:
        """Raise ValueError where this pipeline has nothing of that name to vary."""

    def check(self, value: object) -> None:
        """Raise ValueError for a value that cannot be."""
        if not self.accepts(value):
            rule = f"the values of {self.name!r} are {self.takes}"
            raise ValueError(f"{self.place}: {rule}, not {value!r:.60}")

    def label(self, value: object) -> str:
        """The words above a column or beside a row."""
        return self.words.format(name=self.name, value=_short(value))

    def apply(self, cell: Cell, value: object) -> Cell:
        """The cell with this value."""
        return replace(cell, call={**cell.call, self.name: value})

    def excludes(self, other: "Axis") -> bool:
        """Whether both say how strongly the same adapter acts."""
        return False


class PromptAxis(Axis):
    """Prompts, or negative prompts."""

    takes, words = "texts", "{value}"
    accepts = staticmethod(lambda value: isinstance(value, str))

    def check(self, value: object) -> None:
        super().check(value)
        check_prompt(value, self.name, INSTEAD)


class SeedAxis(Axis):
    """Seeds of the noise."""

    def check(self, value: object) -> None:
        check_seed(value, f"{self.place}: a seed")


class GuidanceAxis(Axis):
    """Guidance scales."""

    takes, words, accepts = "numbers", "guidance {value}", staticmethod(is_number)


class StepCountAxis(Axis):
    """Numbers of denoising steps."""

    takes, words = "whole numbers from 1", "steps {value}"
    accepts = staticmethod(lambda value: type(value) is int and value >= 1)


class SchedulerAxis(Axis):
    """Schedulers by name."""

    words = "{value}"

    def check(self, value: object) -> None:
        scheduler_named(value)


class AdapterAxis(Axis):
    """One adapter at a time: a name on the pipeline, what `load_adapter` takes, or None."""

    def label(self, value: object) -> str:
        if value is None:
            return "base"
        path = Path(value) if isinstance(value, (str, os.PathLike)) else Path("adapter")
        return path.parent.name if path.stem == "pytorch_lora_weights" else path.stem

    def apply(self, cell: Cell, value: object) -> Cell:
        if value is None:
            return replace(cell, only="")
        if isinstance(value, str) and value in adapter_names(self.pipe):
            return replace(cell, only=value)
        return replace(cell, only=SWEEP_ADAPTER, source=value)

    def excludes(self, other: Axis) -> bool:
        return isinstance(other, (AdapterAxis, MethodAxis, ScaleAxis))


class CheckpointAxis(AdapterAxis):
    """Checkpoints of a training run."""

    takes = "folders or files of checkpoints"
    accepts = staticmethod(lambda value: value is not None)


class FactorAxis(Axis):
    """A number that multiplies the scales of all active adapters."""

    takes, accepts = "numbers", staticmethod(is_number)

    def check_name(self) -> None:
        if not adapter_names(self.pipe):
            raise ValueError(
                f"{self.place}: {self.name!r:.60} cannot vary, since the pipeline has no adapter; "
                f"load_adapter(pipe, …) loads one. Without, what can vary is: {_OF_CALLS}"
            )

    def apply(self, cell: Cell, value: float) -> Cell:
        return replace(cell, factor=cell.factor * value)


class MethodAxis(FactorAxis):
    """Methods of `blend`."""

    takes, words = ", ".join(METHODS), "{value}"
    accepts = staticmethod(lambda value: value in METHODS)

    def apply(self, cell: Cell, value: str) -> Cell:
        return replace(cell, method=value)

    def excludes(self, other: Axis) -> bool:
        return isinstance(other, ScaleAxis) and not isinstance(other, RatioAxis)


class ScaleAxis(FactorAxis):
    """An adapter's scales: all of them, "ink", or those at a path, "ink.unet.up.block_1"."""

    @property
    def adapters(self) -> list[str]:
        """The adapters whose scales vary."""
        return [self.name.partition(".")[0]]

    def check_name(self) -> None:
        super().check_name()
        known = adapter_names(self.pipe)
        for adapter in self.adapters:
            if adapter not in known:
                raise ValueError(
                    f"{self.place}: {adapter!r:.60} cannot vary; what can is {listed(KINDS)}, and "
                    f"the scales of an adapter ({listed(known, 8):.100})"
                )
        check_known(self.pipe, self.adapters)

    def check(self, value: object) -> None:
        self.apply(Cell({}), value)

    def label(self, value: object) -> str:
        if self.name.endswith(".steps"):
            shares = [
                f"{start:.0%} to {end:.0%}" + ("" if factor == 1 else f" × {factor:g}")
                for start, end, factor in as_schedule(value)
                if factor
            ]
            return f"{self.adapters[0]} {', '.join(shares) or 'never'}"
        return f"{self.name.replace('.unet.', ' ').replace('block_', '')} {_short(value)}"

    def apply(self, cell: Cell, value: Scales) -> Cell:
        adapter, _, path = self.name.partition(".")
        return cell.with_scales(self.pipe, adapter, scales_at(path, value), whole=not path)


class RatioAxis(ScaleAxis):
    """The share of the second adapter against the first: "ink:creatures"."""

    @property
    def adapters(self) -> list[str]:
        return self.name.split(":")

    def check_name(self) -> None:
        super().check_name()
        if len(set(self.adapters)) != 2:
            raise ValueError(
                f"{self.place}: {self.name!r:.60} is no ratio of two adapters, as 'ink:creatures'"
            )

    def check(self, value: object) -> None:
        Axis.check(self, value)

    def label(self, value: float) -> str:
        one, other = self.adapters
        return f"{1 - value:.0%} {one}\n{value:.0%} {other}"

    def apply(self, cell: Cell, value: float) -> Cell:
        ratio = dict(zip(self.adapters, (1 - value, value), strict=True))
        for adapter, weight in ratio.items():
            cell = cell.with_scales(self.pipe, adapter, weight, whole=True)
        return replace(cell, ratio=ratio)

    def excludes(self, other: Axis) -> bool:
        shared = isinstance(other, ScaleAxis) and set(other.adapters) & set(self.adapters)
        return isinstance(other, RatioAxis) or bool(shared)


KINDS = {
    "prompt": PromptAxis,
    "negative_prompt": PromptAxis,
    "seed": SeedAxis,
    "guidance_scale": GuidanceAxis,
    "num_inference_steps": StepCountAxis,
    "scheduler": SchedulerAxis,
    "adapter": AdapterAxis,
    "checkpoint": CheckpointAxis,
    "method": MethodAxis,
    "scale": FactorAxis,
}  # and, by an adapter's name, ScaleAxis and RatioAxis
_OF_CALLS = ", ".join(list(KINDS)[: list(KINDS).index("adapter")])


def check_seed(value: object, what: str) -> None:
    """Raise ValueError for a seed that is no whole number from 0."""
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < 2**63:
        raise ValueError(f"{what} must be a whole number from 0, not {value!r:.60}")


def _short(value: object) -> str:
    """A value, or scales, in few letters."""
    if isinstance(value, Mapping):
        parts = [f"{key} {_short(inner)}" for key, inner in list(value.items())[:4]]
        return "; ".join(parts) + " …" * (len(value) > 4)
    if isinstance(value, Sequence) and not isinstance(value, str):
        return ",".join(map(_short, value))
    return f"{value:g}" if isinstance(value, float) else str(value)
