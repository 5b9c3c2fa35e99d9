"""A scales dictionary, checked and expanded to one number a layer."""

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from numbers import Real

from lorabook.blocks import KINDS, block_of, kind_of, place_of

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
