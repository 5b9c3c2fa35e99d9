"""What is not read: files that are no adapters, and what stands beside an adapter's weights."""

import re
from collections.abc import Iterable, Mapping
from pathlib import Path

from torch import Tensor

from lorabook.lora.formats.keys import names_a_layer

_LONGEST = 400  # letters of a sentence
_SECOND_ENCODER = ", text_encoder=pipe.text_encoder_2, tokenizer=pipe.tokenizer_2"
# how files for SDXL call a word's vectors, and the encoder that those are for
_SDXL_WORDS = {"clip_l": "", "text_encoders_0": "", "clip_g": _SECOND_ENCODER}
_SDXL_WORDS["text_encoders_1"] = _SECOND_ENCODER
READ = "LoRA, LoCon, LoHa, LoKr, DoRA and whole differences"
_UNREAD = (
    (r"\.(w_norm|b_norm)$", "trained norms"),
    (r"\.diff_b$", "differences of biases"),
    (r"\.diff$", "differences of norms and embeddings"),
    (r"\.set_weight$", "replaced weights"),
    (r"\.b?oft_\w+(\.[\w-]+)*$", "OFT"),
    (r"\.(on_input|ia3_l)\b", "IA³"),
    (r"\.[ab][12]\.weight$", "GLoRA"),
    (r"\.lora_embedding_[AB]\b", "LoRA of embeddings"),
    (r"\.bias$|\.lora_bias\b", "biases"),
    (r"\.vera_\w+|\.hra_u\b|\.c3a_\w+|\.lora_XS\b", "a rarer kind of PEFT's"),
)
# OneTrainer's and LyCORIS's keys of textual inversions that a file brings along.
_EMBEDDING = re.compile(
    r"bundle_emb\.(?P<name>.+?)\.(?P<part>(?:clip_[glh]|t5\w*)(?:_out)?|string_to_param\.[^.]+"
    r"|emb_params|[^.]+)$"
)


# What one of the keys begins with, what the file then is, and what loads it; the first that fits
# counts. {path}, {folder}, {name} and {word} are of the file, {weights} is what reads it; a class
# of diffusers stands for its `from_single_file`, or with {folder} its `from_pretrained`.
_KINDS = (
    (
        r"image_proj\.|ip_adapter\.|ip_adapter_proj_model|.*\.ip_adapter_\w+_(k|v)_proj",
        "an IP-Adapter",
        "pipe.load_ip_adapter({folder}, subfolder='', weight_name={name}{encoder})",
    ),
    (r"lllite_", "a ControlNet-LLLite, for which diffusers has no loader", None),
    (r"lora_controlnet$", "a Control-LoRA, for which diffusers has no loader", None),
    (r"control_model\.|input_hint_block|zero_convs", "a ControlNet", "ControlNetModel({path})"),
    (r"controlnet_(cond_|down_|mid_|blocks|x_)", "a ControlNet", "ControlNetModel({folder})"),
    (r"(adapter\.)?body\.\d", "a T2I-Adapter", "T2IAdapter({folder})"),
    (
        r".*\.to_([kvq]|out)_custom_diffusion",
        "a Custom Diffusion",
        "pipe.unet.load_attn_procs({folder}, weight_name={name})",
    ),
    (r"conditioner\.", "a whole checkpoint", "StableDiffusionXLPipeline({path})"),
    (
        r"model\.diffusion_model\.|cond_stage_model\.",
        "a whole checkpoint",
        "StableDiffusionPipeline({path})",
    ),
    (
        r"down_blocks\.\d+\.motion_modules\.",
        "a motion module of AnimateDiff",
        "MotionAdapter({path})",
    ),
    (r"(first_stage_model\.)?(en|de)coder\.(down|up|mid)\.", "a VAE", "AutoencoderKL({path})"),
    (r"(en|de)coder\.(conv_in|(down|up)_b|mid_b)", "a VAE", "AutoencoderKL({folder})"),
    (r"((double_|joint_|transformer_)?blocks|layers)\.\d+\.", "a whole transformer", None),
    (
        r"(conv_in|time_embedding\.linear_1)\.weight",
        "a whole UNet",
        "UNet2DConditionModel({folder})",
    ),
    (r"(time_embed\.0|input_blocks\.0\.0)\.", "a whole UNet", "UNet2DConditionModel({path})"),
    (
        r"(text_model\.)?(encoder\.layers|embeddings)\.",
        "a whole text encoder",
        "transformers.CLIPTextModel.from_pretrained({folder})",
    ),
    (
        r"\d+\.\d+\.linear\.\d+\.|\d{3,4}$",
        "a hypernetwork, for which diffusers has no loader",
        None,
    ),
)


def other_kind(weights: Mapping[str, Tensor], where: str) -> str | None:
    """What a file (`where`) is that is no adapter, and how to load it; None where not known."""
    kinds = (
        (kind, call)
        for pattern, kind, call in _KINDS
        if any(re.match(pattern, key) for key in weights)
    )
    kind, call = _textual_inversion(weights) or next(kinds, (None, None))
    if kind is None or call is None:
        return kind and f"{where} is {kind}, not a LoRA"
    for path in (where, Path(where).name):  # of a long path the name alone
        sentence = f"{where} is {kind}, not a LoRA; load it with {_call_for(call, Path(path))}"
        if len(sentence) <= _LONGEST and "…" not in path:
            break
    return sentence[:_LONGEST]


def notes_on_unread(weights: Mapping[str, Tensor], ignored: Iterable[str], where: str) -> list[str]:
    """Why the keys that are not read (`ignored`) change nothing; ValueError where they do."""
    ignored = [key for key in ignored if not _EMBEDDING.match(key)]
    of_layers = [key for key in ignored if names_a_layer(key)]
    others = [key for key in ignored if not names_a_layer(key)]
    has_ia3 = any(key.endswith(".on_input") for key in of_layers)
    kinds = {key: _kind_of_unread(key, has_ia3) for key in of_layers}
    if acting := [key for key in of_layers if _acts(key, weights[key])]:
        example_of = {kinds[key]: key for key in reversed(acting)}
        examples = " and ".join(
            f"{key:.100} ({kind})" if kind else f"{key:.100}"
            for kind, key in list(example_of.items())[:2]
        )
        raise ValueError(
            f"{where} has {len(acting)} weights of a kind that is not read here, for example "
            f"{examples}; what is read is {READ}"
        )
    notes = []
    if of_layers:
        names = ", ".join(dict.fromkeys(filter(None, kinds.values()))) or "of no kind that is read"
        notes.append(f"{len(of_layers)} weights are zero, so that they change nothing ({names})")
    if others:
        notes.append(f"{len(others)} keys name no layer, for example {others[0]:.100}")
    return notes


def embedding_notes(ignored: Iterable[str], path: Path | None) -> tuple[str, ...]:
    """A sentence on the textual inversions among ignored keys, with the calls that load them.

    Source: the keys of lycoris/tools in KohakuBlueleaf/LyCORIS, as OneTrainer and A1111 have them.
    """
    names, calls, others = set(), [], []
    for key in sorted(ignored, reverse=True):  # clip_l before clip_g
        match = _EMBEDDING.match(key)
        if not match:
            continue
        names.add(match["name"])
        if match["part"].endswith("_out") or match["part"].startswith("t5"):
            others.append(key)
            continue
        encoder = _SECOND_ENCODER if match["part"] == "clip_g" else ""
        calls.append(f"pipe.load_textual_inversion(e[{key!r}], token={match['name']!r}{encoder})")
    if not names:
        return ()
    read = f"from safetensors.torch import load_file; e = load_file({str(path)!r})"
    calls.insert(0, "e = the adapter's weights" if path is None else read)
    return (
        f"the file holds an embedding (textual inversion) for "
        f"{', '.join(map(repr, sorted(names)))}, which prompts need and which is not loaded; load "
        f"it with {'; '.join(calls)}"
        + (f" ({', '.join(others)}: for OneTrainer alone)" if others else ""),
    )


def _call_for(template: str, path: Path) -> str:
    """The call that loads a file, or weights in memory where the path has no suffix."""
    if template[0].isupper():
        how = "from_single_file" if "{path}" in template else "from_pretrained"
        template = f"diffusers.{template.replace('(', f'.{how}(')}"
    read = f"load_file({str(path)!r})" if path.suffix else "weights"
    has_encoder = (path.parent / "image_encoder").is_dir()
    call = template.format(
        path=repr(str(path)) if path.suffix else "weights",
        weights=read,
        folder=repr(str(path.parent)),
        name=repr(path.name),
        word=repr(path.stem[:30]),
        encoder="" if has_encoder else ", image_encoder_folder=None",
    )
    return f"from safetensors.torch import load_file; {call}" if "load_file(" in call else call


def _textual_inversion(weights: Mapping[str, Tensor]) -> tuple[str, str] | None:
    """A kind and a call, for {token: vectors}, A1111's file of one word, or one for SDXL."""
    words = [
        key
        for key, value in weights.items()
        if value.dim() in (1, 2)
        and value.shape[-1] >= 32
        and not re.search(r"\.(weight|bias|alpha)$|_(weight|bias)$", key)
    ]
    numbers = sum(value.dim() == 0 for value in weights.values())
    if not 0 < len(words) <= 64 or len(words) < len(weights) - numbers:
        return None
    if sdxls := [key for key in _SDXL_WORDS if key in words]:
        calls = [
            f"pipe.load_textual_inversion(e['{key}'], token={{word}}{_SDXL_WORDS[key]})"
            for key in sdxls
        ]
        return "a textual inversion", "; ".join(["e = {weights}", *calls])
    if words in (["emb_params"], ["string_to_param.*"]):
        return "a textual inversion", "pipe.load_textual_inversion({path}, token={word})"
    if any(re.match(r"(un)?conditional|lora|\d+$", key) for key in words):
        return None
    if len(words) == 1:
        return f"a textual inversion for {words[0][:40]!r}", "pipe.load_textual_inversion({path})"
    call = "[pipe.load_textual_inversion(e, token=word) for word, e in {weights}.items()]"
    return "a textual inversion of several words", call


def _kind_of_unread(key: str, has_ia3: bool) -> str:
    kind = next((kind for pattern, kind in _UNREAD if re.search(pattern, key)), "")
    return kind or ("IA³" if has_ia3 and key.endswith(".weight") else "")


def _acts(key: str, value: Tensor) -> bool:
    """Whether a weight changes something; IA³'s on_input only says which side it is for."""
    if key.endswith(".on_input"):
        return False
    return key.endswith(".set_weight") or bool(value.float().any())
