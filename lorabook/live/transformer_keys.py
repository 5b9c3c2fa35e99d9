"""Adapters for transformers by the names of their original code, brought to diffusers' by its own conversion."""

from collections.abc import Iterator, Mapping
from dataclasses import replace

from torch import Tensor

from lorabook.live.layers import models_of, walk
from lorabook.lora.adapter import Adapter, Layer
from lorabook.lora.formats.keys import bare, flat_name
from lorabook.lora.formats.read import parse
from lorabook.upstream import quiet

PART = "transformer"


def by_diffusers_names(pipe, adapter: Adapter) -> Adapter:
    """An adapter whose transformer's layers have the names that they have on a pipeline.

    Args:
        pipe: its class knows the names of its model's original code (`lora_state_dict`); nothing on it is changed.
        adapter: any; all is as before where the names are diffusers' already, or no conversion keeps all of its ΔW.
    """
    model, layers = models_of(pipe).get(PART), adapter.layers.get(PART, {})
    names = {flat_name(name): name for name, _ in walk(model)} if model is not None else {}
    if not names or all(names.get(flat_name(module)) == module for module in layers):
        return adapter
    if all(
        flat_name(module) in names for module in layers
    ):  # diffusers' names with underscores for dots
        found = {names[flat_name(module)]: layer for module, layer in layers.items()}
    else:
        found = _converted(pipe, adapter, set(names.values()))
    return replace(
        adapter,
        layers=dict(adapter.layers) | {PART: found},
        stems=adapter.stems if found is layers else {},
    )


def _converted(pipe, adapter: Adapter, known: set[str]) -> Mapping[str, Layer]:
    layers = adapter.layers[PART]
    if not hasattr(pipe, "lora_state_dict") or not all(layer.is_plain for layer in layers.values()):
        return layers
    stems = {module: bare(adapter.stems.get((PART, module), module)) for module in layers}
    for weights in _spellings(layers, stems):
        try:
            with quiet():
                told = type(pipe).lora_state_dict(weights, return_alphas=True)
            weights, alphas = told if isinstance(told, tuple) else (told, {})
            found = parse(weights | (alphas or {})).layers.get(PART, {})
        except Exception:  # not a spelling that this pipeline's class knows
            continue
        # a conversion splits layers and leaves out what it does not know, with a line in a log
        if (
            found
            and found.keys() <= known
            and abs(_energy(found) / (_energy(layers) or 1) - 1) < 1e-3
        ):
            return found
    return layers


def _spellings(
    layers: Mapping[str, Layer], stems: Mapping[str, str]
) -> Iterator[dict[str, Tensor]]:
    """The weights by ComfyUI's and by Kohya's keys, their scaling in up."""
    for start, end, change in (
        ("diffusion_model.", ("lora_A", "lora_B"), str),
        ("lora_unet_", ("lora_down", "lora_up"), flat_name),
    ):
        yield {
            f"{start}{change(stems[module])}.{name}.weight": value.contiguous()
            for module, layer in layers.items()
            for name, value in zip(
                end, (layer.tensors["down"], layer.tensors["up"] * layer.scaling), strict=True
            )
        }


def _energy(layers: Mapping[str, Layer]) -> float:
    """The sum of ‖ΔW‖² over plain layers."""
    total = 0.0
    for layer in layers.values():
        up, down = layer.tensors["up"].float().flatten(1), layer.tensors["down"].float().flatten(1)
        total += float(((up.T @ up) * (down @ down.T)).sum()) * layer.scaling**2
    return total
