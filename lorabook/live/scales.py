"""How strongly each adapter takes part: in all, by component, block, kind and layer, and over the denoising."""

import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from numbers import Real

from peft.tuners.lora import LoraLayer
from torch import Tensor

from lorabook.blocks import KINDS, block_of, kind_of, place_of
from lorabook.live.layers import (
    Carrying,
    activate,
    active_adapters,
    adapter_names,
    check_known,
    factor_of,
    lora_layers,
    models_of,
    put_factor,
    walk,
)
from lorabook.live.locks import locked
from lorabook.live.presets import from_block_weights, preset
from lorabook.live.scale_schedule import set_steps, steps_on
from lorabook.live.steady import keep_steady
from lorabook.live.undora import make_scalable
from lorabook.show.tables import as_html

STEPS = "steps"
_TEXT = re.compile(r"(?:text_model\.)?encoder\.layers\.(\d+)\.")


def number(value, what: str) -> float:
    """The value as a float. Raises ValueError for what is no finite number."""
    try:
        if not isinstance(value, bool) and isinstance(value, Real) and math.isfinite(float(value)):
            return float(value)
    except OverflowError:
        pass
    raise ValueError(f"the scale of {what:.120} must be a finite number, not {value!r:.80}")


def expand(
    scales,
    modules: Mapping[str, Iterable[str]],
    what: str = "the adapter",
    touched: Mapping[str, Iterable[str]] | None = None,
) -> dict[str, dict[str, float]]:
    """One factor for each layer.

    All that a dictionary says of a layer multiplies: its component's number, its block's, its kind's, and each glob that
    its name fits. What it does not say is 1.

    Args:
        scales: a number, or {"unet": …, "text_encoder": …, "text_encoder_2": …} with, for a UNet, a number or a
            dictionary of "down", "mid" and "up" (a number; a list, which is then each block's; or "block_0" …), kinds
            ("cross-attention" …) and globs of layer names ("*.attn2.to_k"); for a text encoder a number or a dictionary
            of "layer_0" …, kinds and globs. In a block: a number; a list of one, which is for all of it; a list whose
            entry i scales attentions.i, resnets.i and motion_modules.i, samplers taking the last; or a dictionary of
            "attentions_0", "resnets_1", kinds and globs. "steps" is passed over.
        modules: all layers of the model by component, which decide what names there are.
        what: the adapter's name, for errors.
        touched: the layers to give a factor; None takes all.
    Returns: factors by component and layer, for those touched.
    Raises: ValueError for a number that is none, or a name that the model does not have; it lists those it has.
    """
    names = {part: list(found) for part, found in modules.items()}
    factors = {
        part: dict.fromkeys(found, 1.0)
        for part, found in (names if touched is None else touched).items()
    }
    if not isinstance(scales, Mapping):
        scales = dict.fromkeys(names, number(scales, what))
    for part, said in scales.items():
        if part == STEPS:
            continue
        if part not in names:
            raise ValueError(
                f"{what}: {part!r:.60} is no component of this pipeline; it has: {', '.join(names)}, and "
                f"{STEPS!r}"
            )
        apply = _text_factors if part.startswith("text_encoder") else _unet_factors
        found = factors.get(part, {})
        for chosen, factor in apply(said, names[part], f"{what}.{part}"):
            for module in chosen:
                if module in found:
                    found[module] *= factor
    return factors


def _unet_factors(said, names: list[str], what: str):
    """Pairs of layers and the factor they get."""
    if not isinstance(said, Mapping):
        yield names, number(said, what)
        return
    blocks = _blocks(names)
    for key, value in said.items():
        if key in ("down", "up", "mid"):
            inside = {block: found for block, found in blocks.items() if block.split(".")[0] == key}
            yield from _side(key, value, inside, f"{what}.{key}")
        else:
            yield (
                _by_kind_or_glob(key, names, what, ["down", "mid", "up"]),
                number(value, f"{what}.{key}"),
            )


def _side(side: str, value, blocks: Mapping[str, list[str]], what: str):
    if not blocks:
        raise ValueError(
            f"{what}: the model has no {side!r} blocks; a number, kinds and globs of names reach its layers"
        )
    if side == "mid" or _is_list(value):
        for block, found in blocks.items():
            yield from _block(
                value, found, f"{what}.block_{block.split('.')[1]}" if "." in block else what
            )
    elif isinstance(value, Mapping):
        known = {f"block_{block.split('.')[1]}": found for block, found in blocks.items()}
        for key, inner in value.items():
            if key not in known:
                raise ValueError(
                    f"{what}: the model has no {key!r:.60}; it has: {', '.join(known)}"
                )
            yield from _block(inner, known[key], f"{what}.{key}")
    else:
        yield [name for found in blocks.values() for name in found], number(value, what)


def _block(value, names: list[str], what: str):
    """What is said of one block."""
    parts: dict[str, list[str]] = {}
    for name in names:
        _, part, index = place_of(name) or ("", "samplers", 0)
        parts.setdefault("sampler" if part == "samplers" else f"{part}_{index}", []).append(name)
    if isinstance(value, Mapping):
        for key, inner in value.items():
            chosen = (
                parts[key] if key in parts else _by_kind_or_glob(key, names, what, sorted(parts))
            )
            yield chosen, number(inner, f"{what}.{key}")
    elif _is_list(value) and len(value) > 1:
        counts = {
            part: sum(key.startswith(part) for key in parts) for part in ("attentions", "resnets")
        }
        if len(value) not in {count for count in counts.values() if count}:
            raise ValueError(
                f"{what}: a list of {len(value)} scales does not fit; the block has {counts['attentions']} "
                f"attentions and {counts['resnets']} resnets"
            )
        for key, chosen in parts.items():
            # samplers stand behind the last, and the middle block's second resnet behind its only attention
            index = (
                len(value) - 1
                if key == "sampler"
                else min(int(key.rsplit("_", 1)[1]), len(value) - 1)
            )
            yield chosen, number(value[index], f"{what}[{index}]")
    else:
        yield names, number(value[0] if _is_list(value) and value else value, what)


def _is_list(value) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, str)


def _text_factors(said, names: list[str], what: str):
    if not isinstance(said, Mapping):
        yield names, number(said, what)
        return
    layers: dict[str, list[str]] = {}
    for name in names:
        if found := _TEXT.match(name):
            layers.setdefault(f"layer_{found[1]}", []).append(name)
    for key, value in said.items():
        chosen = layers[key] if key in layers else _by_kind_or_glob(key, names, what, list(layers))
        yield chosen, number(value, f"{what}.{key}")


def _by_kind_or_glob(key: str, names: list[str], what: str, others: list[str]) -> list[str]:
    if not isinstance(key, str):
        raise ValueError(
            f"{what}: {key!r:.60} is no name; it has: {', '.join(others)}, kinds and globs of layer names"
        )
    if key in KINDS:
        return [name for name in names if kind_of(name) == key]
    found = (
        [name for name in names if fnmatchcase(name, key)]
        if any(c in key for c in "*?[.") or key in names
        else []
    )
    if not found:
        raise ValueError(
            f"{what}: the model has no {key!r:.60}; it has: {', '.join(others[:12])}; the kinds are "
            f"{', '.join(KINDS)}; a glob of layer names must fit one"
        )
    return found


def _blocks(names: Iterable[str]) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for name in names:
        if (block := block_of(name)) != "outside":
            found.setdefault(block, []).append(name)
    return found


def steps_of(scales, what: str = "the adapter") -> list[tuple[float, float, float]]:
    """The schedule over the denoising, (from, to, factor) each; empty where the scales say none.

    Shares of the run, half-open; what they leave out is at factor 1.
    Raises: ValueError for shares outside 0 to 1, backwards, or overlapping.
    """
    said = scales.get(STEPS, []) if isinstance(scales, Mapping) else []
    found = []
    if not _is_list(said):
        raise ValueError(
            f"{what}.steps must be a list of [from, to, factor], as [[0, 0.4, 1.0]], not {said!r:.80}"
        )
    for entry in said:
        if not _is_list(entry) or len(entry) != 3:
            raise ValueError(f"{what}.steps: {entry!r} is not [from, to, factor], as [0, 0.4, 1.0]")
        found.append(tuple(number(value, f"{what}.steps") for value in entry))
    for start, end, _ in found:
        if not 0 <= start < end <= 1:
            raise ValueError(
                f"{what}.steps: from {start:g} to {end:g} is no share of the run; give 0 ≤ from < to ≤ 1"
            )
    ordered = sorted(found)
    for (_, end, _), (start, _, _) in zip(ordered, ordered[1:], strict=False):
        if start < end:
            raise ValueError(
                f"{what}.steps: the shares overlap at {start:g}; let each begin where the last ends"
            )
    return ordered


@dataclass(frozen=True, repr=False)
class ScaleTable(Mapping):
    """Effective scales; `table[adapter][component][layer]` is a number.

    Attributes:
        layers: numbers by adapter, component and layer.
        steps: (from, to, factor) over the denoising by adapter, where there are any.
    """

    layers: Mapping[str, Mapping[str, Mapping[str, float]]]
    steps: Mapping[str, list] = field(default_factory=dict)

    def __getitem__(self, name: str):
        return self.layers[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.layers)

    def __len__(self) -> int:
        return len(self.layers)

    def by_block(self, name: str) -> dict[str, tuple[float, float]]:
        """The smallest and largest scale of an adapter by block: "down.0", "up.1 attentions.2", "text_encoder" …

        A block's parts are told apart where their scales differ.
        """
        found: dict[str, dict[str, list[float]]] = {}
        for part, layers in self.layers[name].items():
            for module, factor in layers.items():
                block = part if part.startswith("text_encoder") else block_of(module)
                place = place_of(module)
                found.setdefault(block, {}).setdefault(
                    f"{place[1]}.{place[2]}" if place else "", []
                ).append(factor)
        rows = {}
        for block, parts in found.items():
            numbers = [factor for factors in parts.values() for factor in factors]
            if min(numbers) == max(numbers) or len(parts) == 1:
                rows[block] = min(numbers), max(numbers)
            else:
                rows |= {
                    f"{block} {part}": (min(factors), max(factors))
                    for part, factors in parts.items()
                }
        return rows

    def _rows(self, name: str) -> list[tuple[str, str]]:
        rows = [
            (place, f"{low:g}" if low == high else f"{low:g} to {high:g}")
            for place, (low, high) in self.by_block(name).items()
        ]
        shares = [
            f"× {factor:g} from {start:.0%} to {end:.0%}"
            for start, end, factor in self.steps.get(name, ())
        ]
        return rows + [("over the denoising", ", ".join(shares))] * bool(shares)

    def __str__(self):
        return "\n".join(
            f"{name}: " + ", ".join(f"{place} {text}" for place, text in self._rows(name))
            for name in self
        )

    __repr__ = __str__

    def _repr_html_(self):
        return as_html(
            ["adapter", "layers", "scale"],
            [(name, *row) for name in self for row in self._rows(name)],
        )


@locked
def set_scales(pipe, scales: Mapping[str, object], *, only: bool = False) -> ScaleTable:
    """Scale adapters: 0 is the base model, 1 the adapter as trained, below 0 its ΔW subtracted.

    A scale multiplies the adapter's ΔW, whatever its kind. Every layer obeys; what the scales do not say is 1. Adapters
    that are not named keep their scale and state; those that are named take part from now on, unless all is at 0.

    Args:
        pipe: a pipeline with adapters.
        scales: for each adapter's name a number; a dictionary as in diffusers, and finer (see `expand`), with
            "steps": [[0, 0.4, 1.0], [0.4, 1, 0.3]] for shares of the denoising; a preset's name (see `PRESETS`); or the
            17, 12, 20 or 26 numbers of the A1111 block-weight extension.
        only: switch the adapters off that are not named.
    Returns: a ScaleTable with the number of each layer, which shows itself.
    Raises: ValueError for an adapter, component, block or layer that is not there, a scale that is not a finite number,
        or an adapter that is fused. Then nothing is changed.
    """
    if not isinstance(scales, Mapping):
        raise ValueError(
            f"scales must be a dictionary by adapter's name, as {{'ink': 0.5}}; not {scales!r:.80}"
        )
    modules = {part: dict(walk(model)) for part, model in models_of(pipe).items()}
    layers = {
        part: {name: layer for name, layer in found.items() if isinstance(layer, LoraLayer)}
        for part, found in modules.items()
    }
    check_known(pipe, scales, layers)
    said = {name: resolve_scales(pipe, value, name) for name, value in scales.items()}
    factors = {
        name: expand(value, modules, name, _touched(layers, name)) for name, value in said.items()
    }
    steps = {name: steps_of(value, name) for name, value in said.items()}
    if any(
        layer.use_dora.get(name)
        for name in scales
        for part in layers.values()
        for layer in part.values()
    ):
        make_scalable(pipe, scales)
        layers = lora_layers(pipe)
    keep_steady(layers)
    for name, parts in factors.items():
        for part, found in parts.items():
            for module, factor in found.items():
                put_factor(layers[part][module], name, factor)
    set_steps(pipe, steps)
    before = active_adapters(pipe, layers)
    # at 0 there is nothing to compute; but a model prepared for swapping is compiled, and goes on as it is
    working = {
        name: any(
            factor or isinstance(layers[part][module].scaling[name], Tensor)
            for part, found in parts.items()
            for module, factor in found.items()
        )
        for name, parts in factors.items()
    }
    activate(
        pipe,
        [
            name
            for name in adapter_names(pipe, layers)
            if working.get(name, name in before and not only)
        ],
        layers,
    )
    return ScaleTable(factors, {name: shares for name, shares in steps.items() if shares})


@locked
def scales_of(pipe) -> ScaleTable:
    """The scales that a pipeline's adapters have now, layer by layer; 0 throughout for those that are switched off."""
    active = set(active_adapters(pipe))
    table: dict[str, dict[str, dict[str, float]]] = {name: {} for name in adapter_names(pipe)}
    for part, layers in lora_layers(pipe).items():
        for module, layer in layers.items():
            for name in layer.scaling:
                table[name].setdefault(part, {})[module] = (
                    factor_of(layer, name) if name in active else 0.0
                )
    return ScaleTable(table, steps_on(pipe))


def resolve_scales(pipe, value, name: str):
    """A number or a dictionary for what was said: presets and block-weight vectors are looked up."""
    family = "sdxl" if "text_encoder_2" in models_of(pipe) else "sd"
    if isinstance(value, str):
        try:
            return _there(pipe, preset(value, family))
        except ValueError as error:
            raise ValueError(
                f"the scale of {name!r:.60} must be a finite number, scales or a preset's name; "
                f"{str(error):.300}"
            ) from None
    if isinstance(value, Sequence):
        return _there(
            pipe, from_block_weights([number(entry, name) for entry in value], family=family)
        )
    return value


def _there(pipe, scales: Mapping) -> dict:
    """Without the components that the pipeline lacks."""
    return {part: value for part, value in scales.items() if part in models_of(pipe)}


def layer_scales(pipe, name: str, scales) -> dict[str, dict[str, float]]:
    """One number for each layer that an adapter touches, by component and module."""
    modules = {part: dict(walk(model)) for part, model in models_of(pipe).items()}
    return expand(scales, modules, name, _touched(lora_layers(pipe), name))


def _touched(layers: Carrying, name: str) -> dict[str, list[str]]:
    return {
        part: touched
        for part, found in layers.items()
        if (touched := [module for module, layer in found.items() if name in layer.scaling])
    }


@contextmanager
def kept_scales(pipe):
    """Put every adapter's scale and state back at the end of the block."""
    make_scalable(pipe, adapter_names(pipe))
    layers = [layer for part in lora_layers(pipe).values() for layer in part.values()]
    keep_steady(lora_layers(pipe))
    steps, taking_part = steps_on(pipe), active_adapters(pipe)
    before = [
        {
            name: value.clone() if isinstance(value, Tensor) else value
            for name, value in layer.scaling.items()
        }
        for layer in layers
    ]
    try:
        yield
    finally:
        for layer, scaling in zip(layers, before, strict=True):
            for name in scaling.keys() & layer.scaling.keys():
                present = layer.scaling[name]
                if isinstance(present, Tensor) and isinstance(
                    scaling[name], Tensor
                ):  # a compiled model holds on to it
                    present.copy_(scaling[name])
                else:
                    layer.scaling[name] = scaling[name]
        set_steps(pipe, dict.fromkeys(steps_on(pipe), ()) | steps)
        if layers:
            activate(pipe, [name for name in taking_part if name in adapter_names(pipe)])
