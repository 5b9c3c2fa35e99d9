"""Adapters of a pipeline, or from anywhere, written in any form and at any rank."""

import html
import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from diffusers import DiffusionPipeline
from torch import Tensor

from lorabook.checks import listed
from lorabook.live.inject import adapter_of
from lorabook.live.layers import adapter_names, base_weight, models_of, walk
from lorabook.live.match import base_weights
from lorabook.live.scales import scales_of
from lorabook.live.state import check_known, locked, original_weight
from lorabook.live.upstream import check_weights_available
from lorabook.lora.adapter import Adapter, Bases, Layer
from lorabook.lora.formats.keys import text_name
from lorabook.lora.formats.write import as_written, write
from lorabook.lora.metadata import public_name
from lorabook.lora.resize import ResizeReport, difference, resize
from lorabook.lora.shapes import as_lora
from lorabook.lora.source import read_source


@dataclass(frozen=True, repr=False)
class SaveReport(os.PathLike):
    """What was written; stands for its path wherever a path is wanted."""

    path: Path  # the file or folder that `load_adapter` reads
    format: str  # "diffusers", "peft" or "kohya"
    kinds: tuple[str, ...]  # of the layers in it
    rank: int  # the largest
    resized: ResizeReport | None = None  # what a smaller rank cost

    @property
    def error(self) -> float:
        """‖ΔW − ΔW written‖ / ‖ΔW‖; 0 without a smaller rank."""
        return self.resized.total.error if self.resized else 0.0

    def __fspath__(self) -> str:
        return str(self.path)

    def __str__(self) -> str:
        cost = f"{self.error:.1%} off its ΔW" if self.resized else "ΔW exact"
        kinds = " and ".join(self.kinds)
        return f"{self.path}: {self.format}, {kinds}, rank up to {self.rank}, {cost}"

    __repr__ = __str__

    def _repr_html_(self) -> str:
        return f"<p>{html.escape(str(self))}</p>"


@locked
def save_adapter(
    source,
    target: str | os.PathLike,
    format: str = "diffusers",
    *,
    name: str | None = None,
    rank: int | None = None,
    bake_scales: bool = False,
    **find,
) -> SaveReport:
    """Write an adapter in a form that others read; alpha and metadata come along.

    What a form does not hold (LoHa and LoKr in diffusers' and PEFT's) becomes the LoRA of that ΔW.

    Args:
        source: A pipeline, or anything that `load_adapter` takes.
        target: A folder, or a file where it ends in .safetensors.
        format: "diffusers", "peft" (a folder with adapter_config.json, one for each component
            where there are several) or "kohya" (which A1111 and ComfyUI read; LoHa, LoKr and DoRA
            as LyCORIS writes them).
        name: Which adapter of the pipeline, where it has several.
        rank: Approximate layers of a larger rank by this one.
        bake_scales: With a pipeline, write the adapter with its scales of now multiplied in.
        **find: For a source that is no pipeline, as in `load_adapter`.

    Returns:
        A SaveReport, which stands for the path.

    Raises:
        ValueError: For an unknown format or adapter, scales that change over the denoising, a DoRA
            that the form cannot hold without its base model, or a source that is not readable.
    """
    adapter, bases = _read(source, name, bake_scales, find)
    resized = None
    if rank is not None:
        adapter, resized = resize(adapter, rank=rank, bases=bases)
    adapter = as_written(adapter, format, bases)
    path = write(adapter, Path(target), format)
    return SaveReport(path, format, adapter.kinds, adapter.rank, resized)


@locked
def resize_adapter(
    source,
    target: str | os.PathLike,
    *,
    rank: int | None = None,
    energy: float | None = None,
    format: str = "diffusers",
    name: str | None = None,
    **find,
) -> ResizeReport:
    """Write an adapter at a smaller rank: each layer's best approximation, by SVD.

    Args:
        source: As in `save_adapter`, like `target`, `format`, `name` and `find`.
        target: A folder, or a file where it ends in .safetensors.
        rank: The largest rank of a layer.
        energy: Instead, the share of ‖ΔW‖² that each layer keeps, above 0, up to 1.

    Returns:
        A ResizeReport with the energy kept by layer.

    Raises:
        ValueError: Unless one of rank and energy is given, and as `save_adapter`.
    """
    adapter, bases = _read(source, name, False, find)
    smaller, report = resize(adapter, rank=rank, energy=energy, bases=bases)
    write(as_written(smaller, format, bases), Path(target), format)
    return report


@locked
def extract_adapter(
    tuned: DiffusionPipeline,
    base: DiffusionPipeline,
    rank: int,
    target: str | os.PathLike | None = None,
    *,
    format: str = "diffusers",
) -> Adapter | SaveReport:
    """The LoRA that brings a base model closest to one that was tuned as a whole.

    Args:
        tuned: A pipeline; adapters and what is fused are left out of both.
        base: Another of the same architecture.
        rank: Of every layer.
        target: As in `save_adapter`, like `format`; None writes nothing.

    Returns:
        The SaveReport, or without a target the Adapter, which `load_adapter` takes.

    Raises:
        ValueError: For a rank below 1, pipelines whose layers differ, or two that are the same.
    """
    before, after = _weights(base), _weights(tuned)
    if before.keys() != after.keys():
        raise ValueError(
            f"the pipelines differ: one has {', '.join(before)}, the other {', '.join(after)}"
        )
    layers = {name: difference(after[name], before[name], rank) for name in before}
    layers = {component: modules for component, modules in layers.items() if modules}
    if not layers:
        raise ValueError("the two pipelines have the same weights, so there is nothing to extract")
    base_model = public_name(base.config.get("_name_or_path") or "") or None
    adapter = Adapter(layers, base_model=base_model)
    return adapter if target is None else save_adapter(adapter, target, format)


def by_layer(adapter: Adapter, scales: Mapping[str, Mapping[str, float]]) -> dict[str, dict]:
    """A scale for each layer of an adapter, 1 where none is named, with or without `text_model.`"""
    numbers: dict[str, dict[str, float]] = {component: {} for component in adapter.layers}
    for component, module in adapter.flat:
        named = scales.get(component, {})
        short = module.removeprefix("text_model.")
        numbers[component][module] = named.get(module, named.get(short, 1.0))
    return numbers


def _baked(adapter: Adapter, scales: Mapping[str, Mapping[str, float]], bases: Bases) -> Adapter:
    """The adapter with scales multiplied into its weights; what cannot carry one becomes a LoRA."""
    numbers = by_layer(adapter, scales)

    def scaled(component: str, module: str, layer: Layer) -> Layer:
        scale = numbers[component][module]
        if scale == 1:
            return layer
        if layer.is_plain:
            return replace(layer, tensors={**layer.tensors, "up": layer.tensors["up"] * scale})
        base = bases[component][module]
        up, down = layer.factors(base)
        return as_lora(up * scale, down, tuple(base.shape))

    return adapter.map(scaled)


def _read(source, name: str | None, bake_scales: bool, find: dict) -> tuple[Adapter, Bases]:
    """The adapter, and its pipeline's own weights where there is one."""
    if not isinstance(source, DiffusionPipeline):
        if bake_scales or name:
            raise ValueError("name and bake_scales are for a pipeline; the source here is a file")
        return read_source(source, **find).adapter, {}
    names = adapter_names(source)
    if name is None and len(names) != 1:
        raise ValueError(f"say which adapter with name=; the pipeline has: {listed(names, 8)}")
    name = name or names[0]
    check_known(source, [name])
    adapter = adapter_of(source, name)
    bases = base_weights(source, adapter)
    if not bake_scales:
        return adapter, bases
    table = scales_of(source)
    if name in table.steps:
        raise ValueError(
            f"the scales of {name!r} change over the denoising; set them without steps"
        )
    return _baked(adapter, table[name], bases), bases


def _weights(pipe: DiffusionPipeline) -> dict[str, dict[str, Tensor]]:
    """A pipeline's own weights by component and full module name, without what is fused."""
    check_weights_available(models_of(pipe))
    weights: dict[str, dict[str, Tensor]] = {}
    for component, model in models_of(pipe).items():
        weights[component] = {}
        for module, layer in walk(model):
            name = text_name(module) if component.startswith("text_encoder") else module
            weights[component][name] = original_weight(model, module, base_weight(layer))
    return weights
