"""Adapters on a pipeline cut to smaller ranks, and back."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lorabook.live.inject import adapter_of, source_of, write_weights
from lorabook.live.layers import adapter_names, layers_of
from lorabook.live.manage import swap_adapter
from lorabook.live.match import base_weights, match_layers
from lorabook.live.state import check_known, lock_of
from lorabook.lora.adapter import Adapter
from lorabook.lora.shapes import as_lora, shapes_of
from lorabook.lowrank import Svd, svd, truncated


@dataclass(frozen=True)
class _Decomposed:
    """An adapter as trained, with the decomposition and the shape of each layer; no base weight is held on to."""

    adapter: Adapter
    svds: Mapping[tuple[str, str], Svd]
    shapes: Mapping[str, Mapping[str, tuple[int, ...]]]

    @classmethod
    def of(cls, adapter: Adapter, bases: Mapping[str, Mapping[str, Tensor]]):
        """Of an adapter, whose weights are copied: a swap writes into what is on the pipeline."""
        kept = {
            part: {module: layer.map(Tensor.clone) for module, layer in found.items()}
            for part, found in adapter.layers.items()
        }
        svds = {
            (part, module): tuple(
                half.float() for half in svd(*layer.factors(bases.get(part, {}).get(module)))
            )
            for part, found in kept.items()
            for module, layer in found.items()
        }
        return cls(replace(adapter, layers=kept), svds, shapes_of(adapter, bases))

    def cut(self, rank: int) -> Adapter:
        """The adapter with each layer at the best approximation of a rank; smaller layers stay as they are."""
        layers = {
            part: {
                module: as_lora(
                    *truncated(*self.svds[part, module], rank), self.shapes[part][module]
                )
                if len(self.svds[part, module][1]) > rank
                else layer
                for module, layer in found.items()
            }
            for part, found in self.adapter.layers.items()
        }
        return replace(self.adapter, layers=layers)

    def energy(self, rank: int) -> float:
        """The share of ‖ΔW‖² that is left at a rank."""
        squares = [svd[1].double().square() for svd in self.svds.values()]
        total = float(sum(values.sum() for values in squares))
        return float(sum(values[:rank].sum() for values in squares)) / total if total else 1.0


class Ranks:
    """What was cut on a pipeline, with the originals beside."""

    def __init__(self, pipe):
        self.pipe = pipe
        self._kept: dict[str, _Decomposed] = {}
        self._largest: dict[str, int] = {}
        self.cut: dict[str, int] = {}

    def largest(self, name: str) -> int:
        """The largest rank among an adapter's layers, as trained."""
        return self._known(
            self._largest,
            name,
            lambda: max(
                layer.lora_A[name].weight.shape[0]
                for found in layers_of(self.pipe, name).values()
                for layer in found.values()
            ),
        )

    def energy(self, name: str, rank: int) -> float:
        """The share of an adapter's ‖ΔW‖² that is left at a rank, 0 to 1."""
        return self._original(name).energy(rank)

    def set(self, name: str, rank: int | None) -> None:
        """Cut an adapter to a rank, from what it was as trained; None puts that back. Its scales stay."""
        if rank is not None and rank >= self.largest(name):
            rank = None
        if rank == self.cut.get(name):
            return
        kept = self._original(name)
        _put(self.pipe, name, kept.adapter if rank is None else kept.cut(rank))
        self.cut.pop(name, None)
        if rank is not None:
            self.cut[name] = rank

    def forget(self, name: str) -> None:
        """Another adapter has this name now, or none has."""
        for known in (self._kept, self._largest, self.cut):
            known.pop(name, None)

    def close(self) -> None:
        """Put all back."""
        for name in [name for name in self.cut if name in adapter_names(self.pipe)]:
            self.set(name, None)
        self._kept.clear()

    @torch.no_grad()
    def _original(self, name: str) -> _Decomposed:
        self.largest(name)  # to be known before it is cut

        def decompose() -> _Decomposed:
            adapter = adapter_of(self.pipe, name)
            return _Decomposed.of(adapter, base_weights(self.pipe, adapter))

        return self._known(self._kept, name, decompose)

    def _known(self, kept: dict, name: str, find: Callable):
        """What is kept of an adapter; the pipeline is looked at, and waited for, the first time only."""
        if name not in kept:
            with lock_of(self.pipe):
                if name not in kept:
                    check_known(self.pipe, [name])
                    kept[name] = find()
        return kept[name]


def _put(pipe, name: str, adapter: Adapter) -> None:
    """Put an adapter of the same layers in the place of one, really at its rank; its scales stay."""
    there = layers_of(pipe, name)
    if any(
        isinstance(layer.scaling[name], Tensor)
        for found in there.values()
        for layer in found.values()
    ):
        swap_adapter(pipe, name, adapter)  # a model prepared for swapping has padded ranks
        return
    weights = match_layers(pipe, adapter, f"adapter {name!r}")
    write_weights(pipe, name, weights, adapter, source=source_of(pipe, name))
