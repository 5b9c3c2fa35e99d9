"""Keys of adapter files, taken apart: which component, which layer, which of its tensors."""
import re
from collections.abc import Iterable, Mapping
from typing import NamedTuple

from lorabook.adapters.formats.names import diffusers_name, dotted, text_name

# what stands at the end of a key, and the tensor's role; the first that fits counts
_ROLES = [(re.compile(pattern + "$"), role) for pattern, role in (
    (r"\.lora_A(?:\.default)?(?:\.weight)?", "down"), (r"\.lora_B(?:\.default)?(?:\.weight)?", "up"),
    (r"\.lora_magnitude_vector(?:\.default)?(?:\.weight)?", "vector"),
    (r"\.lora_down\.weight", "down"), (r"\.lora_up\.weight", "up"), (r"\.lora_mid\.weight", "mid"),
    (r"(?:\.lora|\.lora_linear_layer|_lora)\.down\.weight", "down"),
    (r"(?:\.lora|\.lora_linear_layer|_lora)\.up\.weight", "up"),
    (r"(?:\.lora|\.lora_linear_layer|_lora)?\.alpha", "alpha"), (r"\.dora_scale", "magnitude"),
    (r"\.hada_(w1_a|w1_b|w2_a|w2_b|t1|t2)(?:\.default)?", None),
    (r"\.lokr_(w1|w2|w1_a|w1_b|w2_a|w2_b|t2)(?:\.default)?", None), (r"\.(diff)", None))]
_FLAT = {"lora_unet_": "unet", "lora_te1_": "text_encoder", "lora_te2_": "text_encoder_2", "lora_te_": "text_encoder",
         "lycoris_": None}
_DOTTED = {"unet.": "unet", "text_encoder_2.": "text_encoder_2", "text_encoder.": "text_encoder",
           "model.diffusion_model.": "unet", "diffusion_model.": "unet", "transformer.": "transformer"}
_OLD = {"to_q": "q_proj", "to_k": "k_proj", "to_v": "v_proj", "to_out": "out_proj"}
PREFIXES = (*_FLAT, *_DOTTED, "base_model.model.")  # what the keys of adapters begin with


class Key(NamedTuple):
    """A key taken apart; `role` is a tensor's role in `Layer`, "alpha", "magnitude" or "vector" (PEFT's magnitude)."""

    component: str
    module: str
    role: str
    kind: str


def take_apart(key: str, component: str | None = None, layers_per_block: int = 2) -> Key | None:
    """What a key of an adapter file says, or None where it carries no weights of a layer.

    Args:
        key: as it stands in the file.
        component: which one the key's file belongs to, where a folder says so and the key does not.
        layers_per_block: see `diffusers_name`.
    """
    for pattern, role in _ROLES:
        if found := pattern.search(key):
            named, module = _module(key[:found.start()])
            part = named or component or _guess(module)
            kind = "loha" if ".hada_" in found[0] else "lokr" if ".lokr_" in found[0] else \
                "full" if found[0] == ".diff" else "lora"
            module = diffusers_name(module, layers_per_block) if part == "unet" else _text_module(module)
            return Key(part, module, role or found[1], kind)
    return None


def form_of(keys: Iterable[str], kinds: Iterable[str], configs: Mapping) -> str:
    """The name of the form a file has, by its keys."""
    keys = list(keys)
    if any(key.startswith("base_model.model.") for key in keys):
        return "PEFT"
    if any(key.startswith(tuple(_FLAT)) for key in keys):
        return "Kohya" if set(kinds) <= {"LoRA", "LoCon"} else "LyCORIS"
    return "diffusers" if configs or any(".lora_A" in key for key in keys) else "diffusers, old"


def _module(stem: str) -> tuple[str | None, str]:
    """Component and dotted module of a key without its ending."""
    for prefix, component in _FLAT.items():
        if stem.startswith(prefix):
            return component, dotted(stem.removeprefix(prefix))
    stem = stem.removeprefix("base_model.model.")
    for prefix, component in _DOTTED.items():
        if stem.startswith(prefix):
            return component, _unwrapped(stem.removeprefix(prefix))
    return None, _unwrapped(stem)


def _unwrapped(module: str) -> str:
    """Without the attention processor that diffusers hung LoRA on before PEFT: attn1.processor.to_out → attn1.to_out.0"""
    module = module.replace(".processor.", ".")
    return f"{module}.0" if module.endswith((".attn1.to_out", ".attn2.to_out")) else module


def _text_module(module: str) -> str:
    head, _, last = module.rpartition(".")
    return text_name(f"{head}.{_OLD[last]}" if last in _OLD and head.endswith("self_attn") else module)


def _guess(module: str) -> str:
    return "text_encoder" if "self_attn" in module or re.search(r"(^|\.)encoder\.layers\.", module) else "unet"
