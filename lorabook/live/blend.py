"""Several adapters of a pipeline blended into a new one beside them."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import ClassVar

from diffusers import DiffusionPipeline
from pandas import DataFrame

from lorabook.live.inject import adapter_of, add_adapter
from lorabook.live.layers import activate, active_adapters, adapter_names, module_name
from lorabook.live.match import base_weights, match_layers
from lorabook.live.save import by_layer
from lorabook.live.scales import layer_scales, resolve_scales
from lorabook.live.state import check_known, fused_names, locked
from lorabook.lora.adapter import Adapter, Bases
from lorabook.lora.compare import Interference, compare_adapters, relative_error
from lorabook.lora.merge import Weights, merge
from lorabook.lora.source import read_source
from lorabook.show.tables import Report
from lorabook.types import Scales


@dataclass(frozen=True, eq=False, repr=False)
class BlendReport(Report):
    """What a blend is and how far it is from the sum of what it blends."""

    name: str
    method: str  # one of `lorabook.lora.merge.METHODS`
    weights: Weights  # by adapter, a number, or numbers by component and module
    ranks: Mapping[str, int]  # the largest in each adapter
    rank: int  # the largest in the blend
    error: Mapping[str, float]  # as `relative_error` gives it: "total", components, blocks
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
    pipe: DiffusionPipeline,
    weights: Mapping[str, Scales],
    *,
    method: str = "cat",
    new_name: str,
    density: float | None = None,
    rank: int | None = None,
    seed: int = 0,
    across_bases: bool = False,
) -> BlendReport:
    """Make one adapter of several; it is active in their place, and they stay on the pipeline.

    Active adapters that are not in the blend go on beside it.

    Args:
        pipe: A pipeline with the adapters.
        weights: By adapter's name a number, or scales as in `set_scales`; they weigh ΔW as trained.
        method: "cat" (exact), "linear", "svd", "ties", "dare_linear", "dare_ties",
            "magnitude_prune", and these four with "_svd" behind; as in PEFT, see `merge`.
        new_name: Of the blend.
        density: Share of values that the pruning methods keep, 0 to 1; None is 0.5.
        rank: What "svd" and the "_svd" methods cut to; None is the adapters' largest rank.
        seed: Of the dare methods.
        across_bases: Blend adapters whose files name different base models, too.

    Returns:
        A BlendReport with the relative error against the sum of ΔW.

    Raises:
        ValueError: For an unknown adapter, method or block, a name in use, a fused adapter,
            different base models, or a number out of range. Nothing is changed then.
    """
    if not (isinstance(weights, Mapping) and isinstance(new_name, str) and isinstance(seed, int)):
        raise ValueError(
            "a blend takes weights by adapter's name, as {'ink': 0.5}, a text as its new_name and "
            "a whole number as its seed"
        )
    check_known(pipe, weights)
    new_name = module_name(new_name)
    if new_name in (*adapter_names(pipe), *fused_names(pipe)):
        raise ValueError(
            f"the pipeline has an adapter {new_name!r} already; give the blend another name"
        )
    adapters = {name: adapter_of(pipe, name) for name in weights}
    numbers = {name: _numbers(pipe, adapters[name], name, weights[name]) for name in weights}
    bases = _bases_of(pipe, adapters.values())
    if not across_bases:
        _check_base_models(adapters)
    merged = merge(
        adapters, numbers, method=method, density=density, rank=rank, seed=seed, bases=bases
    )
    ranks = {name: adapter.rank for name, adapter in adapters.items()}
    error = relative_error(merged, adapters, numbers, bases=bases)
    lora_weights = match_layers(pipe, merged, f"blend {new_name!r}")
    others = [name for name in active_adapters(pipe) if name not in weights]
    add_adapter(pipe, new_name, lora_weights, replace(merged, format="blend"))
    activate(pipe, [*others, new_name])
    return BlendReport(new_name, method, numbers, ranks, merged.rank, error)


@locked
def interference(a, b, *, pipe: DiffusionPipeline | None = None) -> Interference:
    """How far two adapters work in the same directions: what to expect before blending them.

    Args:
        a: An adapter, as `load_adapter` takes it, or with a pipeline its name there.
        b: Another.
        pipe: Needed for DoRA, whose ΔW depends on the base weights.

    Returns:
        An Interference: by block, the cosine of the two ΔW and the principal angles of the spaces
        in which they work.

    Raises:
        ValueError: As `load_adapter`, or for layers whose shapes differ.
    """
    known = [] if pipe is None else adapter_names(pipe)
    adapters = [adapter_of(pipe, x) if x in known else read_source(x).adapter for x in (a, b)]
    bases = None if pipe is None else _bases_of(pipe, adapters)
    names = (a if isinstance(a, str) else "first", b if isinstance(b, str) else "second")
    return compare_adapters(*adapters, names=names, bases=bases)


def _bases_of(pipe: DiffusionPipeline, adapters: Iterable[Adapter]) -> Bases:
    """The base model's weights of all layers that the adapters have."""
    bases: dict[str, dict] = {}
    for adapter in adapters:
        for component, weights in base_weights(pipe, adapter).items():
            bases.setdefault(component, {}).update(weights)
    return bases


def _numbers(pipe: DiffusionPipeline, adapter: Adapter, name: str, weight: Scales):
    """One number, or a number a layer."""
    scales = resolve_scales(pipe, weight, name)
    if not isinstance(scales, Mapping):
        return scales
    if "steps" in scales:
        raise ValueError(
            f"a blend's weight of {name!r} cannot change over the denoising; leave out steps"
        )
    return by_layer(adapter, layer_scales(pipe, name, scales))


def _check_base_models(adapters: Mapping[str, Adapter]) -> None:
    named = [(name, adapter.base_model) for name, adapter in adapters.items() if adapter.base_model]
    for name, base_model in named:
        if base_model != named[0][1]:
            raise ValueError(
                f"{named[0][0]!r} was made for {named[0][1]} and {name!r} for {base_model}; give "
                "across_bases=True if the two are near enough"
            )
