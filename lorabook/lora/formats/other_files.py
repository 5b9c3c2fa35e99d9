"""Files that are no adapters: what they are by their keys, and the call of diffusers that loads them."""

import re
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

_LONGEST = 400
_READ = "from safetensors.torch import load_file; "
_SECOND = "text_encoder=pipe.text_encoder_2, tokenizer=pipe.tokenizer_2"
# a pattern that one of the keys has at its beginning, what the file is, and what loads it; the first that fits counts
_KINDS = (
    (
        r"image_proj\.|ip_adapter\.|ip_adapter_proj_model|.*\.ip_adapter_\w+_(k|v)_proj",
        "an IP-Adapter",
        "pipe.load_ip_adapter({folder!r}, subfolder='', weight_name={name!r}{encoder})",
    ),
    (r"lllite_", "a ControlNet-LLLite, for which diffusers has no loader", None),
    (r"lora_controlnet$", "a Control-LoRA, for which diffusers has no loader", None),
    (
        r"control_model\.|input_hint_block|zero_convs",
        "a ControlNet",
        "diffusers.ControlNetModel.from_single_file({path!r})",
    ),
    (
        r"controlnet_(cond_embedding|down_blocks|mid_block|blocks|x_embedder)",
        "a ControlNet",
        "diffusers.ControlNetModel.from_pretrained({folder!r})",
    ),
    (r"(adapter\.)?body\.\d", "a T2I-Adapter", "diffusers.T2IAdapter.from_pretrained({folder!r})"),
    (
        r".*\.to_[kvq]_custom_diffusion|.*\.to_out_custom_diffusion",
        "a Custom Diffusion",
        "pipe.unet.load_attn_procs({folder!r}, weight_name={name!r})",
    ),
    (
        r"conditioner\.",
        "a whole checkpoint",
        "diffusers.StableDiffusionXLPipeline.from_single_file({path!r})",
    ),
    (
        r"model\.diffusion_model\.|cond_stage_model\.",
        "a whole checkpoint",
        "diffusers.StableDiffusionPipeline.from_single_file({path!r})",
    ),
    (
        r"down_blocks\.\d+\.motion_modules\.",
        "a motion module of AnimateDiff",
        "diffusers.MotionAdapter.from_single_file({path!r})",
    ),
    (
        r"(first_stage_model\.)?(en|de)coder\.(down|up|mid)\.",
        "a VAE",
        "diffusers.AutoencoderKL.from_single_file({path!r})",
    ),
    (
        r"(en|de)coder\.(conv_in|(down|up)_blocks|mid_block)",
        "a VAE",
        "diffusers.AutoencoderKL.from_pretrained({folder!r})",
    ),
    (
        r"(double_blocks|joint_blocks|transformer_blocks|blocks|layers)\.\d+\.",
        "a whole transformer",
        None,
    ),
    (
        r"(conv_in|time_embedding\.linear_1)\.weight",
        "a whole UNet",
        "diffusers.UNet2DConditionModel.from_pretrained({folder!r})",
    ),
    (
        r"(time_embed\.0|input_blocks\.0\.0)\.weight",
        "a whole UNet",
        "diffusers.UNet2DConditionModel.from_single_file({path!r})",
    ),
    (
        r"(text_model\.)?(encoder\.layers|embeddings)\.",
        "a whole text encoder",
        "transformers.CLIPTextModel.from_pretrained({folder!r})",
    ),
    (
        r"\d+\.\d+\.linear\.\d+\.|\d{3,4}$",
        "a hypernetwork, for which diffusers has no loader",
        None,
    ),
)


def other_kind(weights: Mapping[str, Tensor], where: str) -> str | None:
    """A sentence that says what a file is that is no adapter, and how to load it; None where that is not known.

    Args:
        weights: of the whole file.
        where: its path, or what else to call it.
    """
    kind, call = _textual_inversion(weights) or next(
        (
            (kind, call)
            for pattern, kind, call in _KINDS
            if any(re.match(pattern, key) for key in weights)
        ),
        (None, None),
    )
    if kind is None:
        return None
    said = f"{where} is {kind}, not a LoRA"
    if call is None:
        return said
    for path in (where, Path(where).name):  # of a long path the name alone
        inside = Path(path)
        encoder = (
            "" if (inside.parent / "image_encoder").is_dir() else ", image_encoder_folder=None"
        )
        told = call.format(
            path=path,
            folder=str(inside.parent),
            name=inside.name,
            word=inside.stem[:30],
            encoder=encoder,
        )
        if not inside.suffix:  # weights in memory
            told = (
                told.replace(_READ, "")
                .replace(f"load_file({path!r})", "weights")
                .replace(repr(path), "weights")
            )
        full = f"{said}; load it with {told}"
        if len(full) <= _LONGEST and "…" not in path:
            break
    return full[:_LONGEST]


def _textual_inversion(weights: Mapping[str, Tensor]) -> tuple[str, str] | None:
    """diffusers' {token: vectors}, A1111's emb_params or string_to_param, or SDXL's clip_l and clip_g."""
    vectors = [
        key
        for key, value in weights.items()
        if value.dim() in (1, 2)
        and value.shape[-1] >= 32
        and not re.search(r"\.(weight|bias|alpha)$|_(weight|bias)$", key)
    ]
    if (
        not vectors
        or len(vectors) < len(weights) - sum(value.dim() == 0 for value in weights.values())
        or len(vectors) > 64
    ):
        return None
    two = [
        next((key for key in vectors if re.fullmatch(pattern, key)), None)
        for pattern in (r"clip_l|text_encoders_0", r"clip_g|text_encoders_1")
    ]
    if any(two):
        calls = [
            f"pipe.load_textual_inversion(e['{key}'], token={{word!r}}{', ' + _SECOND if number else ''})"
            for number, key in enumerate(two)
            if key
        ]
        return "a textual inversion", "; ".join([_READ + "e = load_file({path!r})", *calls])
    if vectors in (["emb_params"], ["string_to_param.*"]):
        return "a textual inversion", "pipe.load_textual_inversion({path!r}, token={word!r})"
    if any(re.match(r"(un)?conditional|lora|\d+$", key) for key in vectors):
        return None
    if len(vectors) == 1:
        return f"a textual inversion for {vectors[0][:40]!r}".replace("{", "{{").replace(
            "}", "}}"
        ), "pipe.load_textual_inversion({path!r})"
    return (
        "a textual inversion of several words",
        _READ
        + "[pipe.load_textual_inversion(e, token=word) for word, e in load_file({path!r}).items()]",
    )
