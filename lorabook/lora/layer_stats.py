"""The layers of an adapter in numbers: how strong, in how many directions, and what looks wrong."""

from dataclasses import replace

import torch
from pandas import DataFrame
from torch import Tensor

from lorabook.blocks import block_of, group_by_block, kind_of, place_of
from lorabook.lora.adapter import Adapter, Layer
from lorabook.lowrank import effective_rank, singular_values

TOO_STRONG = 10  # times the median norm of the layers of its kind
TOO_NARROW = 0.1  # of the rank; an effective rank below is suspicious
SCALINGS = (0.01, 100)  # alpha / rank outside of these is hardly meant so


def layer_table(adapter: Adapter) -> DataFrame:
    """The layers of an adapter in numbers, a row each, by block in the order of the UNet.

    A DoRA, PiSSA or OLoRA is measured by its LoRA part, as the rest depends on the base model.

    Returns:
        Columns component, module, name, block, place ("down.0.attentions_1"), kind ("lora", "loha",
        "lokr", "full"), rank (0 where the file holds the whole ΔW), scaling (alpha / rank), numbers
        (how many the file holds, alpha aside), spectrum (the singular values of ΔW, falling),
        is_finite, norm (‖ΔW‖, Frobenius) and effective_rank. Where a weight is not finite, the
        last two are NaN.
    """
    layers = adapter.flat
    places = [place for block in group_by_block(layers).values() for place in block]
    return DataFrame([_row(*place, layers[place]) for place in places])


def norm_of(table: DataFrame) -> float:
    """‖ΔW‖ of layers together, those left out that are not finite.

    Args:
        table: From `layer_table`, or some of its rows.
    """
    return float((table["norm"] ** 2).sum() ** 0.5)


def doubts_about(table: DataFrame) -> dict[str, str]:
    """Layers that look wrong, by name, with the reason; `table` is one of `layer_table`."""
    sorts = table["component"] + "'s " + table["module"].map(kind_of)
    usual = table["norm"].where(table["norm"] > 0).groupby(sorts).transform("median")
    rows = table.assign(sort=sorts, usual=usual).itertuples(index=False)
    doubts = {row.name: _doubt(row) for row in rows}
    return {name: reason for name, reason in doubts.items() if reason}


def _doubt(row) -> str:
    if not row.is_finite:
        return "has weights that are not finite; its training failed"
    if not SCALINGS[0] <= abs(row.scaling) <= SCALINGS[1]:
        return f"alpha / rank is {row.scaling:g}; alpha was hardly meant so"
    if not row.norm:
        return "ΔW is all zeros, so it does nothing"
    if row.norm > TOO_STRONG * row.usual:
        return f"‖ΔW‖ is {row.norm / row.usual:.0f} times the median of {row.sort} layers"
    rank = min(row.rank, len(row.spectrum))
    if row.kind == "lora" and row.effective_rank < TOO_NARROW * rank:
        return f"its effective rank is {row.effective_rank:.1f}, far below its rank of {row.rank}"
    return ""


def _row(component: str, module: str, layer: Layer) -> dict[str, object]:
    tensors = [*layer.tensors.values(), *([layer.magnitude] if layer.magnitude is not None else [])]
    is_finite = all(tensor.isfinite().all() for tensor in tensors)
    spectrum = _spectrum(layer) if is_finite else torch.tensor([float("nan")])
    block = place = component
    if component == "unet":
        block = place = block_of(module)
        if where := place_of(module):
            _, part, number = where
            place = f"{block}.sampler" if part == "samplers" else f"{block}.{part}_{number}"
    return {
        "component": component,
        "module": module,
        "name": f"{component}.{module}",
        "block": block,
        "place": place,
        "kind": layer.kind,
        "rank": layer.rank,
        "scaling": layer.scaling,
        "numbers": sum(tensor.numel() for tensor in tensors),
        "spectrum": spectrum,
        "is_finite": is_finite,
        "norm": float(spectrum.double().norm()),
        "effective_rank": effective_rank(spectrum) if is_finite else float("nan"),
    }


def _spectrum(layer: Layer) -> Tensor:
    layer = replace(layer, magnitude=None, start=None)
    if layer.kind == "lokr" and {"w1", "w2"} <= layer.tensors.keys():
        # a Kronecker product's singular values are the products of those of its factors
        halves = (layer.tensors[role].float().flatten(1) for role in ("w1", "w2"))
        one, two = (torch.linalg.svdvals(half) for half in halves)
        return abs(layer.scaling) * torch.outer(one, two).flatten().sort(descending=True)[0]
    return singular_values(*layer.factors())
