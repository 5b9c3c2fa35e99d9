"""The neutral form, written by the keys of diffusers, PEFT and Kohya."""

import json
import os
from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from functools import cache
from pathlib import Path

import torch
from peft import LoraConfig
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from lorabook.lora.adapter import Adapter, Layer
from lorabook.lora.formats.keys import METADATA_KEY, flat_name
from lorabook.lora.shapes import as_lora, is_large, shapes_of

FORMATS = ("diffusers", "peft", "kohya")
_KOHYA = {"unet": "lora_unet", "text_encoder": "lora_te", "text_encoder_2": "lora_te2"}
Bases = Mapping[str, Mapping[str, Tensor]]


def as_written(adapter: Adapter, form: str, bases: Bases | None = None) -> Adapter:
    """The adapter with every layer of a kind that the form holds; the others become plain LoRA with the same ΔW.

    Args:
        form: one of `FORMATS`. Kohya's holds all kinds; the others plain LoRA, and DoRA where it is one throughout. None
            holds PiSSA and OLoRA.
        bases: the model's own weights, which a DoRA, PiSSA or OLoRA needs to become a LoRA.
    Raises: ValueError for an unknown form, a layer that needs its base weights, or as Kohya's a
        transformer.
    """
    if form not in FORMATS:
        raise ValueError(f"unknown format {form!r}; the formats are: {', '.join(FORMATS)}")
    if form == "kohya" and (nameless := sorted(adapter.layers.keys() - _KOHYA)):
        raise ValueError(
            f"Kohya's form has no names for layers of a {' or a '.join(nameless)} as diffusers names them; "
            "save it as 'diffusers' or 'peft'"
        )
    shapes = shapes_of(adapter, bases)
    layers: dict[str, dict[str, Layer]] = {}
    for part, found in adapter.layers.items():
        # PEFT's DoRA is one switch for a component
        whole = all(_peft_dora(layer) for layer in found.values())
        for module, layer in found.items():
            held = (
                layer.start is None
                if form == "kohya"
                else layer.is_plain or (whole and _peft_dora(layer))
            )
            base = (bases or {}).get(part, {}).get(module)
            layers.setdefault(part, {})[module] = (
                as_lora(*layer.factors(base), shapes[part][module])
                if not held
                else layer
                if form == "kohya"
                else _shaped(layer, shapes[part][module])
            )
    return Adapter(**vars(adapter) | {"layers": layers})


def to_diffusers(adapter: Adapter) -> tuple[dict[str, Tensor], dict[str, dict]]:
    """Weights by diffusers' keys, and PEFT's config by component for the metadata."""
    weights = {
        f"{part}.{module}.{_as_read_back(part, ending)}": value
        for part, layers in adapter.layers.items()
        for module, layer in layers.items()
        for ending, value in _peft_tensors(layer)
    }
    return weights, {part: config_of(layers).to_dict() for part, layers in adapter.layers.items()}


def to_peft(layers: Mapping[str, Layer]) -> tuple[dict[str, Tensor], LoraConfig]:
    """Weights of one component by PEFT's keys, and its config; text encoders by the names of this transformers."""
    return {
        f"base_model.model.{_installed_name(module)}.{ending}": value
        for module, layer in layers.items()
        for ending, value in _peft_tensors(layer)
    }, config_of(layers)


def to_kohya(adapter: Adapter) -> dict[str, Tensor]:
    """Weights by Kohya's and LyCORIS's keys, each layer with its alpha; of two text encoders the first is lora_te1.

    Source: the key names of kohya-ss/sd-scripts, networks/lora.py, and KohakuBlueleaf/LyCORIS, lycoris/modules.
    """
    names = _KOHYA | ({"text_encoder": "lora_te1"} if is_large(adapter) else {})
    weights: dict[str, Tensor] = {}
    for part, layers in adapter.layers.items():
        for module, layer in layers.items():
            stem = f"{names[part]}_{flat_name(module)}"
            if layer.scaling == 0:  # an alpha of 0 stands for the rank there
                layer = replace(layer.map(torch.zeros_like), scaling=1.0)
            weights |= {
                f"{stem}.{_kohya_ending(layer.kind, role)}": value
                for role, value in layer.tensors.items()
            }
            if layer.kind != "full":
                weights[f"{stem}.alpha"] = torch.tensor(float(layer.alpha))
            if layer.magnitude is not None:
                weights[f"{stem}.dora_scale"] = _column(layer)
    return weights


def config_of(layers: Mapping[str, Layer]) -> LoraConfig:
    """PEFT's config for one component's layers: ranks, alphas, and which modules."""
    rank, alpha = (
        Counter(values).most_common(1)[0][0]
        for values in zip(*((layer.rank, layer.alpha) for layer in layers.values()), strict=True)
    )
    # without the prefix that only some versions of transformers have; patterns fit either way
    short = {module.removeprefix("text_model."): layer for module, layer in layers.items()}
    return LoraConfig(
        r=rank,
        lora_alpha=_whole_number(alpha),
        target_modules=sorted(short),
        rank_pattern={module: layer.rank for module, layer in short.items() if layer.rank != rank},
        alpha_pattern={
            module: _whole_number(layer.alpha)
            for module, layer in short.items()
            if layer.alpha != alpha
        },
        use_dora=any(layer.magnitude is not None for layer in layers.values()),
    )


def _shaped(layer: Layer, shape: tuple[int, ...]) -> Layer:
    """The same tensors in the shapes that a weight of this shape asks for."""
    up, down = layer.tensors["up"], layer.tensors["down"]
    return replace(
        layer,
        tensors={
            "up": up.reshape(*up.shape[:2], *[1] * (len(shape) - 2)),
            "down": down.reshape(down.shape[0], *shape[1:]),
        },
    )


def _peft_dora(layer: Layer) -> bool:
    """Whether a layer is a DoRA as PEFT has it: on a plain LoRA, a magnitude for each output."""
    return (
        layer.kind == "lora"
        and layer.start is None
        and "mid" not in layer.tensors
        and layer.magnitude is not None
        and (layer.magnitude.dim() == 1 or layer.magnitude.shape[0] == layer.tensors["up"].shape[0])
    )


def _peft_tensors(layer: Layer):
    yield "lora_A.weight", layer.tensors["down"]
    yield "lora_B.weight", layer.tensors["up"]
    if layer.magnitude is not None:
        vector = layer.magnitude.flatten()
        yield (
            "lora_magnitude_vector",
            vector if layer.tensors["down"].dim() == 2 else vector.view(1, -1, 1, 1),
        )


def _as_read_back(part: str, ending: str) -> str:
    """transformers drops a text encoder's magnitudes where they lack `.weight`; diffusers wants the UNet's without.

    Upstream: `load_adapter` in https://github.com/huggingface/transformers/blob/main/src/transformers/integrations/peft.py
    """
    return (
        f"{ending}.weight"
        if ending.endswith("_vector") and part.startswith("text_encoder")
        else ending
    )


def _kohya_ending(kind: str, role: str) -> str:
    return {
        "lora": f"lora_{role}.weight",
        "loha": f"hada_{role}",
        "lokr": f"lokr_{role}",
        "full": role,
    }[kind]


def _column(layer: Layer) -> Tensor:
    """The magnitude as LyCORIS shapes it: (out, 1) or (out, 1, 1, 1); one by input channel stays as it is."""
    if layer.magnitude.dim() > 1:
        return layer.magnitude
    wide = layer.kind == "lora" and layer.tensors["down"].dim() == 4
    return layer.magnitude.reshape(-1, *[1] * (3 if wide else 1))


def _whole_number(value: float) -> float | int:
    return int(value) if value == int(value) else value


@cache
def _has_text_model() -> bool:
    """Whether this version of transformers has `text_model.` in the names of CLIP's text encoder."""
    from transformers import CLIPTextConfig, CLIPTextModel

    with torch.device("meta"):
        return hasattr(CLIPTextModel(CLIPTextConfig(num_hidden_layers=1)), "text_model")


def _installed_name(module: str) -> str:
    return module if _has_text_model() else module.removeprefix("text_model.")


def write_adapter(
    path: str | os.PathLike, weights: Mapping[str, Tensor], *, config: dict, about: dict
) -> Path:
    """Write an adapter file in diffusers' form; it appears whole or not at all.

    Args:
        path: the file.
        weights: tensors by diffusers key ("unet.….lora_A.weight").
        config: PEFT's LoraConfig by component, as {"unet": {"r": 4, "lora_alpha": 4, …}}; empty where the keys say it.
        about: what else the file should tell (base model, trigger words, training settings); kept as JSON.
    Returns: the path.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    flat = {
        f"{part}.{key}": _plain(value)
        for part, settings in config.items()
        for key, value in settings.items()
    }
    metadata = {"format": "pt"} | ({METADATA_KEY: json.dumps(flat, sort_keys=True)} if flat else {})
    metadata |= {
        key: value if isinstance(value, str) else json.dumps(value) for key, value in about.items()
    }
    unfinished = path.with_name(path.name + ".part")
    try:
        save_tensors(unfinished, weights, metadata)
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)
    return path


def save_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: dict[str, str]) -> None:
    """Write a safetensors file; a disk that is full is an OSError, as with any other file."""
    try:
        save_file(
            {key: value.detach().to("cpu").contiguous() for key, value in tensors.items()},
            path,
            metadata,
        )
    except SafetensorError as error:
        raise OSError(f"{path.name} cannot be written: {error}") from error


def _plain(value):
    """The value as JSON knows it."""
    if isinstance(value, (set, frozenset)):
        return sorted(value)
    if isinstance(value, torch.dtype):
        return str(value)
    return getattr(value, "value", value)
