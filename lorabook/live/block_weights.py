"""Vectors of the A1111 block-weight extension, and presets by name, as scales dictionaries.

Source: the tables and `to26` of https://github.com/hako-mikan/sd-webui-lora-block-weight, scripts/lora_block_weight.py.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from numbers import Real

from lorabook.blocks import place_of
from lorabook.live.expand import expand, steps_of

_IN, _OUT = ([f"{side}{number:02}" for number in range(12)] for side in ("IN", "OUT"))
NAMES = {
    26: ("BASE", *_IN, "MID", *_OUT),
    17: ("BASE", *(_IN[i] for i in (1, 2, 4, 5, 7, 8)), "MID", *_OUT[3:]),
    20: ("BASE", *_IN[:9], "MID", *_OUT[:9]),
    12: ("BASE", *(_IN[i] for i in (4, 5, 7, 8)), "MID", *_OUT[:6]),
}
# what a family's UNet has: number of blocks, and which down blocks have attention
_BLOCKS = {"sd": (4, (0, 1, 2)), "sdxl": (3, (1, 2))}
TEXTS = {"sd": ("text_encoder",), "sdxl": ("text_encoder", "text_encoder_2")}
_DOTLESS = ("conv_in", "conv_out", "text_projection")
_LAYERS = {
    "resnets": ("conv1", "conv2", "conv_shortcut", "time_emb_proj"),
    "attentions": (
        "proj_in",
        "proj_out",
        *(
            f"transformer_blocks.0.{layer}"
            for layer in (
                *(f"attn{i}.to_{name}" for i in (1, 2) for name in ("q", "k", "v", "out.0")),
                "ff.net.0.proj",
                "ff.net.2",
            )
        ),
    ),
    "text": (
        "self_attn.q_proj",
        "self_attn.k_proj",
        "self_attn.v_proj",
        "self_attn.out_proj",
        "mlp.fc1",
        "mlp.fc2",
    ),
}


def from_block_weights(numbers: Sequence[float], *, family: str | None = None) -> dict:
    """A vector of block weights as scales.

    As in the extension, blocks that a short vector does not name get 0, and layers outside the blocks (time embedding,
    conv_out) keep 1. IN00 is conv_in, IN03, IN06 and IN09 are the downsamplers, the other INs and the OUTs a resnet and
    the attention behind it; an upsampler goes with the OUT before it.

    Args:
        numbers: 17 or 26 of them (Stable Diffusion: LoRA, LoCon), 12 or 20 (SDXL: LoRA, LoCon).
        family: "sd" or "sdxl", whose blocks are named; None takes the one that the count was made for.
    Returns: scales, as `set_scales` takes them for one adapter.
    Raises: ValueError for another count or family, or an entry that is not a finite number.
    """
    numbers = list(numbers)
    if len(numbers) not in NAMES:
        raise ValueError(f"block weights are {_counts()} numbers, not {len(numbers)}")
    named = dict(zip(NAMES[len(numbers)], numbers, strict=True))
    for name, number in named.items():
        if isinstance(number, bool) or not isinstance(number, Real) or not math.isfinite(number):
            raise ValueError(f"the block weight {name} must be a finite number, not {number!r}")
    return _scales(
        {name: float(named.get(name, 0)) for name in NAMES[26]}, family or _family(len(numbers))
    )


def to_block_weights(scales, count: int) -> list[float]:
    """Scales as a vector of block weights: the other way of `from_block_weights`.

    Args:
        scales: of one adapter: the number of every layer it has, by component and module, as `set_scales` gives them back
            (`table["ink"]`); or a scales dictionary or number, which is read for the layers that the count was made for,
            those of a LoRA for 12 and 17 and of a LoCon for 20 and 26.
        count: 17, 26, 12 or 20.
    Returns: the numbers; 1 where the adapter has no layer in a block.
    Raises: ValueError, naming the block, where one number a block cannot say it: layers of a block that differ, a layer
        outside the blocks that is not at 1, a block that the vector does not name and that is not at 0, or "steps".
    """
    if count not in NAMES:
        raise ValueError(f"block weights are {_counts()} numbers, not {count}")
    if steps_of(scales):
        raise ValueError(
            "block weights cannot say how scales change over the denoising; take 'steps' out"
        )
    if not _by_layer(scales):
        scales = _expanded(scales, count)
    found: dict[str, tuple[str, float]] = {}
    for component, layers in scales.items():
        for module, number in layers.items():
            place, layer = _place(component, module), f"{component}.{module}"
            if place is None:
                if not math.isclose(number, 1):
                    raise ValueError(
                        f"{layer} is at {number:g}; block weights leave what is outside the blocks at 1"
                    )
                continue
            if place not in NAMES[count] and number != 0:
                raise ValueError(
                    f"{count} block weights leave {place} at 0, where {layer} is at {number:g}; use "
                    f"{'26' if count in (17, 26) else '20 or 26'} of them"
                )
            first, same = found.setdefault(place, (layer, number))
            if not math.isclose(number, same, rel_tol=1e-9, abs_tol=1e-12):
                raise ValueError(
                    f"block weights have one number for {place}, where {first} is at {same:g} and {layer} at "
                    f"{number:g}"
                )
    return [float(found[place][1]) if place in found else 1.0 for place in NAMES[count]]


def _place(component: str, module: str) -> str | None:
    """The position of the 26 numbers that a layer obeys, as "BASE", "IN04", "MID"; None for one outside the blocks."""
    if component.startswith("text_encoder"):
        return "BASE"
    if module == "conv_in":
        return "IN00"
    if module.startswith("mid_block."):
        return "MID"
    found = place_of(module)
    if found is None:
        return None
    (side, block), place = found[0].split("."), 2 if found[1] == "samplers" else found[2]
    return _IN[3 * int(block) + place + 1] if side == "down" else _OUT[3 * int(block) + place]


def _by_layer(scales) -> bool:
    """Whether scales are numbers by component and layer already; most layers' names have a dot, and globs more."""
    if not isinstance(scales, Mapping) or not all(
        isinstance(layers, Mapping) for layers in scales.values()
    ):
        return False
    names = [name for layers in scales.values() for name in layers]
    return all(name in _DOTLESS or "." in name and not set(name) & set("*?[") for name in names)


def _expanded(scales, count: int) -> dict[str, dict[str, float]]:
    """Scales by layer, for the layers that a vector of this count is about."""
    family = _family(count)
    texts = [
        f"text_model.encoder.layers.{number}.{layer}"
        for number in range(12)
        for layer in _LAYERS["text"]
    ]
    layers = expand(
        scales, dict.fromkeys(TEXTS[family], texts) | {"unet": list(_unet(family))}, "the scales"
    )
    # a LoRA has no layers in the blocks that a short vector leaves out
    layers["unet"] = {
        module: number
        for module, number in layers["unet"].items()
        if _place("unet", module) in NAMES[count]
    }
    return layers


def _unet(family: str) -> Iterator[str]:
    """The layers of a family's UNet, one transformer in each attention."""
    blocks, with_attention = _BLOCKS[family]
    homes = ["mid_block.resnets.0", "mid_block.attentions.0", "mid_block.resnets.1"]
    for block in range(blocks):
        for side, places, twin in (("down", 2, block), ("up", 3, blocks - 1 - block)):
            parts = ("resnets", "attentions") if twin in with_attention else ("resnets",)
            homes += [f"{side}_blocks.{block}.{part}.{i}" for i in range(places) for part in parts]
            if block < blocks - 1:
                yield f"{side}_blocks.{block}.{side}samplers.0.conv"
    yield "conv_in"
    yield from (f"{home}.{layer}" for home in homes for layer in _LAYERS[home.split(".")[-2]])


def _family(count: int) -> str:
    return "sd" if count in (17, 26) else "sdxl"


def _scales(number: Mapping[str, float], family: str) -> dict:
    """Scales from all 26 numbers by name."""
    if family not in _BLOCKS:
        raise ValueError(f"unknown family {family!r}; the families are: {', '.join(_BLOCKS)}")
    blocks, with_attention = _BLOCKS[family]
    down = {}
    for block in range(blocks):
        sampler = {"sampler": number[_IN[3 * block + 3]]} if block < blocks - 1 else {}
        parts = ("resnets", "attentions") if block in with_attention else ("resnets",)
        down[f"block_{block}"] = {
            f"{part}_{i}": number[_IN[3 * block + i + 1]] for i in (0, 1) for part in parts
        } | sampler
    up = {
        f"block_{block}": [number[_OUT[3 * block + i]] for i in range(3)] for block in range(blocks)
    }
    unet = {"conv_in": number["IN00"], "down": _short(down), "mid": number["MID"], "up": _short(up)}
    return dict.fromkeys(TEXTS[family], number["BASE"]) | {"unet": unet}


def _short(blocks: Mapping[str, dict | list]) -> dict:
    """A block whose numbers are all the same as that number."""
    values = {
        name: set(parts.values() if isinstance(parts, dict) else parts)
        for name, parts in blocks.items()
    }
    return {
        name: values[name].pop() if len(values[name]) == 1 else parts
        for name, parts in blocks.items()
    }


def _counts() -> str:
    *most, last = sorted(NAMES)
    return f"{', '.join(map(str, most))} or {last}"
