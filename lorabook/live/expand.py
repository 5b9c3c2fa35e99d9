"""A scales dictionary, checked and expanded to one number a layer."""

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any

from lorabook.blocks import KINDS, block_of, kind_of, place_of
from lorabook.checks import is_number, listed
from lorabook.types import Scales

STEPS = "steps"
LayerScales = Mapping[str, Mapping[str, float]]  # by component and module name
Steps = Sequence[tuple[float, float, float]]  # (from, to, factor) in shares of the run
_TEXT_LAYER = re.compile(r"(?:text_model\.)?encoder\.layers\.(\d+)\.")


def expand(
    scales: Scales,
    modules: Mapping[str, Iterable[str]],
    what: str = "the adapter",
    touched: Mapping[str, Iterable[str]] | None = None,
) -> dict[str, dict[str, float]]:
    """One number for each layer, by component: all that a dictionary says of it multiplied, else 1.

    Args:
        scales: a number, or {"unet": …, "text_encoder": …, "text_encoder_2": …}. For a UNet: a
            number or a dictionary of "down", "mid" and "up" (a number; a list, which is then each
            block's; or "block_0" …), kinds ("cross-attention" …) and globs of layer names
            ("*.attn2.to_k"). For a text encoder: a number or a dictionary of "layer_0" …, kinds and
            globs. In a block: a number; a list of one, which is for all of it; a list whose entry i
            scales attentions.i, resnets.i and motion_modules.i, samplers taking the last; or a
            dictionary of "attentions_0", "resnets_1", "sampler", kinds and globs. "steps" is passed
            over.
        modules: all layers of the model by component, which decide what names there are.
        what: the adapter's name, for errors.
        touched: the layers to give a number; None takes all.
    """
    names = {component: list(layers) for component, layers in modules.items()}
    touched = names if touched is None else touched
    result = {component: dict.fromkeys(layers, 1.0) for component, layers in touched.items()}
    if not isinstance(scales, Mapping):
        scales = dict.fromkeys(names, _number(scales, what))
    for component, value in scales.items():
        if component == STEPS:
            continue
        if component not in names:
            raise ValueError(
                f"{what}: {component!r:.60} is no component of this pipeline; it has: "
                f"{', '.join(names)}, and {STEPS!r}"
            )
        group = _Group(names[component])
        if isinstance(value, Mapping):
            of_text = component.startswith("text_encoder")
            group = _text_encoder(names[component]) if of_text else _unet(names[component])
        numbers = result.get(component, {})
        for layers, scale in _spread(value, group, f"{what}.{component}"):
            for layer in layers:
                if layer in numbers:
                    numbers[layer] *= scale
    return result


def steps_of(scales: Scales, what: str = "the adapter") -> list[tuple[float, float, float]]:
    """The schedule over the denoising, (from, to, factor) in half-open shares, if any."""
    entries = scales.get(STEPS, []) if isinstance(scales, Mapping) else []
    if not _is_list(entries):
        raise ValueError(f"{what}.steps must be a list, as [[0, 0.4, 1.0]], not {entries!r:.80}")
    steps = []
    for entry in entries:
        if not _is_list(entry) or len(entry) != 3:
            raise ValueError(f"{what}.steps: {entry!r:.80} is not [from, to, factor]")
        start, end, factor = (_number(value, f"{what}.steps") for value in entry)
        if not 0 <= start < end <= 1:
            raise ValueError(
                f"{what}.steps: {start:g} to {end:g} is no share of the run; give 0 ≤ from < to ≤ 1"
            )
        steps.append((start, end, factor))
    steps.sort()
    for (_, end, _), (start, _, _) in zip(steps, steps[1:], strict=False):
        if start < end:
            raise ValueError(
                f"{what}.steps: the shares overlap at {start:g}; let none begin earlier"
            )
    return steps


@dataclass
class _Group:
    """Layers that scales can name together."""

    layers: list[str]
    groups: dict[str, "_Group"] = field(default_factory=dict)  # smaller ones in this one, by name
    each: str = ""  # what a list is for: each of the "groups", or each of the "parts" of a block
    has_kinds: bool = False  # whether kinds and globs name layers too

    def named(self, key: Any, what: str) -> "_Group":
        """The layers of a smaller group, a kind or a glob."""
        if key in self.groups:
            return self.groups[key]
        fits = self.has_kinds and isinstance(key, str)
        layers = [
            layer
            for layer in self.layers
            if fits and (kind_of(layer) == key or fnmatchcase(layer, key))
        ]
        if not layers and not (fits and key in KINDS):
            kinds = f"; the kinds are {listed(KINDS)}; a glob of layer names must fit one"
            raise ValueError(
                f"{what}: the model has no {key!r:.60}; it has: {listed(list(self.groups)[:12])}"
                f"{kinds if self.has_kinds else ''}"
            )
        return _Group(layers)


def _spread(value: Scales, group: _Group, what: str) -> Iterator[tuple[list[str], float]]:
    """Pairs of layers and a number that they get."""
    if group.each and not group.layers:
        raise ValueError(
            f"{what}: the model has no {what.split('.')[-1]!r} blocks; scale it by kinds or globs"
        )
    if isinstance(value, Mapping) and (group.groups or group.has_kinds):
        for key, inner in value.items():
            yield from _spread(inner, group.named(key, what), f"{what}.{key}")
    elif _is_list(value) and group.each == "groups":
        for name, block in group.groups.items():
            yield from _spread(value, block, f"{what}.{name}")
    elif _is_list(value) and group.each == "parts" and len(value) > 1:
        counts = [
            sum(name.startswith(part) for name in group.groups)
            for part in ("attentions", "resnets")
        ]
        if len(value) not in {count for count in counts if count}:
            raise ValueError(
                f"{what}: a list of {len(value)} scales does not fit; the block has {counts[0]} "
                f"attentions and {counts[1]} resnets"
            )
        last = len(value) - 1
        for name, part in group.groups.items():
            # samplers stand behind the last, and the middle block's second resnet behind its only
            # attention
            index = last if name == "sampler" else min(int(name.rsplit("_", 1)[1]), last)
            yield part.layers, _number(value[index], f"{what}[{index}]")
    elif _is_list(value) and group.each == "parts" and value:
        yield group.layers, _number(value[0], what)
    else:
        yield group.layers, _number(value, what)


def _unet(layers: list[str]) -> _Group:
    """A UNet's, or a transformer's, layers by side, block and part of the block."""
    unet = _Group(layers, has_kinds=True)
    unet.groups = {side: _Group([], each="groups") for side in ("down", "mid", "up")}
    for layer in layers:
        side, _, number = block_of(layer).partition(".")
        if side == "outside":
            continue
        unet.groups[side].layers.append(layer)
        blocks = unet.groups[side].groups
        block = blocks.setdefault(f"block_{number}", _Group([], each="parts", has_kinds=True))
        block.layers.append(layer)
        _, part, index = place_of(layer) or ("", "samplers", 0)
        part = "sampler" if part == "samplers" else f"{part}_{index}"
        block.groups.setdefault(part, _Group([])).layers.append(layer)
    if unet.groups["mid"].groups:
        unet.groups["mid"] = unet.groups["mid"].groups["block_"]
    return unet


def _text_encoder(layers: list[str]) -> _Group:
    """A text encoder's layers by number."""
    text_encoder = _Group(layers, has_kinds=True)
    for layer in layers:
        if match := _TEXT_LAYER.match(layer):
            group = text_encoder.groups.setdefault(f"layer_{match[1]}", _Group([]))
            group.layers.append(layer)
    return text_encoder


def _number(value: Any, what: str) -> float:
    if not is_number(value):
        raise ValueError(f"the scale of {what:.120} must be a finite number, not {value!r:.80}")
    return float(value)


def _is_list(value: Any) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, str)
