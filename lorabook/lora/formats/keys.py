"""The names that adapter files give their layers and tensors, and what each says."""

import re
from collections.abc import Iterable, Mapping
from typing import NamedTuple

COMPONENTS = ("unet", "transformer", "text_encoder", "text_encoder_2")
WEIGHT_NAME, PEFT_NAME = "pytorch_lora_weights.safetensors", "adapter_model.safetensors"
CONFIG_NAME = "adapter_config.json"  # PEFT's, beside its weights
METADATA_KEY = "lora_adapter_metadata"  # where diffusers keeps rank, alpha and target modules

# parts of module names that hold an underscore themselves; all other underscores of a flat name stand for dots
_WORDS = (
    "down_blocks",
    "mid_block",
    "up_blocks",
    "transformer_blocks",
    "to_q",
    "to_k",
    "to_v",
    "to_out",
    "proj_in",
    "proj_out",
    "time_emb_proj",
    "conv_in",
    "conv_out",
    "conv_shortcut",
    "conv_norm_out",
    "time_embedding",
    "add_embedding",
    "linear_1",
    "linear_2",
    "time_embed",
    "label_emb",
    "input_blocks",
    "middle_block",
    "output_blocks",
    "in_layers",
    "out_layers",
    "emb_layers",
    "skip_connection",
    "text_model",
    "text_projection",
    "self_attn",
    "q_proj",
    "k_proj",
    "v_proj",
    "out_proj",
    "layer_norm1",
    "layer_norm2",
    "final_layer_norm",
    "token_embedding",
    "position_embedding",
)
_TOKEN = re.compile("|".join((*sorted(_WORDS, key=len, reverse=True), "[A-Za-z0-9]+")))
_RESNET = {
    "in_layers.2": "conv1",
    "out_layers.3": "conv2",
    "emb_layers.1": "time_emb_proj",
    "skip_connection": "conv_shortcut",
}
_OUTSIDE = {
    "time_embed.0": "time_embedding.linear_1",
    "time_embed.2": "time_embedding.linear_2",
    "label_emb.0.0": "add_embedding.linear_1",
    "label_emb.0.2": "add_embedding.linear_2",
    "input_blocks.0.0": "conv_in",
    "out.2": "conv_out",
}


def dotted(flat: str) -> str:
    """A flat name ("down_blocks_0_attentions_0_proj_in") with its dots."""
    return ".".join(_TOKEN.findall(flat))


def diffusers_name(module: str, layers_per_block: int = 2) -> str:
    """A UNet layer's name in diffusers, from the name that Stability's own code gives it.

    Args:
        module: dotted, as "input_blocks.4.1.transformer_blocks.0.attn1.to_k"; a name of diffusers' comes back as it is.
        layers_per_block: of the UNet; 2 in Stable Diffusion and SDXL.
    Returns: the name, as "down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_k".
    Source: the order of layers in Stability-AI/generative-models, sgm/modules/diffusionmodules/openaimodel.py.
    """
    for outside, name in _OUTSIDE.items():
        if module == outside:
            return name
    found = re.fullmatch(
        r"(input_blocks|middle_block|output_blocks)\.(\d+)\.(?:(\d+)\.)?(.+)", module
    )
    if not found:
        return module
    side, number, part, rest = found[1], int(found[2]), int(found[3] or 0), found[4]
    if side == "middle_block":
        # here the first number is the part: resnet, attention, resnet
        rest = module.split(".", 2)[2]
        return (
            "mid_block."
            + ("attentions.0." if number == 1 else f"resnets.{number // 2}.")
            + _inside(rest)
        )
    if side == "input_blocks":
        block, place = divmod(number - 1, layers_per_block + 1)
        where = f"down_blocks.{block}."
        if place == layers_per_block:
            return f"{where}downsamplers.0.conv"
    else:
        block, place = divmod(number, layers_per_block + 1)
        where = f"up_blocks.{block}."
        if rest == "conv":
            return f"{where}upsamplers.0.conv"
    return where + (f"attentions.{place}." if part else f"resnets.{place}.") + _inside(rest)


def flat_name(module: str) -> str:
    """The name as Kohya's files have it: underscores for dots."""
    return module.replace(".", "_")


def text_name(module: str) -> str:
    """A text encoder layer's name with `text_model.` before it, which transformers 5 leaves out and older readers need."""
    return (
        f"text_model.{module}"
        if module.startswith(("encoder.layers.", "embeddings.", "final_layer_norm"))
        else module
    )


def _inside(rest: str) -> str:
    for theirs, ours in _RESNET.items():
        if rest == theirs:
            return ours
    return rest


_NAME = r"(?:\.(?P<adapter>(?!weight$|bias$)[^.]+))?"  # of the adapter, which PEFT's own state dict has in its keys
# what stands at the end of a key, and the tensor's role; the first that fits counts
_ROLES = [
    (re.compile(pattern + "$"), role)
    for pattern, role in (
        (rf"\.lora_A{_NAME}(?:\.weight)?", "down"),
        (rf"\.lora_B{_NAME}(?:\.weight)?", "up"),
        (rf"\.lora_magnitude_vector{_NAME}(?:\.weight)?", "vector"),
        (r"\.lora_down\.weight", "down"),
        (r"\.lora_up\.weight", "up"),
        (r"\.lora_mid\.weight", "mid"),
        (r"(?:\.lora|\.lora_linear_layer|_lora)\.down\.weight", "down"),
        (r"(?:\.lora|\.lora_linear_layer|_lora)\.up\.weight", "up"),
        (r"(?:\.lora|\.lora_linear_layer|_lora)?\.alpha", "alpha"),
        (r"\.(?:dora_scale|magnitude)", "magnitude"),
        (rf"\.hada_(?P<role>w1_a|w1_b|w2_a|w2_b|t1|t2){_NAME}", None),
        (rf"\.lokr_(?P<role>w1|w2|w1_a|w1_b|w2_a|w2_b|t2){_NAME}", None),
        (r"\.(?P<role>diff)", None),
    )
]
_FLAT = {
    "lora_unet_": "unet",
    "lora_te1_": "text_encoder",
    "lora_te2_": "text_encoder_2",
    "lora_te3_": "text_encoder_3",
    "lora_te_": "text_encoder",
    "lora_transformer_": "transformer",
    "lycoris_": None,
}
# None stands for wrappers, which say nothing of the component
_DOTTED = {
    "base_model.model.": None,
    "module.": None,
    "_orig_mod.": None,
    "text_encoders.": None,
    "unet.": "unet",
    "model.diffusion_model.": "unet",
    "diffusion_model.": "unet",
    "transformer.": "transformer",
    "text_encoder.": "text_encoder",
    "text_encoder_2.": "text_encoder_2",
    "text_encoder_3.": "text_encoder_3",
    "clip_l.": "text_encoder",
    "clip_h.": "text_encoder",
    "clip_g.": "text_encoder_2",
    "t5xxl.": "text_encoder_3",
    "cond_stage_model.": "text_encoder",
    "conditioner.embedders.0.": "text_encoder",
}
_PREFIXES = {**_FLAT, **_DOTTED}
_OLD = {"to_q": "q_proj", "to_k": "k_proj", "to_v": "v_proj", "to_out": "out_proj"}
_UNET = re.compile(
    r"(down_blocks|up_blocks|mid_block|conv_in|conv_out|conv_norm_out|time_embed|time_embedding|add_embedding"
    r"|label_emb|input_blocks|middle_block|output_blocks|out)(\.|$)"
)
_TEXT = re.compile(
    r"(^|\.)(text_model|encoder\.layers|encoder\.block|final_layer_norm|text_projection)(\.|$)|self_attn\."
)
_OTHER = re.compile(
    r"((single_|joint_)?(transformer_)?(blocks|layers)|(single|double|joint)_blocks)[._]\d+[._]"
)


class Key(NamedTuple):
    """A key taken apart.

    Attributes:
        component, module: which layer.
        role: a tensor's role in `Layer`, "alpha", "magnitude" or "vector" (PEFT's magnitude).
        kind: of the layer.
        adapter: the adapter's name that stands in the key, or None.
        stem: the layer's name as the file has it.
    """

    component: str
    module: str
    role: str
    kind: str
    adapter: str | None
    stem: str


def take_apart(key: str, component: str | None = None, layers_per_block: int = 2) -> Key | None:
    """What a key of an adapter file says, or None where it carries no weights of a layer.

    Args:
        key: as it stands in the file.
        component: which one the key's file belongs to, where a folder says so and the key does not.
        layers_per_block: see `diffusers_name`.
    """
    for pattern, role in _ROLES:
        if found := pattern.search(key):
            stem, named = key[: found.start()], found.groupdict()
            part, module = _place(stem, component)
            kind = (
                "loha"
                if ".hada_" in found[0]
                else "lokr"
                if ".lokr_" in found[0]
                else "full"
                if found[0] == ".diff"
                else "lora"
            )
            if part == "unet":
                module = diffusers_name(module, layers_per_block)
            elif part.startswith("text_encoder"):
                module = _text_module(module)
            return Key(part, module, role or named["role"], kind, named.get("adapter"), stem)
    return None


def names_a_layer(key: str) -> bool:
    """Whether a key begins as those of a model's layers do, whatever stands at its end."""
    _, rest = _without_prefix(key)
    return rest != key or bool(_UNET.match(rest) or _TEXT.match(rest) or _OTHER.match(rest))


def bare(stem: str) -> str:
    """A layer's name as a file has it, without what only says the component."""
    return _without_prefix(stem)[1]


def form_of(keys: Iterable[str], kinds: Iterable[str], configs: Mapping) -> str:
    """The name of the form a file has, by its keys."""
    keys = list(keys)
    if any("base_model.model." in key for key in keys):
        return "PEFT"
    if any(key.startswith(tuple(_FLAT)) for key in keys):
        return "Kohya" if set(kinds) <= {"LoRA", "LoCon"} else "LyCORIS"
    if any(key.startswith(("diffusion_model.", "text_encoders.")) for key in keys):
        return "ComfyUI"
    if any(
        re.match(r"clip_[lg]\.|unet\.(input_blocks|middle_block|output_blocks)\.", key)
        for key in keys
    ):
        return "OMI"
    return "diffusers" if configs or any(".lora_A" in key for key in keys) else "diffusers, old"


def _place(stem: str, component: str | None) -> tuple[str, str]:
    """Component and dotted module of a key without its ending."""
    prefix, rest = _without_prefix(stem)
    module = dotted(rest) if prefix in _FLAT else _unwrapped(rest)
    named = _PREFIXES.get(prefix)
    if named == "unet" and not prefix.startswith("unet.") and not _UNET.match(module):
        named = None  # ComfyUI and Kohya say "unet" and "diffusion_model" of transformers, too
    return named or component or _guess(module, rest), module


def _without_prefix(stem: str) -> tuple[str, str]:
    """The first prefix that tells the component ("" where none does), and what comes after all of them."""
    told = ""
    while prefix := next((one for one in _PREFIXES if stem.startswith(one)), ""):
        stem = stem.removeprefix(prefix)
        told = told or (prefix if _PREFIXES[prefix] or prefix in _FLAT else "")
        if prefix in _FLAT:
            break
    return told, stem


def _unwrapped(module: str) -> str:
    """Without the attention processor that diffusers hung LoRA on before PEFT: attn1.processor.to_out → attn1.to_out.0"""
    module = module.replace(".processor.", ".")
    return f"{module}.0" if module.endswith((".attn1.to_out", ".attn2.to_out")) else module


def _text_module(module: str) -> str:
    head, _, last = module.rpartition(".")
    return text_name(
        f"{head}.{_OLD[last]}" if last in _OLD and head.endswith("self_attn") else module
    )


def _guess(module: str, rest: str) -> str:
    if not _UNET.match(module) and _OTHER.match(rest):
        return "transformer"
    return "text_encoder" if _TEXT.search(module) and not _UNET.match(module) else "unet"
