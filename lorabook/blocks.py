"""The map of a model: which module belongs to which block, and of which kind it is."""

import re
from collections.abc import Iterable
from functools import lru_cache

_ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")
_FEED_FORWARD = ("ff.net.0.proj", "ff.net.2")
_CONVOLUTIONS = ("proj_in", "proj_out", "conv1", "conv2", "conv_shortcut", "time_emb_proj")
_SAMPLERS = ("downsamplers.0.conv", "upsamplers.0.conv")
TARGETS = {
    "attention": _ATTENTION,
    "attention+ff": _ATTENTION + _FEED_FORWARD,
    "all": _ATTENTION + _FEED_FORWARD + _CONVOLUTIONS + _SAMPLERS,
}
# the first pattern that is in a module's name says its kind
_KINDS = {
    r"\.self_attn\.|\.attn1\.": "attention",
    r"\.motion_modules\..*\.attn2\.": "attention",  # between frames, not with the words
    r"\.attn2\.": "cross-attention",
    r"\.mlp\.|\.ff\.": "feed-forward",
    r"\.attentions\.|\.motion_modules\.": "projection",
    r"\.resnets\.": "resnet",
    r"samplers\.": "sampler",
    "": "embedding",
}
KINDS = tuple(dict.fromkeys(_KINDS.values()))
_PLACE = re.compile(r"(?:(?:down|up)_blocks\.\d+|mid_block)\.(\w+)\.(\d+)\.")


@lru_cache(4096)
def block_of(module: str) -> str:
    """The block of a UNet's module: "down.0" … "mid" … "up.3", or "outside" for the rest."""
    match = re.match(r"(down|up)_blocks\.(\d+)\.", module)
    if match:
        return f"{match[1]}.{match[2]}"
    return "mid" if module.startswith("mid_block.") else "outside"


@lru_cache(4096)
def place_of(module: str) -> tuple[str, str, int] | None:
    """Where in a UNet a module is: as ("up.1", "attentions", 2), ("down.0", "samplers", 0), or in a
    model for video ("down.0", "motion_modules", 1); None outside of a block's numbered parts.
    """
    match = _PLACE.match(module)
    if not match:
        return None
    return block_of(module), "samplers" if "samplers" in match[1] else match[1], int(match[2])


@lru_cache(4096)
def kind_of(module: str) -> str:
    """What sort of layer a module of a UNet or a text encoder is: one of `KINDS`."""
    return next(kind for pattern, kind in _KINDS.items() if re.search(pattern, module))


def block_map(modules: Iterable[str]) -> dict[str, list[str]]:
    """Module names by block, in the UNet's order; blocks without any of the modules are absent.

    Args:
        modules: Dotted names inside a UNet, for example those that an adapter touches.
    """
    blocks: dict[str, list[str]] = {}
    for module in modules:
        blocks.setdefault(block_of(module), []).append(module)
    order = {"down": 0, "mid": 1, "up": 2, "outside": 3}
    return dict(sorted(blocks.items(), key=lambda item: (order[item[0].split(".")[0]], item[0])))


def target_modules(target: str) -> list[str]:
    """Name endings of the UNet modules that a training target adapts, for PEFT's LoraConfig.

    "attention" is query, key, value and output; "attention+ff" adds feed-forward, and "all" the
    projections, resnets and samplers, as LoCon does.
    """
    if target not in TARGETS:
        raise ValueError(f"unknown target {target!r}; the targets are: {', '.join(TARGETS)}")
    return list(TARGETS[target])


def group_by_block(places: Iterable[tuple[str, str]]) -> dict[str, list[tuple[str, str]]]:
    """(component, module) by block: a UNet's in its order, then each other component."""
    modules: dict[str, list[str]] = {}
    for component, module in places:
        modules.setdefault(component, []).append(module)
    blocks = block_map(modules.pop("unet", ()))
    groups = {block: [("unet", module) for module in inside] for block, inside in blocks.items()}
    others = {name: [(name, module) for module in inside] for name, inside in modules.items()}
    return groups | others
