"""The layers of an adapter in numbers: how strong each is, in how many directions, and what looks wrong."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from statistics import median

import torch
from torch import Tensor

from lorabook.blocks import block_of, kind_of, place_of
from lorabook.lora.adapter import Adapter, Layer
from lorabook.lora.resize import singular_values
from lorabook.lowrank import effective_rank

TOO_STRONG = 10  # times the median norm of the layers of its kind
TOO_NARROW = 0.1  # of the rank; an effective rank below is suspicious
SCALINGS = (0.01, 100)  # alpha / rank outside of these is hardly meant so


@dataclass(frozen=True, eq=False)
class LayerView:
    """One layer of an adapter, in numbers.

    Attributes:
        component, module: where it is.
        kind: "lora", "loha", "lokr" or "full".
        rank: as the file speaks of it; 0 where it holds the whole ΔW.
        scaling: alpha / rank.
        numbers: how many the file holds for it, alpha aside.
        spectrum: (k,) the singular values of ΔW, falling; NaN alone where a weight is not finite.
    """

    component: str
    module: str
    kind: str
    rank: int
    scaling: float
    numbers: int
    spectrum: Tensor

    @property
    def name(self) -> str:
        """Component and module."""
        return f"{self.component}.{self.module}"

    @cached_property
    def block(self) -> str:
        """Its block in the UNet, else its component."""
        return block_of(self.module) if self.component == "unet" else self.component

    @cached_property
    def place(self) -> str:
        """Its part of the block, as "down.0.attentions_1" or "up.1.sampler"; the block where it has no parts."""
        found = place_of(self.module) if self.component == "unet" else None
        if found is None:
            return self.block
        block, part, number = found
        return f"{block}.sampler" if part == "samplers" else f"{block}.{part}_{number}"

    @cached_property
    def is_finite(self) -> bool:
        """Whether all its weights are finite."""
        return bool(self.spectrum.isfinite().all())

    @cached_property
    def norm(self) -> float:
        """‖ΔW‖, the Frobenius norm; NaN where a weight is not finite."""
        return float(self.spectrum.double().norm())

    @cached_property
    def effective_rank(self) -> float:
        """How many directions ΔW really uses; NaN where a weight is not finite."""
        return effective_rank(self.spectrum) if self.is_finite else float("nan")


def views_of(adapter: Adapter) -> tuple[LayerView, ...]:
    """All layers of an adapter in numbers; a DoRA's by its LoRA part, as the rest depends on the base."""
    return tuple(
        _view(part, module, layer)
        for part, layers in adapter.layers.items()
        for module, layer in layers.items()
    )


def norm_of(views: Iterable[LayerView]) -> float:
    """‖ΔW‖ of layers together, those left out that are not finite."""
    return sum(view.norm**2 for view in views if view.is_finite) ** 0.5


def doubts_about(views: Iterable[LayerView]) -> dict[str, str]:
    """Layers that look wrong, by name, with the reason."""
    norms: dict[tuple[str, str], list[float]] = {}
    for view in views:
        if view.is_finite and view.norm:
            norms.setdefault((view.component, kind_of(view.module)), []).append(view.norm)
    usual = {kind: median(found) for kind, found in norms.items()}
    found = {view.name: _doubt(view, usual) for view in views}
    return {name: reason for name, reason in found.items() if reason}


def _doubt(view: LayerView, usual: Mapping[tuple[str, str], float]) -> str:
    kind = view.component, kind_of(view.module)
    if not view.is_finite:
        return "has weights that are not finite; its training failed"
    if not SCALINGS[0] <= abs(view.scaling) <= SCALINGS[1]:
        return f"alpha / rank is {view.scaling:g}; alpha was hardly meant so"
    if not view.norm:
        return "ΔW is all zeros, so it does nothing"
    if view.norm > TOO_STRONG * usual[kind]:
        return f"‖ΔW‖ is {view.norm / usual[kind]:.0f} times the median of {kind[0]}'s {kind[1]} layers"
    if view.kind == "lora" and view.effective_rank < TOO_NARROW * min(
        view.rank, len(view.spectrum)
    ):
        return f"its effective rank is {view.effective_rank:.1f}, far below its rank of {view.rank}"
    return ""


def _view(component: str, module: str, layer: Layer) -> LayerView:
    tensors = [*layer.tensors.values(), *([layer.magnitude] if layer.magnitude is not None else [])]
    finite = all(tensor.isfinite().all() for tensor in tensors)
    spectrum = (
        _spectrum(replace(layer, magnitude=None, start=None))
        if finite
        else torch.tensor([float("nan")])
    )
    return LayerView(
        component,
        module,
        layer.kind,
        layer.rank,
        layer.scaling,
        sum(t.numel() for t in tensors),
        spectrum,
    )


def _spectrum(layer: Layer) -> Tensor:
    if layer.kind == "lokr" and {"w1", "w2"} <= layer.tensors.keys():
        # a Kronecker product's singular values are the products of those of its factors
        one, two = (
            torch.linalg.svdvals(layer.tensors[role].float().flatten(1)) for role in ("w1", "w2")
        )
        return abs(layer.scaling) * torch.outer(one, two).flatten().sort(descending=True)[0]
    return singular_values(*layer.factors())
