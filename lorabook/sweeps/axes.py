"""What can vary along an axis of a sweep, and what one value of it means."""

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from numbers import Real
from pathlib import Path

from lorabook.checks import listed
from lorabook.live.expand import steps_of
from lorabook.live.generate import check_prompt
from lorabook.live.layers import adapter_names
from lorabook.live.scales import layer_scales, resolve_scales
from lorabook.live.state import check_known
from lorabook.lora.merge import METHODS
from lorabook.schedulers import scheduler_named

CALL = ("prompt", "negative_prompt", "seed", "guidance_scale", "num_inference_steps", "scheduler")
ADAPTERS = ("adapter", "checkpoint", "method", "scale")
INSTEAD = (
    'say columns={{"{name}": [{weight}]}} or scales={{"{name}": {weight}}}, since a sweep sets the scales so, or '
    "draw it with generate(pipe, prompt)"
)
RATIO = ":"  # "ink:creatures" goes from the one to the other
_SHORT = {"guidance_scale": "guidance", "num_inference_steps": "steps"}
_WHOLE = "the scales of all layers"


@dataclass(frozen=True)
class Axis:
    """One axis: what varies, its values, and a label for each."""

    what: str
    values: Sequence
    labels: Sequence[str]

    @property
    def adapter(self) -> str | None:
        """The adapter whose scales vary, or None."""
        return (
            None
            if self.what in CALL + ADAPTERS or RATIO in self.what
            else self.what.partition(".")[0]
        )

    @property
    def path(self) -> str:
        """Where in the adapter's scales, as "unet.up.block_1"; "" is all of them."""
        return self.what.partition(".")[2]


def read_axis(pipe, axis, name: str) -> Axis:
    """An axis as given, checked.

    Args:
        axis: {what: values} with one entry, see `sweep`.
        name: "columns" or "rows", for errors.
    Raises: ValueError for an axis that is none, is empty, or has a value that cannot be.
    """
    if not isinstance(axis, Mapping) or len(axis) != 1:
        raise ValueError(
            f'{name} must be a dictionary with one entry, as {{"seed": [0, 1, 2]}}; got {axis!r:.120}'
        )
    ((what, values),) = axis.items()
    if not isinstance(what, str):
        raise ValueError(f"{name}: {what!r:.60} is no name of what varies")
    if what == "checkpoint" and hasattr(values, "folder"):
        values = checkpoints_of(values)
    if isinstance(values, (str, bytes, Mapping)) or not hasattr(values, "__iter__"):
        raise ValueError(f"{name}: the values of {what!r} must be a list, not {values!r:.80}")
    values = list(values)
    if not values:
        raise ValueError(f"{name}: {what!r} has no values")
    _check_what(pipe, what, name)
    for value in values:
        _check_value(pipe, what, value, name)
    return Axis(what, values, [label(what, value) for value in values])


def check_together(axes: Sequence[Axis]) -> None:
    """Raise ValueError for two axes that cannot be combined."""
    if len(axes) < 2:
        return
    one, other = axes
    if one.what == other.what:
        raise ValueError(
            f"columns and rows both vary {one.what!r}; let one of them vary something else"
        )
    for first, second in ((one, other), (other, one)):
        if first.what in ("adapter", "checkpoint", "method") or RATIO in first.what:
            clash = second.what in ("adapter", "checkpoint") or (
                second.what == "method" and RATIO not in first.what
            )
            named = second.adapter is not None and (
                RATIO not in first.what or second.adapter in first.what.split(RATIO)
            )
            if clash or named or (RATIO in first.what and RATIO in second.what):
                raise ValueError(
                    f"the axes {one.what!r} and {other.what!r} cannot be combined, since both say how strongly "
                    "adapters take part; vary 'scale' beside one of them"
                )


def checkpoints_of(run) -> list[Path]:
    """The checkpoints of a TrainingRun in their order, and its adapter where it learned on after the last of them."""
    found = {
        int(path.name.rpartition("-")[2]): path
        for path in Path(run.folder).glob("checkpoint-*")
        if path.is_dir()
    }
    last = max((record["step"] for record in run.history), default=0)
    return [found[step] for step in sorted(found)] + ([] if last in found else [Path(run.adapter)])


def scales_at(path: str, value):
    """Scales that say `value` at a path: ("unet.up.block_1", 0.5) is {"unet": {"up": {"block_1": 0.5}}}."""
    if not path:
        return value
    part, _, rest = path.partition(".")
    if part == "steps":
        return {"steps": _shares(value)}
    if not rest:
        return {part: value}
    side, _, inner = rest.partition(".")
    if side in ("down", "up", "mid") and inner:
        keys = [side, *inner.split(".", 1 if side != "mid" else 0)]
        for key in reversed(keys):
            value = {key: value}
        return {part: value}
    return {part: {rest: value}}


def label(what: str, value) -> str:
    """The words that stand beside a row or above a column."""
    short = _SHORT.get(what, what)
    if what in ("prompt", "negative_prompt", "scheduler", "method"):
        return str(value)
    if what in ("adapter", "checkpoint"):
        if value is None:
            return "base"
        path = Path(value) if isinstance(value, (str, os.PathLike)) else Path("adapter")
        return path.parent.name if path.stem == "pytorch_lora_weights" else path.stem
    if RATIO in what:
        one, other = what.split(RATIO)
        return f"{1 - value:.0%} {one}\n{value:.0%} {other}"
    if what.endswith(".steps"):
        told = ", ".join(
            f"{start:.0%} to {end:.0%}" + ("" if factor == 1 else f" × {factor:g}")
            for start, end, factor in _shares(value)
            if factor
        )
        return f"{what.removesuffix('.steps')} {told or 'never'}"
    return f"{short.replace('.unet.', ' ').replace('block_', '')} {_plain(value)}"


def _plain(value) -> str:
    """Scales in few letters."""
    if isinstance(value, Mapping):
        return "; ".join(
            f"{key} {_plain(inner)}" for key, inner in list(value.items())[:4]
        ) + " …" * (len(value) > 4)
    if isinstance(value, Sequence) and not isinstance(value, str):
        return ",".join(_plain(inner) for inner in value)
    return f"{value:g}" if isinstance(value, float) else str(value)


def _shares(value) -> list:
    """A share of the run, as (0.2, 0.5), as the schedule in which the adapter takes part in it alone."""
    if (
        isinstance(value, Sequence)
        and len(value) == 2
        and all(isinstance(end, Real) for end in value)
    ):
        start, end = value
        return [
            entry
            for entry in ([0, start, 0.0], [start, end, 1.0], [end, 1, 0.0])
            if entry[0] != entry[1]
        ]
    return value


def _check_what(pipe, what: str, name: str) -> None:
    known = adapter_names(pipe)
    if what in CALL or (what in ("adapter", "checkpoint")):
        return
    named = what.split(RATIO) if RATIO in what else [what.partition(".")[0]]
    if not known:
        raise ValueError(
            f"{name}: {what!r:.60} cannot vary, since the pipeline has no adapter; load_adapter(pipe, …) loads "
            f"one. Without, what can vary is: {', '.join(CALL)}"
        )
    if what in ADAPTERS:
        return
    for adapter in named:
        if adapter not in known:
            raise ValueError(
                f"{name}: {adapter!r:.60} cannot vary; what can is {', '.join(CALL + ADAPTERS)}, and the "
                f"scales of an adapter ({listed(known)})"
            )
    check_known(pipe, named)
    if RATIO in what and len(set(named)) != 2:
        raise ValueError(f"{name}: {what!r:.60} is no ratio of two adapters, as 'ink:creatures'")


def _check_value(pipe, what: str, value, name: str) -> None:
    if what in ("prompt", "negative_prompt"):
        _ask(isinstance(value, str), name, what, "texts", value)
        check_prompt(value, what, INSTEAD)
    elif what == "seed":
        check_seed(value, f"{name}: a seed")
    elif what == "num_inference_steps":
        whole = isinstance(value, int) and not isinstance(value, bool)
        _ask(whole and value >= 1, name, what, "whole numbers from 1", value)
    elif what == "guidance_scale" or what == "scale" or RATIO in what:
        real = isinstance(value, Real) and not isinstance(value, bool)
        _ask(real and math.isfinite(value), name, what, "numbers", value)
    elif what == "scheduler":
        scheduler_named(value)
    elif what == "method":
        _ask(value in METHODS, name, what, ", ".join(METHODS), value)
    elif what in ("adapter", "checkpoint"):
        _ask(
            value is not None or what == "adapter",
            name,
            what,
            "folders or files of checkpoints",
            value,
        )
    else:
        adapter, _, path = what.partition(".")
        said = resolve_scales(pipe, scales_at(path, value), adapter)
        layer_scales(pipe, adapter, said)
        steps_of(said, adapter)


def check_seed(value, what: str) -> None:
    """Raise ValueError for a seed that is no whole number from 0."""
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < 2**63:
        raise ValueError(f"{what} must be a whole number from 0, not {value!r:.60}")


def _ask(fits: bool, name: str, what: str, wanted: str, value) -> None:
    if not fits:
        raise ValueError(f"{name}: the values of {what!r} are {wanted}, not {value!r:.60}")
