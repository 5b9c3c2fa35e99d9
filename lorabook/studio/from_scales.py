"""The settings that come nearest to what is on a pipeline, or to a preset."""

import math
from collections import Counter
from collections.abc import Mapping, Sequence

from lorabook.blocks import block_of, kind_of, place_of
from lorabook.studio.settings import BLOCK, AdapterSettings

Factors = Mapping[str, Mapping[str, float]]


def nearest_settings(factors: Factors, **others) -> AdapterSettings:
    """The settings that come nearest to one number a layer; exact unless layers within a part differ.

    Args:
        factors: numbers by component and module, for the layers that the adapter touches: a ScaleTable's `table["ink"]`,
            or `layer_scales(pipe, "ink", preset("style blocks"))`.
        **others: further fields (on, rank).
    """
    scale, alike = _most_common([value for found in factors.values() for value in found.values()])
    if alike or "transformer" in factors:  # whose blocks have no sliders
        return AdapterSettings(scale=scale, **others)
    scale = scale or 1.0
    for say in (_by_block, _by_kind, _by_part):
        made = AdapterSettings(scale=scale, **say(factors, scale), **others)
        if say is _by_part or _fits(made, factors):
            return made


def _block(part: str, module: str) -> str:
    return block_of(module) if part == "unet" else part


def _by_block(factors, scale: float) -> dict:
    return {"blocks": _means(factors, scale, _block)}


def _by_kind(factors, scale: float) -> dict:
    """Kinds of the UNet's layers; text encoders are blocks."""
    kinds = _means({"unet": factors.get("unet", {})}, scale, lambda part, module: kind_of(module))
    texts = {part: found for part, found in factors.items() if part.startswith("text_encoder")}
    return {"parts": kinds, "blocks": _means(texts, scale, _block)}


def _by_part(factors, scale: float) -> dict:
    means = _means(factors, scale, _part)
    return {
        "parts": {key: value for key, value in means.items() if not BLOCK.fullmatch(key)},
        "blocks": {key: value for key, value in means.items() if BLOCK.fullmatch(key)},
    }


def _part(part: str, module: str) -> str:
    place = place_of(module) if part == "unet" else None
    if place is None:
        return _block(part, module)
    block, what, number = place
    return f"{block}.sampler" if what == "samplers" else f"{block}.{what}_{number}"


def _means(factors, scale: float, group) -> dict[str, float]:
    found: dict[str, list[float]] = {}
    for part, layers in factors.items():
        for module, value in layers.items():
            found.setdefault(group(part, module), []).append(value / scale)
    return {key: round(sum(values) / len(values), 6) for key, values in found.items()}


def _fits(made: AdapterSettings, factors) -> bool:
    said = made.blocks, made.parts
    return all(
        math.isclose(
            made.scale
            * said[0].get(_block(part, module), 1.0)
            * (said[1].get(kind_of(module), 1.0) if part == "unet" else 1.0),
            value,
            abs_tol=1e-5,
        )
        for part, layers in factors.items()
        for module, value in layers.items()
    )


def _most_common(values: Sequence[float]) -> tuple[float, bool]:
    """The number that most layers have, and whether all do."""
    counts = Counter(round(value, 6) for value in values)
    return counts.most_common(1)[0][0] if counts else 1.0, len(counts) < 2
