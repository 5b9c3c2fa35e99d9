"""Adapters put on a pipeline as PEFT's LoRA layers, taken off again, and read back from there."""

import os
from collections import Counter
from collections.abc import Iterable, Mapping

import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from lorabook.live.layers import (
    BEFORE,
    COMPONENTS,
    activate,
    active_adapters,
    adapter_names,
    base_weight,
    layers_of,
    lora_layers,
    models_of,
    trained_scaling,
    walk,
)
from lorabook.live.match import Ready, padded
from lorabook.live.offloaded import check_at_hand, is_plain, regroup
from lorabook.live.originals import original
from lorabook.live.plain_saving import save_as_before, save_plainly
from lorabook.live.scale_schedule import set_steps
from lorabook.live.steady import keep_steady
from lorabook.lora.adapter import Adapter, Layer, lora
from lorabook.lora.download import shareable_address
from lorabook.lora.formats.keys import text_name
from lorabook.upstream import quiet


def put_on(
    pipe,
    name: str,
    ready: Mapping[str, Mapping[str, Ready]],
    adapter: Adapter,
    rank: int | None = None,
) -> None:
    """Add the weights as an adapter, at scale 1, beside those that are there, and let it take part.

    Args:
        name: not in use.
        ready: from `fit`.
        adapter: what it was, kept beside PEFT's config for `adapter_of`.
        rank: pad every layer to this rank and keep its scale in a tensor, so that a compiled model can have another
            adapter swapped in without compiling again.
    """
    before = active_adapters(pipe)
    for part, model in models_of(pipe).items():
        if layers := ready.get(part):
            with quiet():
                inject_adapter_in_model(
                    LoraConfig(r=1, target_modules=list(layers)),
                    model,
                    name,
                    low_cpu_mem_usage=True,
                )
            model._hf_peft_config_loaded = True
            save_plainly(model)
            placed = dict(walk(model))
            for module, made in layers.items():
                _place(
                    placed[module],
                    name,
                    padded(made, rank) if rank else made,
                    made.alpha / made.rank,
                )
                if rank:
                    placed[module].scaling[name] = torch.tensor(float(placed[module].scaling[name]))
            describe(model.peft_config[name], layers, adapter.only([part]))
            regroup(model)
    set_steps(pipe, {name: ()})
    keep_steady(lora_layers(pipe))
    activate(pipe, list(dict.fromkeys([*before, name])))


def take_off(pipe, name: str, parts: Iterable[str] = COMPONENTS) -> None:
    """Take an adapter off, or those of its components; layers that carry none are plain again.

    The other adapters keep scale and state.
    """
    before = active_adapters(pipe)
    activate(pipe, [other for other in before if other != name])
    for model in (model for part, model in models_of(pipe).items() if part in parts):
        for module, layer in list(walk(model)):
            if isinstance(layer, BaseTunerLayer) and name in layer.scaling:
                layer.delete_adapter(name)
                layer.__dict__.get(BEFORE, {}).pop(name, None)
                if not layer.scaling:
                    parent, _, child = module.rpartition(".")
                    setattr(model.get_submodule(parent), child, layer.get_base_layer())
        configs = getattr(model, "peft_config", None) or {}
        if configs.pop(name, None):
            regroup(model)
        if not configs and getattr(model, "_hf_peft_config_loaded", False):
            model._hf_peft_config_loaded = False
            model.__dict__.pop("peft_config", None)
            save_as_before(model)
    activate(pipe, [other for other in before if other in adapter_names(pipe)])


def adapter_of(pipe, name: str) -> Adapter:
    """An adapter read back from a pipeline, as trained: scales are not part of it.

    Raises: ValueError where weights are offloaded.
    """
    check_at_hand(models_of(pipe))
    layers: dict[str, dict[str, Layer]] = {}
    first = None
    for part, touched in layers_of(pipe, name).items():
        origin = origin_of(pipe, part, name)
        first = first or origin
        for module, layer in touched.items():
            full_name = text_name(module) if part.startswith("text_encoder") else module
            kept = origin.layers.get(part, {}).get(full_name) if origin else None
            if kept is None and origin and not layer.lora_B[name].weight.any():
                continue  # left empty by a swap
            layers.setdefault(part, {})[full_name] = kept or _read_layer(layer, name)
    return Adapter(**(vars(first) if first else {}) | {"layers": layers})


def origin_of(pipe, part: str, name: str) -> Adapter | None:
    """What an adapter was when it was loaded (kinds other than plain LoRA with their tensors), or None."""
    config = (getattr(models_of(pipe)[part], "peft_config", None) or {}).get(name)
    return getattr(config, "origin", None)


def remember_source(pipe, name: str, source) -> None:
    """Keep beside PEFT's config where an adapter came from, if that can be said again; of an address no query."""
    said = getattr(source, "adapter", source)  # a TrainingRun's file
    for model in models_of(pipe).values():
        if name in (getattr(model, "peft_config", None) or {}):
            model.peft_config[name].came_from = (
                shareable_address(os.fsdecode(said))
                if isinstance(said, (str, os.PathLike))
                else None
            )


def source_of(pipe, name: str) -> str | None:
    """Where an adapter came from, as `load_adapter` was told; None where nothing is known."""
    configs = [
        (getattr(model, "peft_config", None) or {}).get(name) for model in models_of(pipe).values()
    ]
    return next(
        (config.came_from for config in configs if getattr(config, "came_from", None)), None
    )


def base_weights(pipe, adapter: Adapter) -> dict[str, dict[str, Tensor]]:
    """The pipeline's own weights, as they are without any adapter, of the layers that an adapter has.

    Quantised ones are left out.
    """
    found: dict[str, dict[str, Tensor]] = {}
    for part, model in models_of(pipe).items():
        modules = dict(walk(model))
        for module in adapter.layers.get(part, {}):
            own = next(
                (n for n in (module, module.removeprefix("text_model.")) if n in modules), None
            )
            if own is not None and is_plain(base_weight(modules[own])):
                found.setdefault(part, {})[module] = original(model, own, base_weight(modules[own]))
    return found


def _place(layer: BaseTunerLayer, name: str, made: Ready, scaling: float) -> None:
    """Weights, rank and alpha into a layer that PEFT has prepared."""
    down, up = layer.lora_A[name], layer.lora_B[name]
    # copies: a swap writes into them, and what they were made from may be the caller's
    down.weight = nn.Parameter(
        made.down.clone(memory_format=torch.contiguous_format), requires_grad=False
    )
    up.weight = nn.Parameter(
        made.up.clone(memory_format=torch.contiguous_format), requires_grad=False
    )
    if isinstance(down, nn.Conv2d):
        down.out_channels = up.in_channels = made.rank
    else:
        down.out_features = up.in_features = made.rank
    layer.r[name], layer.lora_alpha[name], layer.scaling[name] = made.rank, made.alpha, scaling


def describe(config: LoraConfig, layers: Mapping[str, Ready], adapter: Adapter) -> None:
    """Ranks and alphas in PEFT's config, as its own files tell them, and what the adapter was."""
    rank, alpha = (
        Counter(values).most_common(1)[0][0]
        for values in zip(*((made.rank, made.alpha) for made in layers.values()), strict=True)
    )
    config.r, config.lora_alpha = rank, alpha
    config.rank_pattern = {
        module: made.rank for module, made in layers.items() if made.rank != rank
    }
    config.alpha_pattern = {
        module: made.alpha for module, made in layers.items() if made.alpha != alpha
    }
    light = {
        part: {module: layer for module, layer in found.items() if not layer.is_plain}
        for part, found in adapter.layers.items()
    }
    config.origin = Adapter(**vars(adapter) | {"layers": light})


def _read_layer(layer: BaseTunerLayer, name: str) -> Layer:
    down, up = layer.lora_A[name].weight.detach(), layer.lora_B[name].weight.detach()
    scaling = trained_scaling(layer, name)
    if isinstance(layer.scaling[name], Tensor):  # with room for swapping: zeros that no file needs
        used = (down.flatten(1) != 0).any(1) | (up.flatten(1) != 0).view(
            up.shape[0], up.shape[1], -1
        ).any(2).any(0)
        rank = int(used.nonzero().max()) + 1 if used.any() else 1
        down, up = down[:rank], up[:, :rank]
    plain = lora(up, down, scaling)
    if not layer.use_dora.get(name):
        return plain
    return Layer(
        plain.kind,
        plain.tensors,
        scaling,
        plain.rank,
        layer.lora_magnitude_vector[name].weight.detach().flatten(),
    )
