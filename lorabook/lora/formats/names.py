"""Names of layers in adapter files, brought to those of diffusers and transformers."""

import re

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
