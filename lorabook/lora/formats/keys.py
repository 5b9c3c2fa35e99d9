"""The names that adapter files give their layers and tensors, and what each says."""

import re
from collections.abc import Iterable, Mapping
from typing import NamedTuple

COMPONENTS = ("unet", "transformer", "text_encoder", "text_encoder_2")
WEIGHT_NAME, PEFT_NAME = "pytorch_lora_weights.safetensors", "adapter_model.safetensors"
CONFIG_NAME = "adapter_config.json"  # PEFT's, beside its weights
METADATA_KEY = "lora_adapter_metadata"  # where diffusers keeps rank, alpha and target modules

# What a key may begin with, by the component that it says. Those with an underscore at the end
# stand before flat names: underscores for dots.
_PREFIXES = {
    prefix: component
    for component, prefixes in {
        "unet": "unet. diffusion_model. model.diffusion_model. lora_unet_",
        "transformer": "transformer. lora_transformer_",
        "text_encoder": "text_encoder. clip_l. clip_h. cond_stage_model. conditioner.embedders.0. "
        "lora_te_ lora_te1_",
        "text_encoder_2": "text_encoder_2. clip_g. lora_te2_",
        "text_encoder_3": "text_encoder_3. t5xxl. lora_te3_",
        None: "base_model.model. module. _orig_mod. text_encoders. lycoris_",
    }.items()
    for prefix in prefixes.split()
}
_FLAT = tuple(prefix for prefix in _PREFIXES if prefix.endswith("_"))
# What a key may end with. PEFT's own state dict has the adapter's name there.
_ADAPTER = r"(?:\.(?P<adapter>(?!weight$|bias$)[^.]+))?"
_BEFORE_PEFT = r"(?:\.lora|\.lora_linear_layer|_lora)"  # diffusers before it used PEFT
_ENDINGS = [
    re.compile(f"{ending}$")
    for ending in (
        rf"\.lora_(?P<role>A|B|magnitude_vector){_ADAPTER}(?:\.weight)?",
        r"\.lora_(?P<role>down|up|mid)\.weight",
        rf"{_BEFORE_PEFT}\.(?P<role>down|up)\.weight",
        rf"{_BEFORE_PEFT}?\.(?P<role>alpha)",
        r"\.(?P<role>dora_scale|magnitude)",
        rf"\.(?P<kind>hada)_(?P<role>w[12]_[ab]|t[12]){_ADAPTER}",
        rf"\.(?P<kind>lokr)_(?P<role>w[12](?:_[ab])?|t2){_ADAPTER}",
        r"\.(?P<kind>(?P<role>diff))",
    )
]
_ROLES = {"A": "down", "B": "up", "magnitude_vector": "vector", "dora_scale": "magnitude"}
_KINDS = {"hada": "loha", "lokr": "lokr", "diff": "full"}
# What the name of a layer begins with, or holds, in each sort of model.
_UNET = re.compile(
    r"(down_blocks|up_blocks|mid_block|conv_in|conv_out|conv_norm_out|time_embed|time_embedding"
    r"|add_embedding|label_emb|input_blocks|middle_block|output_blocks|out)(\.|$)"
)
_TEXT = re.compile(
    r"(^|\.)(text_model|encoder\.layers|encoder\.block|final_layer_norm|text_projection)(\.|$)"
    r"|self_attn\."
)
_TRANSFORMER = re.compile(
    r"((single_|joint_)?(transformer_)?(blocks|layers)|(single|double|joint)_blocks)[._]\d+[._]"
)
_OLD_TEXT_NAMES = {"to_q": "q_proj", "to_k": "k_proj", "to_v": "v_proj", "to_out": "out_proj"}
# Words of layers' names with underscores of their own; all others in a flat name stand for dots.
_WORDS = (
    "down_blocks mid_block up_blocks transformer_blocks to_q to_k to_v to_out proj_in proj_out "
    "time_emb_proj conv_in conv_out conv_shortcut conv_norm_out time_embedding add_embedding "
    "linear_1 linear_2 time_embed label_emb input_blocks middle_block output_blocks in_layers "
    "out_layers emb_layers skip_connection text_model text_projection self_attn q_proj k_proj "
    "v_proj out_proj layer_norm1 layer_norm2 final_layer_norm token_embedding position_embedding"
)
_FLAT_WORD = re.compile("|".join((*sorted(_WORDS.split(), key=len, reverse=True), "[A-Za-z0-9]+")))
_STABILITY_NAMES = {
    "in_layers.2": "conv1",
    "out_layers.3": "conv2",
    "emb_layers.1": "time_emb_proj",
    "skip_connection": "conv_shortcut",
    "time_embed.0": "time_embedding.linear_1",
    "time_embed.2": "time_embedding.linear_2",
    "label_emb.0.0": "add_embedding.linear_1",
    "label_emb.0.2": "add_embedding.linear_2",
    "input_blocks.0.0": "conv_in",
    "out.2": "conv_out",
}
# The name of a file's form, by what one of its keys begins with; the first that fits counts.
_FORMS = (
    (r".*base_model\.model\.", "PEFT"),
    ("|".join(_FLAT), "Kohya"),
    (r"diffusion_model\.|text_encoders\.", "ComfyUI"),
    (r"clip_[lg]\.|unet\.(input_blocks|middle_block|output_blocks)\.", "OMI"),
    (r".*\.lora_A", "diffusers"),
)


class Key(NamedTuple):
    """What a key of an adapter file says."""

    component: str  # as "unet"
    module: str  # the layer, by its dotted name in diffusers or transformers
    role: str  # the tensor's in `Layer`, or "alpha", "magnitude", "vector" (PEFT's magnitude)
    kind: str  # the layer's, as in `Layer`
    adapter: str | None  # the adapter's name, where the key has it
    stem: str  # the layer's name as the file has it


def parse_key(key: str, component: str | None = None, layers_per_block: int = 2) -> Key | None:
    """Read a key of an adapter file; None where it is not of a weight of a layer."""
    ending = next(filter(None, (pattern.search(key) for pattern in _ENDINGS)), None)
    if ending is None:
        return None
    groups, stem = ending.groupdict(), key[: ending.start()]
    component, module = _component_and_module(stem, component)
    if component == "unet":
        module = diffusers_name(module, layers_per_block)
    elif component.startswith("text_encoder"):
        layer, _, last = module.rpartition(".")
        if layer.endswith("self_attn"):
            module = f"{layer}.{_OLD_TEXT_NAMES.get(last, last)}"
        module = text_name(module)
    role, kind = groups["role"], _KINDS.get(groups.get("kind"), "lora")
    return Key(component, module, _ROLES.get(role, role), kind, groups.get("adapter"), stem)


def names_a_layer(key: str) -> bool:
    """Whether a key begins as those of a model's layers do, whatever stands at its end."""
    rest = bare(key)
    return rest != key or any(names.match(rest) for names in (_UNET, _TEXT, _TRANSFORMER))


def bare(stem: str) -> str:
    """A layer's name as a file has it, without what only says the component."""
    return _without_prefixes(stem)[1]


def form_of(keys: Iterable[str], kinds: Iterable[str], configs: Mapping) -> str:
    """The name of the form that a file has, by its keys, kinds of layers and PEFT's settings."""
    keys = list(keys)
    forms = (form for start, form in _FORMS if any(re.match(start, key) for key in keys))
    form = next(forms, "diffusers" if configs else "diffusers, old")
    return "LyCORIS" if form == "Kohya" and not set(kinds) <= {"LoRA", "LoCon"} else form


def diffusers_name(module: str, layers_per_block: int = 2) -> str:
    """The name of a UNet's layer in diffusers, from the one in Stability's own code.

    "input_blocks.4.1.proj_in" is "down_blocks.1.attentions.0.proj_in"; others stay as they are.
    Source: Stability-AI/generative-models, sgm/modules/diffusionmodules/openaimodel.py.
    """
    module = _STABILITY_NAMES.get(module, module)
    if middle := re.fullmatch(r"middle_block\.(\d+)\.(.+)", module):
        number = int(middle[1])  # resnet, attention, resnet
        layer = "attentions.0" if number == 1 else f"resnets.{number // 2}"
        return f"mid_block.{layer}.{_STABILITY_NAMES.get(middle[2], middle[2])}"
    match = re.fullmatch(r"(input|output)_blocks\.(\d+)\.(?:(\d+)\.)?(.+)", module)
    if not match:
        return module
    side, number, part, rest = match[1], int(match[2]), int(match[3] or 0), match[4]
    block, place = divmod(number - (side == "input"), layers_per_block + 1)
    start = f"{'down' if side == 'input' else 'up'}_blocks.{block}"
    if side == "input" and place == layers_per_block:
        return f"{start}.downsamplers.0.conv"
    if side == "output" and rest == "conv":
        return f"{start}.upsamplers.0.conv"
    layer = f"attentions.{place}" if part else f"resnets.{place}"
    return f"{start}.{layer}.{_STABILITY_NAMES.get(rest, rest)}"


def flat_name(module: str) -> str:
    """The name as Kohya's files have it: underscores for dots."""
    return module.replace(".", "_")


def text_name(module: str) -> str:
    """A text encoder's layer with `text_model.`, which transformers 5 lacks and older ones need."""
    is_short = module.startswith(("encoder.layers.", "embeddings.", "final_layer_norm"))
    return f"text_model.{module}" if is_short else module


def _component_and_module(stem: str, component: str | None) -> tuple[str, str]:
    """The model that a key names, else `component`, else a guess; and the dotted layer."""
    prefix, rest = _without_prefixes(stem)
    if prefix in _FLAT:
        module = ".".join(_FLAT_WORD.findall(rest))
    else:  # diffusers once hung LoRA on processors: attn1.processor.to_out is attn1.to_out.0
        module = rest.replace(".processor.", ".")
        module += ".0" if module.endswith((".attn1.to_out", ".attn2.to_out")) else ""
    named, is_unet = _PREFIXES.get(prefix), bool(_UNET.match(module))
    if named == "unet" and prefix != "unet." and not is_unet:
        named = None  # ComfyUI and Kohya say "diffusion_model" and "unet" of transformers, too
    if named or component:
        return named or component, module
    if not is_unet and _TRANSFORMER.match(rest):
        return "transformer", module
    return "text_encoder" if not is_unet and _TEXT.search(module) else "unet", module


def _without_prefixes(stem: str) -> tuple[str, str]:
    """The first prefix that says a component ("" where none does), and what follows them all."""
    telling = ""
    while prefix := next((one for one in _PREFIXES if stem.startswith(one)), ""):
        stem = stem.removeprefix(prefix)
        if _PREFIXES[prefix] or prefix in _FLAT:
            telling = telling or prefix
        if prefix in _FLAT:
            break
    return telling, stem
