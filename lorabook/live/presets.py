"""Scales by name: what a part of the model does, and the A1111 block-weight extension's own presets."""

import difflib
from collections.abc import Mapping
from dataclasses import dataclass

from lorabook.blocks import KINDS
from lorabook.live.block_weights import TEXTS, from_block_weights


@dataclass(frozen=True)
class Preset:
    """Scales with a name; what the name does not speak of is at 0 where it says "only" or "blocks", else at 1.

    Attributes:
        unet: scales of the UNet by family, "sd" and "sdxl".
        text: the number of the text encoders.
        why: what it is good for, and who says so.
    """

    unet: Mapping[str, float | dict]
    text: float
    why: str


def preset(name: str, family: str = "sd") -> dict:
    """The scales that a name stands for.

    Args:
        name: one of `PRESETS`, or of the block-weight extension's `VECTORS`, whose 17 numbers mean what they mean there:
            a block that they do not name gets 0, so that on SDXL they switch off OUT00 to OUT02.
        family: "sd" or "sdxl".
    Returns: scales, as `set_scales` takes them for one adapter.
    Raises: ValueError for an unknown name, listing the nearest, or an unknown family.
    """
    if family not in TEXTS:
        raise ValueError(f"unknown family {family!r}; the families are: {', '.join(TEXTS)}")
    if name in VECTORS:
        return from_block_weights(VECTORS[name], family=family)
    if name not in PRESETS:
        names = [*PRESETS, *VECTORS]
        nearest = difflib.get_close_matches(name, names, 4, 0.4)
        raise ValueError(
            f"unknown preset {name!r}; "
            + (
                f"the nearest are: {', '.join(nearest)}"
                if nearest
                else f"the presets are: {', '.join(names)}"
            )
        )
    chosen = PRESETS[name]
    return dict.fromkeys(TEXTS[family], chosen.text) | {"unet": _copy(chosen.unet[family])}


def _copy(part):
    return {key: _copy(value) for key, value in part.items()} if isinstance(part, dict) else part


def _everywhere(part: float | dict) -> dict[str, float | dict]:
    return {"sd": part, "sdxl": part}


def _only(kind: str) -> dict[str, float | dict]:
    return _everywhere({other: 0.0 for other in KINDS if other != kind})


_INNER = {
    "down": {"block_0": 0.0, "block_1": 0.0},
    "up": {"block_2": 0.0, "block_3": 0.0},
    "embedding": 0.0,
}
_OUTER_UP = {"down": 0.0, "mid": 0.0, "up": {"block_0": 0.0, "block_1": 0.0}, "embedding": 0.0}


def _one_attention(side: str, block: int, place: int) -> dict:
    """Scales of SDXL's UNet that leave one `attentions.place`, of three in an up block and of two in a down block."""
    others = {f"attentions_{i}": 0.0 for i in range(3 if side == "up" else 2) if i != place}
    # SDXL's last blocks have no sampler
    inside = others | {"resnet": 0.0} | ({"sampler": 0.0} if block < 2 else {})
    blocks = {f"block_{i}": inside if i == block else 0.0 for i in range(3)}
    return {"down": 0.0, "mid": 0.0, "up": 0.0, "embedding": 0.0} | {side: blocks}


PRESETS = {
    "unet only": Preset(_everywhere(1.0), 0.0, "the picture's side without the changed words"),
    "text encoder only": Preset(
        _everywhere(0.0), 1.0, "the changed words without the picture's side"
    ),
    "cross-attention only": Preset(
        _only("cross-attention"),
        0.0,
        "where words meet the picture, and what fine-tuning changes most: Custom Diffusion, "
        "arXiv:2212.04488",
    ),
    "self-attention only": Preset(
        _only("attention"),
        0.0,
        "how the parts of a picture are laid out: Plug-and-Play Diffusion, arXiv:2211.12572",
    ),
    "feed-forward only": Preset(
        _only("feed-forward"), 0.0, "what each place becomes by itself, to compare with attention"
    ),
    "resnets only": Preset(
        _only("resnet"), 0.0, "the convolutions that LoCon adds to LoRA: LyCORIS, arXiv:2309.14859"
    ),
    "no resnets": Preset(
        _everywhere({"resnet": 0.0}),
        1.0,
        "a LoCon without its convolutions in resnets, as a LoRA is",
    ),
    "style blocks": Preset(
        {"sd": _OUTER_UP, "sdxl": _one_attention("up", 0, 1)},
        0.0,
        "SDXL: up.block_0 attentions.1 carries colour, material and atmosphere (InstantStyle, arXiv:2404.02733; B-LoRA, "
        "arXiv:2403.14572); SD: fine outer layers carry appearance (P+, arXiv:2303.09522), OUT06 to OUT11",
    ),
    "layout blocks": Preset(
        {"sd": _INNER, "sdxl": _one_attention("down", 2, 1)},
        0.0,
        "SDXL: down.block_2 attentions.1 carries structure and composition (InstantStyle, arXiv:2404.02733); SD: coarse "
        "inner layers carry structure (P+, arXiv:2303.09522), IN07 to OUT05",
    ),
    "content blocks": Preset(
        {"sd": _INNER, "sdxl": _one_attention("up", 0, 0)},
        0.0,
        "SDXL: up.block_0 attentions.0 carries what is shown (B-LoRA, arXiv:2403.14572); SD: as the layout blocks",
    ),
}

# the numbers that the extension comes with, for BASE, IN01, IN02, IN04, IN05, IN07, IN08, MID, OUT03 … OUT11
VECTORS = {
    name: tuple(float(digit) for digit in digits)
    for name, digits in {
        "NONE": "00000000000000000",
        "ALL": "11111111111111111",
        "INS": "11110000000000000",
        "IND": "10001110000000000",
        "INALL": "11111110000000000",
        "MIDD": "10001111111100000",
        "OUTD": "10000000111100000",
        "OUTS": "10000000000011111",
        "OUTALL": "10000000111111111",
    }.items()
} | {"ALL0.5": (0.5,) * 17}
