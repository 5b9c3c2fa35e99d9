"""Several adapters of a pipeline blended into a new one beside them."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from pandas import DataFrame

from lorabook.live.inject import adapter_of, add_adapter
from lorabook.live.layers import activate, active_adapters, adapter_names, module_name
from lorabook.live.match import base_weights, match_layers
from lorabook.live.scales import layer_scales, resolve_scales
from lorabook.live.state import check_known, fused_names, locked
from lorabook.lora.adapter import Adapter
from lorabook.lora.compare import Interference, compare_adapters, relative_error
from lorabook.lora.merge import Weights, merge
from lorabook.lora.source import read_source
from lorabook.show.tables import Report


@dataclass(frozen=True, eq=False, repr=False)
class BlendReport(Report):
    """What a blend is and how far it is from the sum of what it blends.

    Attributes:
        name: The blend's name.
        method: One of `lorabook.lora.merge.METHODS`.
        weights: By adapter, a number, or numbers by component and module.
        ranks: The largest rank in each adapter.
        rank: The largest rank in the blend.
        error: As `relative_error` gives it: "total", components, blocks.
    """

    name: str
    method: str
    weights: Weights
    ranks: Mapping[str, int]
    rank: int
    error: Mapping[str, float]
    formats: ClassVar = {"relative_error": "{:.2g}"}

    @property
    def table(self) -> DataFrame:
        """The relative error against the sum of ΔW: in all, by component and by block."""
        return DataFrame(self.error.items(), columns=["where", "relative_error"])

    @property
    def note(self) -> str:
        """The blend in a sentence."""
        parts = []
        for name, weight in self.weights.items():
            amount = "by layer" if isinstance(weight, Mapping) else f"{weight:g}"
            parts.append(f"{name!r} (weight {amount}, rank {self.ranks[name]})")
        blend = f"blend {self.name!r} by {self.method}, rank {self.rank}, of {', '.join(parts)}"
        return f"{blend}; relative error against the sum of ΔW {self.error['total']:.2g}"


@locked
def blend(
    pipe,
    weights: Mapping[str, object],
    *,
    method: str = "cat",
    new_name: str,
    density: float | None = None,
    rank: int | None = None,
    seed: int = 0,
    across_bases: bool = False,
) -> BlendReport:
    """Make one adapter of several; it takes part in their place, and they stay on the pipeline, switched off.

    Adapters that it is not made of stay as they are: those that take part go on beside the blend.

    Args:
        pipe: a pipeline with the adapters.
        weights: by adapter's name a number, or scales as in `set_scales`; they weigh ΔW as trained.
        method: "cat" (exact), "linear", "svd", "ties", "ties_svd", "dare_linear", "dare_linear_svd", "dare_ties",
            "dare_ties_svd", "magnitude_prune", "magnitude_prune_svd", with the meaning they have in PEFT; see `merge`.
        new_name: of the blend.
        density: share of values that the pruning methods keep, 0 to 1; None is 0.5.
        rank: what "svd" and the "_svd" methods cut to; None is the largest rank among the adapters.
        seed: of the dare methods.
        across_bases: blend adapters whose files name different base models too.
    Returns: a BlendReport with the relative error against the sum of ΔW.
    Raises: ValueError for unknown adapters, methods or blocks, a name in use, a fused adapter, different base models, or a
        number out of range. Nothing is changed then.
    """
    if (
        not isinstance(weights, Mapping)
        or not isinstance(new_name, str)
        or not isinstance(seed, int)
    ):
        raise ValueError(
            "a blend takes weights by adapter's name, as {'ink': 0.5, 'creatures': 0.5}, a text as its "
            "new_name and a whole number as its seed"
        )
    check_known(pipe, weights)
    new_name = module_name(new_name)
    if new_name in (*adapter_names(pipe), *fused_names(pipe)):
        raise ValueError(
            f"the pipeline has an adapter {new_name!r} already; give the blend another name"
        )
    adapters, said, bases = gathered(pipe, weights)
    if not across_bases:
        _check_bases(adapters)
    merged = merge(
        adapters, said, method=method, density=density, rank=rank, seed=seed, bases=bases
    )
    ranks = {name: adapter.rank for name, adapter in adapters.items()}
    error = relative_error(merged, adapters, said, bases=bases)
    weights_by_layer = match_layers(pipe, merged, f"blend {new_name!r}")
    others = [name for name in active_adapters(pipe) if name not in weights]
    add_adapter(pipe, new_name, weights_by_layer, replace(merged, format="blend"))
    activate(pipe, [*others, new_name])
    return BlendReport(new_name, method, said, ranks, merged.rank, error)


@locked
def interference(a, b, *, pipe=None) -> Interference:
    """How far two adapters work in the same directions, by block: before blending, what to expect of it.

    Args:
        a, b: adapters, as `load_adapter` takes them, or with a pipeline their names on it.
        pipe: needed for DoRA, whose ΔW depends on the base weights.
    Returns: an Interference with the cosine of the two ΔW and the principal angles of the spaces they work in; it shows
        itself.
    Raises: ValueError as `load_adapter`, or where the two have no layer in common.
    """
    names = adapter_names(pipe) if pipe is not None else []
    first, second = (
        adapter_of(pipe, one) if one in names else read_source(one).adapter for one in (a, b)
    )
    bases: dict[str, dict[str, torch.Tensor]] = {}
    for adapter in (first, second) if pipe is not None else ():
        for part, found in base_weights(pipe, adapter).items():
            bases.setdefault(part, {}).update(found)
    told = tuple(
        one if isinstance(one, str) else label for one, label in ((a, "first"), (b, "second"))
    )
    return compare_adapters(first, second, names=told, bases=bases or None)


def gathered(
    pipe, weights: Mapping[str, object]
) -> tuple[dict[str, Adapter], dict[str, object], dict]:
    """What `merge` wants: the adapters, their weights as numbers or by layer, and the base weights of all their layers."""
    adapters = {name: adapter_of(pipe, name) for name in weights}
    said = {name: _weights(pipe, name, value, adapters[name]) for name, value in weights.items()}
    bases: dict[str, dict[str, torch.Tensor]] = {}
    for adapter in adapters.values():
        for part, found in base_weights(pipe, adapter).items():
            bases.setdefault(part, {}).update(found)
    return adapters, said, bases


def _weights(pipe, name: str, value, adapter: Adapter):
    plain = resolve_scales(pipe, value, name)
    if not isinstance(plain, Mapping):
        return plain
    if "steps" in plain:
        raise ValueError(
            f"the weight of {name!r} changes over the denoising, which a blend cannot; leave out its steps"
        )
    factors = layer_scales(pipe, name, plain)
    return {
        part: {
            module: factors[part].get(
                module, factors[part].get(module.removeprefix("text_model."), 1.0)
            )
            for module in layers
        }
        for part, layers in adapter.layers.items()
    }


def _check_bases(adapters: Mapping[str, Adapter]) -> None:
    named = {name: adapter.base_model for name, adapter in adapters.items() if adapter.base_model}
    if len(set(named.values())) > 1:
        (one, its), (other, theirs) = next(
            (a, b) for a in named.items() for b in named.items() if a[1] != b[1]
        )
        raise ValueError(
            f"{one!r} was made for {its} and {other!r} for {theirs}; blend adapters of one base model, or give "
            "across_bases=True if the two are near enough"
        )
