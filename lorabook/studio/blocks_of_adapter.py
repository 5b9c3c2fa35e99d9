"""What of a model an adapter touches, by the names that the sliders have."""

from lorabook.blocks import block_map, kind_of, place_of
from lorabook.live.layers import layers_of, models_of, walk

UNet = dict[str, list[str]]


def touched_blocks(pipe, name: str) -> list[str]:
    """The blocks that have a slider: of the UNet, "outside", and the text encoders."""
    layers = layers_of(pipe, name)
    return [
        *block_map(layers.get("unet", ())),
        *(part for part in layers if part.startswith("text_encoder")),
    ]


def touched_parts(pipe, name: str) -> dict[str, list[str]]:
    """The parts of each block of the UNet, in the order in which an image passes them."""
    parts: dict[str, set] = {}
    for module in layers_of(pipe, name).get("unet", ()):
        if place := place_of(module):
            block, what, number = place
            key = (
                (number, what != "resnets", f"{what}_{number}")
                if what != "samplers"
                else (99, True, "sampler")
            )
            parts.setdefault(block, set()).add(key)
    return {
        block: [part for *_, part in sorted(parts[block])]
        for block in block_map(layers_of(pipe, name).get("unet", ()))
        if block in parts
    }


def touched_kinds(pipe, name: str) -> list[str]:
    """The kinds of layers of the UNet, but those outside its blocks, which have a slider of their own."""
    inside = (module for module in layers_of(pipe, name).get("unet", ()) if place_of(module))
    return list(dict.fromkeys(kind_of(module) for module in inside))


def blocks_of(pipe) -> list[str]:
    """All blocks of a pipeline's UNet, touched or not; none where it has no UNet."""
    unet = models_of(pipe).get("unet")
    return (
        [block for block in block_map(name for name, _ in walk(unet)) if block != "outside"]
        if unet is not None
        else []
    )
