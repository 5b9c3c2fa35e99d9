"""Adapters put on a pipeline as PEFT's LoRA layers, taken off again, and read back from there."""
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from lorabook.adapters.adapter import Adapter, Layer, lora
from lorabook.adapters.family import family
from lorabook.adapters.formats.names import text_name
from lorabook.adapters.layers import (
    COMPONENTS,
    activate,
    active_adapters,
    adapter_names,
    base_weight,
    components,
    layers_of,
    lora_layers,
    walk,
)
from lorabook.adapters.originals import original
from lorabook.adapters.plain_saving import save_as_before, save_plainly
from lorabook.adapters.shapes import matrix_shape
from lorabook.adapters.steady import keep_steady
from lorabook.quiet import quiet


@dataclass(frozen=True)
class Ready:
    """A layer's weights as PEFT wants them: down (rank, in, …), up (out, rank, …), alpha."""

    down: Tensor
    up: Tensor
    alpha: float

    @property
    def rank(self) -> int:
        """Rows of down, columns of up."""
        return self.down.shape[0]


def fit(pipe, adapter: Adapter, where: str) -> dict[str, dict[str, Ready]]:
    """The adapter's weights for the pipeline's layers, by component and the pipeline's own module names.

    Args:
        pipe: a diffusers pipeline; nothing on it is changed.
        adapter: any kind; what is no plain LoRA becomes one, exactly, at the rank that needs.
        where: what to call it in errors.
    Raises: ValueError where a layer is not the pipeline's, has another shape, or is not finite once computed.
    """
    matched = _match(pipe, adapter, where)
    ready: dict[str, dict[str, Ready]] = {}
    for part, model in components(pipe).items():
        for name, (layer, module) in matched.get(part, {}).items():
            weight = original(model, name, base_weight(module))
            if matrix_shape(layer) != (weight.shape[0], weight[0].numel()):
                raise ValueError(
                    f"{where} does not fit {type(pipe).__name__}: layer {name} has the shape {tuple(weight.shape)} and the "
                    f"adapter {matrix_shape(layer)}; {_made_for(adapter, pipe)}")
            made = _ready(layer, weight)
            if not (made.up.isfinite().all() and made.down.isfinite().all()):
                raise ValueError(f"{where}: layer {name} is beyond what {str(weight.dtype)[6:]} holds; load the pipeline "
                                 "with dtype=torch.float32")
            ready.setdefault(part, {})[name] = made
    return ready


def put_on(pipe, name: str, ready: Mapping[str, Mapping[str, Ready]], adapter: Adapter, rank: int | None = None) -> None:
    """Add the weights as an adapter, at scale 1, beside those that are there, and let it take part.

    Args:
        name: not in use.
        ready: from `fit`.
        adapter: what it was, kept beside PEFT's config for `adapter_of`.
        rank: pad every layer to this rank and keep its scale in a tensor, so that a compiled model can have another
            adapter swapped in without compiling again.
    """
    before = active_adapters(pipe)
    for part, model in components(pipe).items():
        if layers := ready.get(part):
            with quiet():
                inject_adapter_in_model(LoraConfig(r=1, target_modules=list(layers)), model, name, low_cpu_mem_usage=True)
            model._hf_peft_config_loaded = True
            save_plainly(model)
            placed = dict(walk(model))
            for module, made in layers.items():
                _place(placed[module], name, padded(made, rank) if rank else made, made.alpha / made.rank)
                if rank:
                    placed[module].scaling[name] = torch.tensor(float(placed[module].scaling[name]))
            describe(model.peft_config[name], layers, adapter.only([part]))
    keep_steady(lora_layers(pipe))
    activate(pipe, list(dict.fromkeys([*before, name])))


def take_off(pipe, name: str, parts: Iterable[str] = COMPONENTS) -> None:
    """Take an adapter off, or those of its components; layers that carry none are plain again.

    The other adapters keep scale and state.
    """
    before = active_adapters(pipe)
    activate(pipe, [other for other in before if other != name])
    for model in (model for part, model in components(pipe).items() if part in parts):
        for module, layer in list(walk(model)):
            if isinstance(layer, BaseTunerLayer) and name in layer.scaling:
                layer.delete_adapter(name)
                if not layer.scaling:
                    parent, _, child = module.rpartition(".")
                    setattr(model.get_submodule(parent), child, layer.get_base_layer())
        configs = getattr(model, "peft_config", None) or {}
        configs.pop(name, None)
        if not configs and getattr(model, "_hf_peft_config_loaded", False):
            model._hf_peft_config_loaded = False
            model.__dict__.pop("peft_config", None)
            save_as_before(model)
    activate(pipe, [other for other in before if other in adapter_names(pipe)])


def adapter_of(pipe, name: str) -> Adapter:
    """An adapter read back from a pipeline, as trained: scales are not part of it."""
    layers: dict[str, dict[str, Layer]] = {}
    first = None
    for part, touched in layers_of(pipe, name).items():
        origin = origin_of(pipe, part, name)
        first = first or origin
        for module, layer in touched.items():
            full_name = text_name(module) if part.startswith("text_encoder") else module
            kept = origin.layers.get(part, {}).get(full_name) if origin else None
            layers.setdefault(part, {})[full_name] = (
                kept if kept is not None and not kept.is_plain else _read_layer(layer, name))
    return Adapter(**(vars(first) if first else {}) | {"layers": layers})


def origin_of(pipe, part: str, name: str) -> Adapter | None:
    """What an adapter was when it was loaded (kinds other than plain LoRA with their tensors), or None."""
    config = (getattr(components(pipe)[part], "peft_config", None) or {}).get(name)
    return getattr(config, "origin", None)


def base_weights(pipe, adapter: Adapter) -> dict[str, dict[str, Tensor]]:
    """The pipeline's own weights, as they are without any adapter, of the layers that an adapter has."""
    found: dict[str, dict[str, Tensor]] = {}
    for part, model in components(pipe).items():
        modules = dict(walk(model))
        for module in adapter.layers.get(part, {}):
            own = next((n for n in (module, module.removeprefix("text_model.")) if n in modules), None)
            if own is not None:
                found.setdefault(part, {})[module] = original(model, own, base_weight(modules[own]))
    return found


def padded(made: Ready, rank: int) -> Ready:
    """The same ΔW with zeros up to a rank; its alpha grows with the rank, so that the scaling stays."""
    more = rank - made.rank
    if more < 0:
        raise ValueError(f"an adapter of rank {made.rank} does not fit where rank {rank} was prepared; load the first "
                         f"with hotswap_rank={made.rank} or more")
    down = torch.cat([made.down, made.down.new_zeros(more, *made.down.shape[1:])])
    up = torch.cat([made.up, made.up.new_zeros(made.up.shape[0], more, *made.up.shape[2:])], dim=1)
    return Ready(down, up, made.alpha * rank / made.rank)


def _match(pipe, adapter: Adapter, where: str) -> dict[str, dict[str, tuple[Layer, nn.Module]]]:
    """Each layer with the module it belongs to."""
    models = components(pipe)
    found: dict[str, dict] = {}
    lost = []
    for part, layers in adapter.layers.items():
        modules = dict(walk(models[part])) if part in models else {}
        for module, layer in layers.items():
            own = next((n for n in (module, module.removeprefix("text_model.")) if n in modules), None)
            if own is None:
                lost.append(f"{part}.{module}")
            else:
                found.setdefault(part, {})[own] = layer, modules[own]
    if lost:
        total = sum(map(len, adapter.layers.values()))
        there = total - len(lost)
        count = f"only {there} of its {total} layers are" if there else f"none of its {total} layers is"
        raise ValueError(f"{where} does not fit {type(pipe).__name__}: {count} there (not {lost[0]}); "
                         + _made_for(adapter, pipe))
    return found


def _made_for(adapter: Adapter, pipe) -> str:
    name = f" ({adapter.base_model})" if adapter.base_model else ""
    return f"it was made for {family(adapter)}{name}, this is {family(pipe)}; load it onto its own base model"


def _ready(layer: Layer, weight: Tensor) -> Ready:
    out, *rest = weight.shape
    if layer.is_plain:
        up, down, alpha = layer.tensors["up"], layer.tensors["down"], layer.alpha
    else:
        up, down = layer.factors(weight)
        alpha = down.shape[0]
    rank = down.shape[0]
    return Ready(down.reshape(rank, *rest).to(weight), up.reshape(out, rank, *[1] * (len(rest) - 1)).to(weight), alpha)


def _place(layer: BaseTunerLayer, name: str, made: Ready, scaling: float) -> None:
    """Weights, rank and alpha into a layer that PEFT has prepared."""
    down, up = layer.lora_A[name], layer.lora_B[name]
    down.weight = nn.Parameter(made.down.contiguous(), requires_grad=False)
    up.weight = nn.Parameter(made.up.contiguous(), requires_grad=False)
    if isinstance(down, nn.Conv2d):
        down.out_channels = up.in_channels = made.rank
    else:
        down.out_features = up.in_features = made.rank
    layer.r[name], layer.lora_alpha[name], layer.scaling[name] = made.rank, made.alpha, scaling


def describe(config: LoraConfig, layers: Mapping[str, Ready], adapter: Adapter) -> None:
    """Ranks and alphas in PEFT's config, as its own files tell them, and what the adapter was."""
    rank, alpha = (Counter(values).most_common(1)[0][0]
                   for values in zip(*((made.rank, made.alpha) for made in layers.values()), strict=True))
    config.r, config.lora_alpha = rank, alpha
    config.rank_pattern = {module: made.rank for module, made in layers.items() if made.rank != rank}
    config.alpha_pattern = {module: made.alpha for module, made in layers.items() if made.alpha != alpha}
    light = {part: {module: layer for module, layer in found.items() if not layer.is_plain}
             for part, found in adapter.layers.items()}
    config.origin = Adapter(**vars(adapter) | {"layers": light})


def _read_layer(layer: BaseTunerLayer, name: str) -> Layer:
    down, up = layer.lora_A[name].weight.detach(), layer.lora_B[name].weight.detach()
    scaling = layer.lora_alpha[name] / (layer.r[name]**0.5 if layer.use_rslora.get(name) else layer.r[name])
    plain = lora(up, down, scaling)
    if not layer.use_dora.get(name):
        return plain
    return Layer(plain.kind, plain.tensors, scaling, plain.rank, layer.lora_magnitude_vector[name].weight.detach().flatten())


