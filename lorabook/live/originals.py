"""The base model's own weights while adapters are fused into them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from lorabook.lora.adapter import Adapter


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
        came_from: its source, as `load_adapter` was told, or None.
    """

    ready: Mapping
    fused_at: Mapping[str, float]
    scales: Mapping[str, float]
    active: bool
    rank: int | None
    adapter: Adapter
    order: Sequence[str]
    came_from: str | None


@dataclass
class Fused:
    """What is fused into a model; kept on the model itself, so that all pipelines that share it know.

    Attributes:
        weights: the original of each changed weight, by module name, on the CPU.
        parts: by adapter's name, in the order they came, what is needed to fuse it again without the others and to put
            it back on the pipeline.
        for_good: the adapters whose originals were let go.
        hook: what tells of a call's own scale, see `call_scale`.
    """

    weights: dict[str, Tensor] = field(default_factory=dict)
    parts: dict[str, FusedAdapter] = field(default_factory=dict)
    for_good: tuple[str, ...] = ()
    hook: RemovableHandle | None = None


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
    return list(
        dict.fromkeys(
            name
            for model in models.values()
            if "_fused" in model.__dict__
            for name in model.__dict__["_fused"].parts
        )
    )


def let_go(models: Mapping[str, nn.Module]) -> None:
    """Keep what is fused for good, and free the originals and the adapters' own weights."""
    for model in models.values():
        record = fused_in(model)
        record.for_good += tuple(name for name in record.parts if name not in record.for_good)
        record.weights, record.parts = {}, {}
