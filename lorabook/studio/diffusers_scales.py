"""Scales in the dictionary that diffusers' own `set_adapters` takes, as near as it can say them."""

import math
from collections import Counter
from collections.abc import Mapping

from lorabook.blocks import place_of
from lorabook.live.layers import models_of, walk
from lorabook.live.scales import layer_scales

Unet = dict[str, float]


def as_diffusers(pipe, name: str, scales) -> tuple[float | dict, str]:
    """One adapter's scales for `pipe.set_adapters`.

    A dictionary of diffusers has a number for each transformer of a UNet, which the resnet and sampler of its number obey
    too; whatever else a UNet has stays at 1.

    Args:
        name: an adapter on the pipeline.
        scales: as `set_scales` takes them for it.
    Returns: the number or dictionary, and "" or a sentence on what it does not say.
    """
    factors = layer_scales(pipe, name, scales)
    values = [value for found in factors.values() for value in found.values()]
    if len(set(values)) < 2:
        return (values or [1.0])[0], ""
    said: dict = {part: _usual(found.values()) for part, found in factors.items()}
    there = {part: dict.fromkeys(found, said[part]) for part, found in factors.items()}
    unet = factors.get("unet", {})
    if len(set(unet.values())) > 1 and all(len(module.split(".")) > 3 for module in unet):
        said["unet"], there["unet"] = _by_transformer(
            unet, [name for name, _ in walk(models_of(pipe)["unet"])]
        )
    return said, _difference(factors, there)


def _by_transformer(factors: Mapping[str, float], modules: list[str]) -> tuple[dict, Unet]:
    """The UNet's dictionary, and what it makes of each layer."""
    values: dict[tuple, list[float]] = {}
    for module, value in factors.items():
        values.setdefault(place_of(module), []).append(value)
    numbers: dict[str, dict[int, float]] = {}
    for module in modules:
        if (place := place_of(module)) and place[1] == "attentions":
            block, _, index = place
            own = values.get(place) or values.get((block, "resnets", index)) or []
            numbers.setdefault(block, {})[index] = _usual(own)
    said: dict = {}
    for block, found in numbers.items():
        side, _, number = block.partition(".")
        values = [found[index] for index in sorted(found)]
        if side == "mid":
            said["mid"] = values[0]
        else:
            said.setdefault(side, {})[f"block_{number}"] = (
                values[0] if len(set(values)) == 1 else values
            )
    return said, {module: _obeyed(module, numbers) for module in factors}


def _obeyed(module: str, numbers: Mapping[str, Mapping[int, float]]) -> float:
    block, what, index = place_of(module) or ("outside", "", 0)
    if block == "mid" and what != "attentions":
        return 1.0
    return numbers.get(block, {}).get(index, 1.0)


def _difference(
    wanted: Mapping[str, Mapping[str, float]], there: Mapping[str, Mapping[str, float]]
) -> str:
    apart = [
        (part, module)
        for part, found in wanted.items()
        for module, value in found.items()
        if not math.isclose(value, there[part][module], abs_tol=1e-9)
    ]
    if not apart:
        return ""
    part, module = apart[0]
    return (
        f"diffusers cannot say {len(apart)} of these scales; {part}.{module} is at {there[part][module]:g} where the "
        f"studio has {wanted[part][module]:g}; lb.set_scales can"
    )


def _usual(values) -> float:
    counts = Counter(values)
    return counts.most_common(1)[0][0] if counts else 1.0
