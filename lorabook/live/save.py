"""Adapters written: in any form, at any rank, with or without the scales they have now."""

import html
import json
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
from lorabook.lora.adapter import Adapter, Layer
from lorabook.lora.formats.keys import METADATA_KEY, WEIGHT_NAME, text_name
from lorabook.lora.formats.write import (
    FORMATS,
    as_written,
    to_diffusers,
    to_kohya,
    to_peft,
    write_adapter,
)
from lorabook.lora.metadata import outgoing, public_name, shareable
from lorabook.lora.resize import ResizeReport, difference, resize
from lorabook.lora.shapes import as_lora
from lorabook.lora.source import read_source


@dataclass(frozen=True, repr=False)
class SaveReport(os.PathLike):
    """What was written; stands for its path wherever a path is asked for.

    Attributes:
        path: the file or folder that `load_adapter` reads.
        format: "diffusers", "peft" or "kohya".
        kinds: of the layers in it.
        rank: the largest.
        resized: what a smaller rank cost, or None where ΔW is exactly what it was.
    """

    path: Path
    format: str
    kinds: tuple[str, ...]
    rank: int
    resized: ResizeReport | None = None

    @property
    def error(self) -> float:
        """‖ΔW − ΔW written‖ / ‖ΔW‖; 0 where no smaller rank was asked for."""
        total = self.resized.total if self.resized else None
        return (total.lost / total.energy) ** 0.5 if total and total.energy else 0.0

    def __fspath__(self) -> str:
        return str(self.path)

    def __str__(self):
        cost = f", {self.error:.1%} off its ΔW" if self.resized else ", ΔW exact"
        return (
            f"{self.path}: {self.format}, {' and '.join(self.kinds)}, rank up to {self.rank}{cost}"
        )

    __repr__ = __str__

    def _repr_html_(self):
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

    What a form does not hold (LoHa and LoKr in diffusers' and PEFT's) is written as the LoRA with the same ΔW, at the rank
    that needs.

    Args:
        source: a pipeline, or anything that `load_adapter` takes.
        target: a folder, or a file where it ends in .safetensors.
        format: "diffusers", "peft" (a folder with adapter_config.json, one for each component where there are several)
            or "kohya" (which A1111 and ComfyUI read; LoHa, LoKr and DoRA as LyCORIS writes them).
        name: which adapter of the pipeline, where it has several.
        rank: approximate layers of a larger rank by this one.
        bake_scales: with a pipeline, write the adapter as its scales are now, as one of its own.
        **find: for a source that is no pipeline, as in `load_adapter` (weight_name, revision, allow_pickle …).
    Returns: a SaveReport, which shows itself.
    Raises: ValueError for an unknown format or adapter, scales that change over the denoising, a DoRA that the form cannot
        hold without its base model, or a source that is not readable. Nothing is written then.
    """
    if format not in FORMATS:
        raise ValueError(f"unknown format {format!r}; the formats are: {', '.join(FORMATS)}")
    adapter, bases = _read(source, name, bake_scales, find)
    resized = None
    if rank is not None:
        adapter, resized = resize(adapter, rank=rank, bases=bases)
    adapter = as_written(adapter, format, bases)
    path = _write(adapter, Path(target), format)
    ranks = [layer.rank for part in adapter.layers.values() for layer in part.values()]
    return SaveReport(path, format, adapter.kinds, max(ranks), resized)


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
        source, target, format, name, **find: as in `save_adapter`.
        rank: the largest rank of a layer; or
        energy: the share of each layer's ‖ΔW‖² to keep, above 0, up to 1; each layer takes the smallest rank for it.
    Returns: a ResizeReport with the energy kept by layer, which shows itself.
    Raises: ValueError unless one of rank and energy is given, and as `save_adapter`.
    """
    adapter, bases = _read(source, name, False, find)
    smaller, report = resize(adapter, rank=rank, energy=energy, bases=bases)
    _write(as_written(smaller, format, bases), Path(target), format)
    return report


@locked
def extract_adapter(
    tuned, base, rank: int, target: str | os.PathLike | None = None, *, format: str = "diffusers"
) -> Adapter | SaveReport:
    """The LoRA that brings a base model closest to one that was tuned as a whole.

    Args:
        tuned, base: pipelines of the same architecture, adapters and what is fused left out of both.
        rank: of every layer.
        target, format: as in `save_adapter`; None writes nothing.
    Returns: the SaveReport, or without a target the Adapter itself, which `load_adapter` and `save_adapter` take.
    Raises: ValueError for a rank below 1, pipelines whose layers differ, or two that are the same.
    """
    layers: dict[str, dict[str, Layer]] = {}
    ours, theirs = _weights(base), _weights(tuned)
    if ours.keys() != theirs.keys():
        raise ValueError(
            f"the pipelines differ: one has {', '.join(ours)}, the other {', '.join(theirs)}"
        )
    for part in ours:
        found, _ = difference(theirs[part], ours[part], rank)
        if found:
            layers[part] = found
    if not layers:
        raise ValueError("the two pipelines have the same weights, so there is nothing to extract")
    name = base.config.get("_name_or_path") or ""
    adapter = Adapter(layers, base_model=public_name(name) or None)
    if target is None:
        return adapter
    return save_adapter(adapter, target, format)


def chosen_name(pipe, name: str | None) -> str:
    """The adapter that is meant. Raises ValueError where it must be told, or is not there."""
    names = adapter_names(pipe)
    if name is None and len(names) != 1:
        raise ValueError(f"say which adapter with name=; the pipeline has: {listed(names)}")
    name = name or names[0]
    check_known(pipe, [name])
    return name


def baked(adapter: Adapter, factors: Mapping[str, Mapping[str, float]], bases) -> Adapter:
    """The adapter with its scales multiplied into its weights; what cannot carry one becomes a LoRA."""
    layers: dict[str, dict[str, Layer]] = {}
    for part, found in adapter.layers.items():
        for module, layer in found.items():
            given = factors.get(part, {})
            factor = given.get(module, given.get(module.removeprefix("text_model."), 1.0))
            layers.setdefault(part, {})[module] = _scaled(
                layer, factor, bases.get(part, {}).get(module)
            )
    return replace(adapter, layers=layers)


def _scaled(layer: Layer, factor: float, base: Tensor | None) -> Layer:
    if factor == 1:
        return layer
    if layer.is_plain:
        return replace(layer, tensors=dict(layer.tensors) | {"up": layer.tensors["up"] * factor})
    up, down = layer.factors(base)
    return as_lora(up * factor, down, tuple(base.shape))


def _read(source, name: str | None, bake_scales: bool, find: dict) -> tuple[Adapter, dict]:
    """The adapter, and its pipeline's own weights where there is one."""
    if not isinstance(source, DiffusionPipeline):
        if bake_scales or name:
            raise ValueError(
                "name and bake_scales speak of a pipeline's adapter; the source here is a file"
            )
        return read_source(source, **find).adapter, {}
    name = chosen_name(source, name)
    adapter = adapter_of(source, name)
    bases = base_weights(source, adapter)
    if bake_scales:
        table = scales_of(source)
        if name in table.steps:
            raise ValueError(
                f"the scales of {name!r} change over the denoising, which no file holds; set them anew"
            )
        adapter = baked(adapter, table[name], bases)
    return adapter, bases


def _weights(pipe) -> dict[str, dict[str, Tensor]]:
    check_weights_available(models_of(pipe))
    return {
        part: {
            text_name(module) if part.startswith("text_encoder") else module: original_weight(
                model, module, base_weight(layer)
            )
            for module, layer in walk(model)
        }
        for part, model in models_of(pipe).items()
    }


def _write(adapter: Adapter, target: Path, form: str) -> Path:
    about = {
        key: value for key, value in adapter.metadata.items() if key not in (METADATA_KEY, "format")
    }
    if adapter.base_model:
        about.setdefault("base_model", adapter.base_model)
    if adapter.trigger_words:
        about.setdefault("trigger_words", list(adapter.trigger_words))
    about = outgoing(
        {
            key: value if isinstance(value, str) else json.dumps(value)
            for key, value in about.items()
        }
    )
    is_file = target.suffix == ".safetensors"
    if form == "peft":
        return _write_peft(adapter, target, is_file, about)
    path = (
        target
        if is_file
        else target / (WEIGHT_NAME if form == "diffusers" else f"{target.name}.safetensors")
    )
    weights, configs = to_diffusers(adapter) if form == "diffusers" else (to_kohya(adapter), {})
    write_adapter(path, weights, config=configs, about=about)
    return target


def _write_peft(adapter: Adapter, target: Path, is_file: bool, about: dict) -> Path:
    if is_file and len(adapter.layers) > 1:
        raise ValueError(
            f"{target}: PEFT keeps {' and '.join(adapter.layers)} in a folder each; give a folder"
        )
    for part, layers in adapter.layers.items():
        folder = target.parent if is_file else target / part if len(adapter.layers) > 1 else target
        weights, config = to_peft(layers)
        config.base_model_name_or_path = shareable(adapter.base_model)
        write_adapter(
            target if is_file else folder / "adapter_model.safetensors",
            weights,
            config={},
            about=about,
        )
        config.save_pretrained(folder)
    return target
