"""The base model's own weights while adapters are fused into them."""
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from torch import Tensor, nn

from lorabook.adapters.adapter import Adapter


class FusedAdapter(NamedTuple):
    """One adapter's share in a model's fused weights.

    Attributes:
        ready: its weights by module.
        fused_at: the scale it was fused at by module.
        scales: the scale it had before by module.
        active: whether it took part before.
        rank: what its ranks were padded to for swapping, or None.
        adapter: what it was.
        order: the pipeline's adapters at that time.
    """

    ready: Mapping
    fused_at: Mapping[str, float]
    scales: Mapping[str, float]
    active: bool
    rank: int | None
    adapter: Adapter
    order: Sequence[str]


@dataclass
class Fused:
    """What is fused into a model; kept on the model itself, so that all pipelines that share it know.

    Attributes:
        weights: the original of each changed weight, by module name, on the CPU.
        parts: by adapter's name, in the order they came, what is needed to fuse it again without the others and to put
            it back on the pipeline.
    """

    weights: dict[str, Tensor] = field(default_factory=dict)
    parts: dict[str, "FusedAdapter"] = field(default_factory=dict)


def fused_in(model: nn.Module) -> Fused:
    """What is fused into a model; empty where nothing is."""
    if "_fused" not in model.__dict__:
        model.__dict__["_fused"] = Fused()
    return model.__dict__["_fused"]


def original(model: nn.Module, module: str, weight: Tensor) -> Tensor:
    """A layer's weight as the base model has it, whatever is fused.

    Args:
        module: the layer's name.
        weight: as it is now; gives device and precision.
    """
    kept = model.__dict__["_fused"].weights.get(module) if "_fused" in model.__dict__ else None
    return weight.detach() if kept is None else kept.to(weight)


def fused_names(models: Mapping[str, nn.Module]) -> list[str]:
    """The adapters fused into any of these models, in the order they came."""
    return list(dict.fromkeys(name for model in models.values() if "_fused" in model.__dict__
                              for name in model.__dict__["_fused"].parts))
