"""The neutral form, written by the keys of diffusers, PEFT and Kohya."""

import json
import os
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import cache
from pathlib import Path

import torch
from peft import LoraConfig
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from lorabook.lora.adapter import Adapter, Bases, Layer
from lorabook.lora.formats.keys import METADATA_KEY, PEFT_NAME, WEIGHT_NAME, flat_name
from lorabook.lora.metadata import outgoing, shareable
from lorabook.lora.shapes import as_lora, is_large, shapes_of

FORMATS = ("diffusers", "peft", "kohya")
_KOHYA_PREFIXES = {"unet": "lora_unet", "text_encoder": "lora_te", "text_encoder_2": "lora_te2"}
_KOHYA_ROLES = {"lora": "lora_{}.weight", "loha": "hada_{}", "lokr": "lokr_{}", "full": "{}"}


def as_written(adapter: Adapter, form: str, bases: Bases | None = None) -> Adapter:
    """The adapter with layers that a form can hold; the others become plain LoRA with the same ΔW.

    Kohya's holds all kinds, the others plain LoRA, and DoRA where all layers of a component are
    DoRA; none holds PiSSA and OLoRA. ValueError for a layer that lacks its base weights, and a
    transformer in Kohya's form.
    """
    if form not in FORMATS:
        raise ValueError(f"unknown format {form!r}; the formats are: {', '.join(FORMATS)}")
    if form == "kohya" and (nameless := sorted(adapter.layers.keys() - _KOHYA_PREFIXES)):
        raise ValueError(
            f"Kohya's form has no names for layers of a {' or a '.join(nameless)}; save it as "
            "'diffusers' or 'peft'"
        )
    shapes = shapes_of(adapter, bases)
    written: dict[str, dict[str, Layer]] = {}
    for component, layers in adapter.layers.items():
        # PEFT's DoRA is one switch for a component
        all_dora = all(_is_pefts_dora(layer) for layer in layers.values())
        for module, layer in layers.items():
            shape = shapes[component][module]
            can_hold = layer.start is None if form == "kohya" else layer.is_plain or all_dora
            if not can_hold:
                base = (bases or {}).get(component, {}).get(module)
                layer = as_lora(*layer.factors(base), shape)
            elif form != "kohya":
                layer = _shaped(layer, shape)
            written.setdefault(component, {})[module] = layer
    return replace(adapter, layers=written)


def write(adapter: Adapter, target: Path, form: str) -> Path:
    """Write what `as_written` gives to a folder, or a file where it ends in .safetensors."""
    about = {"trigger_words": list(adapter.trigger_words), "base_model": adapter.base_model}
    about = {key: value for key, value in about.items() if value} | adapter.metadata
    about = outgoing(
        {
            key: value if isinstance(value, str) else json.dumps(value)
            for key, value in about.items()
            if key not in (METADATA_KEY, "format")
        }
    )
    is_file = target.suffix == ".safetensors"
    if form == "peft":
        _write_peft(adapter, target, is_file, about)
        return target
    name = WEIGHT_NAME if form == "diffusers" else f"{target.name}.safetensors"
    weights, config = to_diffusers(adapter) if form == "diffusers" else (to_kohya(adapter), {})
    write_adapter(target if is_file else target / name, weights, config=config, about=about)
    return target


def _write_peft(adapter: Adapter, target: Path, is_file: bool, about: dict[str, str]) -> None:
    has_several = len(adapter.layers) > 1
    if is_file and has_several:
        raise ValueError(
            f"{target}: PEFT keeps {' and '.join(adapter.layers)} in a folder each; give a folder"
        )
    for component, layers in adapter.layers.items():
        folder = target / component if has_several else target
        path = target if is_file else folder / PEFT_NAME
        weights, config = to_peft(layers)
        config.base_model_name_or_path = shareable(adapter.base_model)
        write_adapter(path, weights, config={}, about=about)
        config.save_pretrained(path.parent)


def to_diffusers(adapter: Adapter) -> tuple[dict[str, Tensor], dict[str, dict]]:
    """Weights by diffusers' keys, and PEFT's settings by component for the metadata."""
    weights = {}
    for component, layers in adapter.layers.items():
        for module, layer in layers.items():
            for name, value in _pefts_tensors(layer):
                # transformers 5.23.0 drops a text encoder's magnitudes without `.weight`, diffusers
                # wants the UNet's without: `load_adapter` in https://github.com/huggingface/
                # transformers/blob/v5.23.0/src/transformers/integrations/peft.py
                if name == "lora_magnitude_vector" and component.startswith("text_encoder"):
                    name += ".weight"
                weights[f"{component}.{module}.{name}"] = value
    return weights, {name: config_of(part).to_dict() for name, part in adapter.layers.items()}


def to_peft(layers: Mapping[str, Layer]) -> tuple[dict[str, Tensor], LoraConfig]:
    """Weights of one component by PEFT's keys, text encoders' by the installed transformers'."""
    weights = {
        f"base_model.model.{_installed_name(module)}.{name}": value
        for module, layer in layers.items()
        for name, value in _pefts_tensors(layer)
    }
    return weights, config_of(layers)


def to_kohya(adapter: Adapter) -> dict[str, Tensor]:
    """Weights by Kohya's and LyCORIS's keys, each layer with its alpha.

    Source: kohya-ss/sd-scripts, networks/lora.py; KohakuBlueleaf/LyCORIS, lycoris/modules.
    """
    # of two text encoders the first is lora_te1
    prefixes = _KOHYA_PREFIXES | ({"text_encoder": "lora_te1"} if is_large(adapter) else {})
    weights: dict[str, Tensor] = {}
    for component, layers in adapter.layers.items():
        for module, layer in layers.items():
            stem = f"{prefixes[component]}_{flat_name(module)}"
            if layer.scaling == 0:  # an alpha of 0 stands for the rank there
                layer = replace(layer.map(torch.zeros_like), scaling=1.0)
            for role, value in layer.tensors.items():
                weights[f"{stem}.{_KOHYA_ROLES[layer.kind].format(role)}"] = value
            if layer.kind != "full":
                weights[f"{stem}.alpha"] = torch.tensor(float(layer.alpha))
            if layer.magnitude is not None:
                weights[f"{stem}.dora_scale"] = _dora_scale(layer)
    return weights


def config_of(layers: Mapping[str, Layer]) -> LoraConfig:
    """PEFT's config for one component's layers: ranks, alphas, and which modules."""
    # without the prefix that only some versions of transformers have; patterns fit either way
    short = {module.removeprefix("text_model."): layer for module, layer in layers.items()}
    ranks = {module: layer.rank for module, layer in short.items()}
    alphas = {module: _int_if_whole(layer.alpha) for module, layer in short.items()}
    use_dora = any(layer.magnitude is not None for layer in layers.values())
    settings = rank_settings(ranks, alphas)
    return LoraConfig(target_modules=sorted(short), use_dora=use_dora, **settings)


def rank_settings(ranks: Mapping[str, int], alphas: Mapping[str, float]) -> dict:
    """PEFT's settings of modules with these ranks and alphas: the usual, and patterns."""
    rank, alpha = (Counter(of.values()).most_common(1)[0][0] for of in (ranks, alphas))
    return {
        "r": rank,
        "lora_alpha": alpha,
        "rank_pattern": {module: value for module, value in ranks.items() if value != rank},
        "alpha_pattern": {module: value for module, value in alphas.items() if value != alpha},
    }


def write_adapter(
    path: str | os.PathLike, weights: Mapping[str, Tensor], *, config: dict, about: dict
) -> Path:
    """Write an adapter file; it appears whole or not at all.

    Args:
        path: The file.
        weights: Tensors by key.
        config: Fields of PEFT's LoraConfig by component; empty where the keys say it.
        about: What else the file should hold (base model, trigger words, training settings).
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    settings = {
        f"{component}.{name}": _for_json(value)
        for component, fields in config.items()
        for name, value in _needed(fields).items()
    }
    metadata = {"format": "pt"}
    if settings:
        metadata[METADATA_KEY] = json.dumps(settings, sort_keys=True)
    for key, value in about.items():
        metadata[key] = value if isinstance(value, str) else json.dumps(value)
    unfinished = path.with_name(f"{path.name}.part")
    contiguous = {key: value.detach().to("cpu").contiguous() for key, value in weights.items()}
    try:
        save_file(contiguous, unfinished, metadata)
        os.replace(unfinished, path)
    except SafetensorError as error:  # a full disk is an OSError, as with any other file
        raise OSError(f"{path.name} cannot be written: {error}") from error
    finally:
        unfinished.unlink(missing_ok=True)
    return path


def _is_pefts_dora(layer: Layer) -> bool:
    """Whether it is a DoRA as PEFT has it: a plain LoRA with a magnitude for each output."""
    if layer.kind != "lora" or layer.start or "mid" in layer.tensors or layer.magnitude is None:
        return False
    return layer.magnitude.dim() == 1 or len(layer.magnitude) == len(layer.tensors["up"])


def _shaped(layer: Layer, shape: tuple[int, ...]) -> Layer:
    """The same tensors in the shapes that a weight of this shape asks for."""
    up, down = layer.tensors["up"], layer.tensors["down"]
    up = up.reshape(*up.shape[:2], *[1] * (len(shape) - 2))
    return replace(layer, tensors={"up": up, "down": down.reshape(len(down), *shape[1:])})


def _pefts_tensors(layer: Layer) -> Iterator[tuple[str, Tensor]]:
    up, down, magnitude = layer.tensors["up"], layer.tensors["down"], layer.magnitude
    yield "lora_A.weight", down
    yield "lora_B.weight", up
    if magnitude is not None:
        shape = (-1,) if down.dim() == 2 else (1, -1, 1, 1)
        yield "lora_magnitude_vector", magnitude.reshape(shape)


def _dora_scale(layer: Layer) -> Tensor:
    """The magnitude as LyCORIS shapes it: (out, 1 …); one by input channel stays as it is."""
    if layer.magnitude.dim() > 1:
        return layer.magnitude
    is_conv = layer.kind == "lora" and layer.tensors["down"].dim() == 4
    return layer.magnitude.reshape(-1, *[1] * (3 if is_conv else 1))


def _int_if_whole(value: float) -> float | int:
    return int(value) if value == int(value) else value


def _needed(fields: Mapping) -> dict:
    """The fields that differ from PEFT's defaults: an older PEFT refuses names it lacks."""
    usual = LoraConfig().to_dict()
    always = ("r", "lora_alpha", "target_modules", "peft_type")
    return {
        name: value
        for name, value in fields.items()
        if name in always or (name != "peft_version" and value != usual.get(name))
    }


def _for_json(value):
    if isinstance(value, (set, frozenset)):
        return sorted(value)
    return str(value) if isinstance(value, torch.dtype) else getattr(value, "value", value)


@cache
def _has_text_model() -> bool:
    """Whether this version of transformers has `text_model.` in the names of CLIP's layers."""
    from transformers import CLIPTextConfig, CLIPTextModel

    with torch.device("meta"):
        return hasattr(CLIPTextModel(CLIPTextConfig(num_hidden_layers=1)), "text_model")


def _installed_name(module: str) -> str:
    return module if _has_text_model() else module.removeprefix("text_model.")
