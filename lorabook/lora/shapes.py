"""The shapes of the weights that an adapter changes, and LoRA layers of those shapes."""

import math
import re
from collections.abc import Iterable, Mapping

from torch import Tensor

from lorabook.lora.adapter import Adapter, Bases, Layer, lora

Shape = tuple[int, ...]  # of a weight: (out, in) or (out, in, height, width)
_WITH_KERNEL = ("mid", "t1", "t2", "w2", "diff", "down")  # roles whose tensors may show a kernel
_SD2_WIDTH = 1024  # of the text embeddings of Stable Diffusion 2, whose projections are matrices
_THREE_BY_THREE = re.compile(  # in every UNet
    r"(^|\.)(conv1|conv2|conv_in|conv_out|(down|up)samplers\.0\.conv)$"
)


def as_lora(up: Tensor, down: Tensor, shape: Shape) -> Layer:
    """A plain LoRA layer of scaling 1 from matrix factors, its tensors shaped for a weight."""
    if up.shape[0] != shape[0] or down.shape[1] != math.prod(shape[1:]):
        raise ValueError(
            f"factors of shapes {tuple(up.shape)} and {tuple(down.shape)} do not make up a weight "
            f"of shape {tuple(shape)}; it belongs to another layer or model"
        )
    up = up.reshape(*up.shape, *[1] * (len(shape) - 2))
    return lora(up.contiguous(), down.reshape(-1, *shape[1:]).contiguous())


def matrix_shape(layer: Layer) -> tuple[int, int]:
    """(out, in · height · width) of the weight that a layer changes."""
    t = layer.tensors
    if layer.kind == "full":
        return t["diff"].shape[0], t["diff"].shape[1:].numel()
    if layer.kind == "lora":
        kernel = t["mid"].shape[2:].numel() if "mid" in t else 1
        return t["up"].shape[0], t["down"].shape[1:].numel() * kernel
    if layer.kind == "loha":
        return _half_shape(t, 1)
    (out_1, in_1), (out_2, in_2) = _half_shape(t, 1), _half_shape(t, 2)
    return out_1 * out_2, in_1 * in_2


def shapes_of(adapter: Adapter, bases: Bases | None = None) -> dict[str, dict[str, Shape]]:
    """The shapes of all weights that an adapter changes, by component and module.

    The model's own weights tell for sure. Without them a kernel that the tensors do not show is
    taken from the module's name, and `proj_in` and `proj_out` are taken as matrices in SDXL and
    Stable Diffusion 2, and as 1 × 1 convolutions elsewhere.
    """
    shapes: dict[str, dict[str, Shape]] = {}
    for component, layers in adapter.layers.items():
        projection = () if _projections_are_matrices(layers) else (1, 1)
        for module, layer in layers.items():
            base = (bases or {}).get(component, {}).get(module)
            shape = _weight_shape(layer, module, projection) if base is None else tuple(base.shape)
            shapes.setdefault(component, {})[module] = shape
    return shapes


def _weight_shape(layer: Layer, module: str, projection: Shape) -> Shape:
    out, rest = matrix_shape(layer)
    is_flat = layer.kind in ("loha", "lokr") and "w2" not in layer.tensors  # kernels too
    shown = [t for role in _WITH_KERNEL if (t := layer.tensors.get(role)) is not None]
    kernel = next((tuple(t.shape[2:]) for t in shown if t.dim() > 2), ())
    if not kernel and module.endswith("conv_shortcut"):
        kernel = (1, 1)
    elif not kernel and module.endswith(("proj_in", "proj_out")):
        kernel = projection
    elif not kernel and is_flat and _THREE_BY_THREE.search(module):
        kernel = (3, 3)
    return (out, rest // math.prod(kernel), *kernel)


def _projections_are_matrices(layers: Mapping[str, Layer]) -> bool:
    """SDXL stacks transformers, and Stable Diffusion 2 has its own width."""
    widths = {matrix_shape(layers[m])[1] for m in layers if m.endswith("attn2.to_k")}
    return _SD2_WIDTH in widths or has_stacked_transformers(layers)


def _half_shape(t: Mapping[str, Tensor], number: int) -> tuple[int, int]:
    """Rows and columns of one half of a LoHa or LoKr."""
    if f"w{number}" in t:
        return t[f"w{number}"].shape[0], t[f"w{number}"].shape[1:].numel()
    a, b, core = t[f"w{number}_a"], t[f"w{number}_b"], t.get(f"t{number}")
    if core is None:
        return a.shape[0], b.shape[1]
    return a.shape[1], b.shape[1] * core.shape[2:].numel()


def is_large(adapter: Adapter) -> bool:
    """Whether an adapter is for SDXL, by its text encoders, stacked transformers or text width."""
    return (
        "text_encoder_2" in adapter.layers
        or has_stacked_transformers(adapter.layers.get("unet", ()))
        or text_width(adapter) == 2048
    )


def text_width(adapter: Adapter) -> int | None:
    """How many numbers stand for a word where the UNet reads it; None without a plain layer."""
    for module, layer in adapter.layers.get("unet", {}).items():
        if module.endswith("attn2.to_k") and layer.is_plain:
            return layer.tensors["down"].shape[1]
    return None


def has_stacked_transformers(names: Iterable[str]) -> bool:
    """Only SDXL has several transformers in one attention."""
    return any(".transformer_blocks.1." in name for name in names)
