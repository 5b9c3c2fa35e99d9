"""The shapes of the weights that an adapter changes, and LoRA layers of those shapes."""

import re
from collections.abc import Mapping

import torch
from torch import Tensor

from lorabook.lora.adapter import Adapter, Layer

Shape = tuple[int, ...]
_THREE = re.compile(
    r"(^|\.)(conv1|conv2|conv_in|conv_out|(down|up)samplers\.0\.conv)$"
)  # 3 × 3 in every UNet
_SD2_WIDTH = 1024  # of the text embeddings of Stable Diffusion 2, whose projections are matrices


def weight_shape(layer: Layer, module: str = "") -> Shape | None:
    """The shape of the weight that a layer changes, as far as its tensors tell, else its name.

    Args:
        layer: of any kind. LoHa and LoKr may keep a convolution's kernel flattened; then the tensors do not tell.
        module: its dotted name, which tells the kernel of resnets and samplers.
    Returns: (out, in) or (out, in, height, width); None where neither tells, as for `proj_in`, which is a matrix in
        some models and a convolution in others.
    """
    t = layer.tensors
    if layer.kind == "full":
        return tuple(t["diff"].shape)
    if layer.kind == "lora":
        kernel = t["mid"].shape[2:] if "mid" in t else t["down"].shape[2:]
        return (t["up"].shape[0], t["down"].shape[1], *kernel)
    out, rest = _flat_shape(layer)
    core = next((t[role] for role in ("t1", "t2") if role in t), None)
    if core is not None:
        return (out, rest, *core.shape[2:])
    if "w2" in t:
        return (out, t["w2"].shape[1] * _half_shape(t, 1)[1], *t["w2"].shape[2:])
    if _THREE.search(module):
        return (out, rest // 9, 3, 3)
    if module.endswith("conv_shortcut"):
        return (out, rest, 1, 1)
    return None if not module or module.endswith(("proj_in", "proj_out")) else (out, rest)


def matrix_shape(layer: Layer) -> tuple[int, int]:
    """(out, in · height · width) of the weight that a layer changes."""
    t = layer.tensors
    if layer.kind in ("full", "lora"):
        first, last = (t["diff"], t["diff"]) if layer.kind == "full" else (t["up"], t["down"])
        kernel = t["mid"].shape[2:].numel() if "mid" in t else 1
        return first.shape[0], last.shape[1:].numel() * kernel
    out, rest = _flat_shape(layer)
    core = next((t[role] for role in ("t1", "t2") if role in t), None)
    return out, rest * (core.shape[2:].numel() if core is not None else 1)


def shapes_of(
    adapter: Adapter, bases: Mapping[str, Mapping[str, Tensor]] | None = None
) -> dict[str, dict[str, Shape]]:
    """The shapes of all weights that an adapter changes, by component and module.

    Args:
        adapter: any.
        bases: the model's own weights, which say it surest. Without them, projections of a LoHa or LoKr are taken as
            matrices where the adapter is one for SDXL or Stable Diffusion 2, and as 1 × 1 convolutions else.
    """
    bases, shapes = bases or {}, {}
    for part, layers in adapter.layers.items():
        kernel = () if _projections_are_matrices(layers) else (1, 1)
        for module, layer in layers.items():
            base = bases.get(part, {}).get(module)
            shape = tuple(base.shape) if base is not None else weight_shape(layer, module)
            if (
                base is None
                and len(shape or ()) == 2
                and module.endswith(("conv_shortcut", "proj_in", "proj_out"))
            ):
                shape = (
                    *shape,
                    *((1, 1) if module.endswith("conv_shortcut") else kernel),
                )  # some files flatten these
            shapes.setdefault(part, {})[module] = shape or (*_flat_shape(layer), *kernel)
    return shapes


def as_lora(up: Tensor, down: Tensor, shape: Shape) -> Layer:
    """A plain LoRA layer from matrix factors, its tensors shaped for a weight.

    Args:
        up, down: (out, k) and (k, in · height · width).
        shape: of the weight: (out, in), or (out, in, height, width) for a convolution.
    Returns: a Layer of rank k and scaling 1.
    Raises: ValueError if the factors do not make up such a weight.
    """
    rank = down.shape[0]
    if up.shape[0] != shape[0] or down.shape[1] != torch.Size(shape[1:]).numel():
        raise ValueError(
            f"factors of shapes {tuple(up.shape)} and {tuple(down.shape)} do not make up a weight of shape "
            f"{tuple(shape)}; it belongs to another layer or model"
        )
    tensors = {
        "up": up.reshape(shape[0], rank, *[1] * (len(shape) - 2)),
        "down": down.reshape(rank, *shape[1:]),
    }
    return Layer("lora", {role: value.contiguous() for role, value in tensors.items()}, 1.0, rank)


def _flat_shape(layer: Layer) -> tuple[int, int]:
    """(out, in · height · width, or in where there is a core) of a LoHa or LoKr."""
    t = layer.tensors
    if layer.kind == "loha":
        return (t["w1_a"].shape["t1" in t], t["w1_b"].shape[1])
    (out_1, in_1), (out_2, in_2) = _half_shape(t, 1), _half_shape(t, 2)
    return out_1 * out_2, in_1 * in_2


def _half_shape(t: Mapping[str, Tensor], number: int) -> tuple[int, int]:
    """Rows and columns of one half of a LoKr."""
    if f"w{number}" in t:
        return t[f"w{number}"].shape[0], t[f"w{number}"].shape[1:].numel()
    a, b = t[f"w{number}_a"], t[f"w{number}_b"]
    return a.shape[f"t{number}" in t], b.shape[1]


def _projections_are_matrices(layers: Mapping[str, Layer]) -> bool:
    """Whether `proj_in` and `proj_out` are matrices: SDXL stacks transformers, Stable Diffusion 2 has its own width."""
    widths = {_rest(layer) for module, layer in layers.items() if module.endswith("attn2.to_k")}
    return _SD2_WIDTH in widths or any("transformer_blocks.1." in module for module in layers)


def _rest(layer: Layer) -> int:
    return torch.Size((weight_shape(layer, "to_k") or (0,))[1:]).numel()


def is_large(adapter: Adapter) -> bool:
    """Whether an adapter is one for SDXL: it has a second text encoder, stacked transformers, or SDXL's text width."""
    return (
        "text_encoder_2" in adapter.layers
        or has_stacked_transformers(adapter.layers.get("unet", ()))
        or text_width(adapter) == 2048
    )


def text_width(adapter: Adapter) -> int | None:
    """How many numbers stand for a word where the UNet reads it; None where no such layer is a plain one."""
    return next(
        (
            layer.tensors["down"].shape[1]
            for module, layer in adapter.layers.get("unet", {}).items()
            if module.endswith("attn2.to_k") and layer.is_plain
        ),
        None,
    )


def has_stacked_transformers(names) -> bool:
    """Only SDXL has several transformers in one attention."""
    return any(".transformer_blocks.1." in name for name in names)
