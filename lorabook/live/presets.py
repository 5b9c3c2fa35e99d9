"""Scales by name, and the vectors of the A1111 block-weight extension, as scales dictionaries.

The tables are those of scripts/lora_block_weight.py in
https://github.com/hako-mikan/sd-webui-lora-block-weight.
"""

import math
from collections.abc import Mapping, Sequence
from copy import deepcopy
from typing import NamedTuple

from diffusers import DiffusionPipeline

from lorabook.blocks import KINDS, place_of
from lorabook.checks import is_number, nearest
from lorabook.types import Scales

TEXT_ENCODERS = {"sd": ("text_encoder",), "sdxl": ("text_encoder", "text_encoder_2")}
_IN, _OUT = ([f"{side}{number:02}" for number in range(12)] for side in ("IN", "OUT"))
NAMES = {
    26: ("BASE", *_IN, "MID", *_OUT),
    17: ("BASE", *(_IN[i] for i in (1, 2, 4, 5, 7, 8)), "MID", *_OUT[3:]),
    20: ("BASE", *_IN[:9], "MID", *_OUT[:9]),
    12: ("BASE", *(_IN[i] for i in (4, 5, 7, 8)), "MID", *_OUT[:6]),
}
# by family: how many blocks a side of the UNet has, and which down blocks have attention
_BLOCKS = {"sd": (4, (0, 1, 2)), "sdxl": (3, (1, 2))}


class Preset(NamedTuple):
    """Scales with a name; the rest is at 0 where the name says "only" or "blocks", else at 1."""

    why: str  # what it is good for, and who says so
    text: float  # the scale of the text encoders
    unet: Scales
    sdxl: Scales | None = None  # the UNet's in SDXL, where they are others


def _only(kind: str) -> dict[str, Scales]:
    return {other: 0.0 for other in KINDS if other != kind}


def _one_attention(side: str, block: int, index: int) -> dict[str, Scales]:
    """Scales of SDXL's UNet that leave one attention: three in an up block, two in a down block."""
    others = {f"attentions_{i}": 0.0 for i in range(3 if side == "up" else 2) if i != index}
    inside = others | {"resnet": 0.0}
    if block < 2:  # SDXL's last block of each side has no sampler
        inside["sampler"] = 0.0
    blocks = {f"block_{i}": inside if i == block else 0.0 for i in range(3)}
    return {"down": 0.0, "mid": 0.0, "up": 0.0, "embedding": 0.0} | {side: blocks}


_INNER = {
    "down": {"block_0": 0.0, "block_1": 0.0},
    "up": {"block_2": 0.0, "block_3": 0.0},
    "embedding": 0.0,
}
_OUTER_UP = {"down": 0.0, "mid": 0.0, "up": {"block_0": 0.0, "block_1": 0.0}, "embedding": 0.0}

PRESETS = {
    "unet only": Preset("the picture's side without the changed words", 0.0, 1.0),
    "text encoder only": Preset("the changed words without the picture's side", 1.0, 0.0),
    "cross-attention only": Preset(
        "where words meet the picture, and what fine-tuning changes most: Custom Diffusion, "
        "arXiv:2212.04488",
        0.0,
        _only("cross-attention"),
    ),
    "self-attention only": Preset(
        "how the parts of a picture are laid out: Plug-and-Play Diffusion, arXiv:2211.12572",
        0.0,
        _only("attention"),
    ),
    "feed-forward only": Preset(
        "what each place becomes by itself, to compare with attention", 0.0, _only("feed-forward")
    ),
    "resnets only": Preset(
        "the convolutions that LoCon adds to LoRA: LyCORIS, arXiv:2309.14859", 0.0, _only("resnet")
    ),
    "no resnets": Preset(
        "a LoCon without its convolutions in resnets, as a LoRA is", 1.0, {"resnet": 0.0}
    ),
    "style blocks": Preset(
        "SDXL: up.block_0 attentions.1 carries colour, material and atmosphere (InstantStyle, "
        "arXiv:2404.02733; B-LoRA, arXiv:2403.14572); SD: fine outer layers carry appearance (P+, "
        "arXiv:2303.09522), OUT06 to OUT11",
        0.0,
        _OUTER_UP,
        _one_attention("up", 0, 1),
    ),
    "layout blocks": Preset(
        "SDXL: down.block_2 attentions.1 carries structure and composition (InstantStyle, "
        "arXiv:2404.02733); SD: coarse inner layers carry structure (P+, arXiv:2303.09522), IN07 "
        "to OUT05",
        0.0,
        _INNER,
        _one_attention("down", 2, 1),
    ),
    "content blocks": Preset(
        "SDXL: up.block_0 attentions.0 carries what is shown (B-LoRA, arXiv:2403.14572); SD: as "
        "the layout blocks",
        0.0,
        _INNER,
        _one_attention("up", 0, 0),
    ),
}
# the numbers that the extension comes with, for the 17 names
VECTORS = {
    "NONE": [0.0] * 17,
    "ALL": [1.0] * 17,
    "INS": [1.0] * 4 + [0.0] * 13,
    "IND": [1.0] + [0.0] * 3 + [1.0] * 3 + [0.0] * 10,
    "INALL": [1.0] * 7 + [0.0] * 10,
    "MIDD": [1.0] + [0.0] * 3 + [1.0] * 8 + [0.0] * 5,
    "OUTD": [1.0] + [0.0] * 7 + [1.0] * 4 + [0.0] * 5,
    "OUTS": [1.0] + [0.0] * 11 + [1.0] * 5,
    "OUTALL": [1.0] + [0.0] * 7 + [1.0] * 9,
    "ALL0.5": [0.5] * 17,
}


def family_of(pipe: DiffusionPipeline) -> str:
    """The family whose blocks a pipeline's UNet has: "sd" or "sdxl"."""
    return "sd" if getattr(pipe, "text_encoder_2", None) is None else "sdxl"


def preset(name: str, family: str = "sd") -> dict[str, Scales]:
    """The scales of one adapter that a name of `PRESETS` or `VECTORS` stands for."""
    _check_family(family)
    if name in VECTORS:
        return from_block_weights(VECTORS[name], family=family)
    if name not in PRESETS:
        hint = nearest(name, [*PRESETS, *VECTORS], "the presets are")
        raise ValueError(f"unknown preset {name!r}; {hint}")
    _, text, unet, sdxl = deepcopy(PRESETS[name])
    is_other = family == "sdxl" and sdxl is not None
    return dict.fromkeys(TEXT_ENCODERS[family], text) | {"unet": sdxl if is_other else unet}


def from_block_weights(numbers: Sequence[float], *, family: str | None = None) -> dict[str, Scales]:
    """A vector of block weights as scales.

    As in the extension, blocks that a short vector does not name get 0, and layers outside the
    blocks (time embedding, conv_out) keep 1. IN00 is conv_in; IN03, IN06 and IN09 are the
    downsamplers; each other IN or OUT is a resnet and the attention behind it; an upsampler goes
    with the OUT before it.

    Args:
        numbers: 17 or 26 (Stable Diffusion: LoRA, LoCon), 12 or 20 (SDXL: LoRA, LoCon).
        family: "sd" or "sdxl", whose blocks are named; None takes what the count was made for.

    Returns:
        Scales, as `set_scales` takes them for one adapter.

    Raises:
        ValueError: For another count or family, or an entry that is not a finite number.
    """
    numbers = list(numbers)
    _check_count(len(numbers))
    family = family or ("sd" if len(numbers) in (17, 26) else "sdxl")
    _check_family(family)
    weights = dict.fromkeys(NAMES[26], 0.0)
    for name, number in zip(NAMES[len(numbers)], numbers, strict=True):
        if not is_number(number):
            raise ValueError(f"the block weight {name} must be a finite number, not {number!r:.80}")
        weights[name] = float(number)
    blocks, with_attention = _BLOCKS[family]
    down, up = {}, {}
    for block in range(blocks):
        first, second = (weights[name] for name in _IN[3 * block + 1 :][:2])
        parts = {"resnets_0": first, "resnets_1": second}
        if block in with_attention:
            parts |= {"attentions_0": first, "attentions_1": second}
        if block < blocks - 1:
            parts["sampler"] = weights[_IN[3 * block + 3]]
        outs = [weights[name] for name in _OUT[3 * block :][:3]]
        # one number for a block fits every UNet, also one with fewer layers in a block
        down[f"block_{block}"] = first if len(set(parts.values())) == 1 else parts
        up[f"block_{block}"] = outs[0] if len(set(outs)) == 1 else outs
    unet = {"conv_in": weights["IN00"], "down": down, "mid": weights["MID"], "up": up}
    return dict.fromkeys(TEXT_ENCODERS[family], weights["BASE"]) | {"unet": unet}


def to_block_weights(scales: Mapping[str, Mapping[str, float]], count: int) -> list[float]:
    """The scales of an adapter's layers as a vector of block weights.

    Args:
        scales: Of each layer that the adapter has, by component and module, as `set_scales` gives
            them back: `table["ink"]`.
        count: 17, 26, 12 or 20.

    Returns:
        The numbers; 1 where the adapter has no layer in a block.

    Raises:
        ValueError: Naming the layer, where one number a block cannot say its scale.
    """
    _check_count(count)
    weights: dict[str, float] = {}
    for component, modules in scales.items():
        for module, scale in modules.items():
            name, layer = _name_of(component, module), f"{component}.{module}"
            if name not in NAMES[count]:  # layers outside the blocks keep 1, other blocks get 0
                expected, where = (0.0, f"in {name}") if name else (1.0, "outside the blocks")
            else:
                expected, where = weights.setdefault(name, scale), f"in {name}, as its first layer"
            if not math.isclose(scale, expected, rel_tol=1e-9, abs_tol=1e-12):
                raise ValueError(
                    f"block weights have one number for all that is {where}, {expected:g} of "
                    f"{count}, where {layer} is at {scale:g}; try 26 of them"
                )
    return [float(weights.get(name, 1.0)) for name in NAMES[count]]


def _name_of(component: str, module: str) -> str | None:
    """Which of the 26 names a layer obeys; None for one outside the blocks."""
    if component.startswith("text_encoder"):
        return "BASE"
    if module == "conv_in":
        return "IN00"
    if module.startswith("mid_block."):
        return "MID"
    place = place_of(module)
    if place is None:
        return None
    side, block = place[0].split(".")
    index = 3 * int(block) + (2 if place[1] == "samplers" else place[2])
    return _IN[index + 1] if side == "down" else _OUT[index]


def _check_count(count: int) -> None:
    if count not in NAMES:
        raise ValueError(f"block weights are 12, 17, 20 or 26 numbers, not {count}")


def _check_family(family: str) -> None:
    if family not in _BLOCKS:
        raise ValueError(f"unknown family {family!r}; the families are: {', '.join(_BLOCKS)}")
