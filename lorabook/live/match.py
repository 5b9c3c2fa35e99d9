"""An adapter's weights made ready for a pipeline's layers, checked before anything on it is changed."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lorabook.live.layers import base_weight, models_of, shape_of, walk
from lorabook.live.misfit import misfit, other_model
from lorabook.live.offloaded import check_at_hand, check_plain
from lorabook.live.originals import original
from lorabook.lora.adapter import Adapter, Layer
from lorabook.lora.shapes import matrix_shape


@dataclass(frozen=True)
class Ready:
    """A layer's weights as PEFT wants them: down (rank, in, …), up (out, rank, …), alpha."""

    down: Tensor
    up: Tensor
    alpha: float

    @property
    def rank(self) -> int:
        """Rows of down, columns of up."""
        return self.down.shape[0]


def fit(pipe, adapter: Adapter, where: str) -> dict[str, dict[str, Ready]]:
    """The adapter's weights for the pipeline's layers, by component and the pipeline's own module names.

    Args:
        pipe: a diffusers pipeline; nothing on it is changed.
        adapter: any kind; what is no plain LoRA becomes one, exactly, at the rank that needs.
        where: what to call it in errors.
    Raises: ValueError where a layer is not the pipeline's, has another shape, or is not finite once computed.
    """
    matched = _match(pipe, adapter, where)
    check_at_hand(models_of(pipe))
    ready: dict[str, dict[str, Ready]] = {}
    for part, model in models_of(pipe).items():
        for name, (layer, module) in matched.get(part, {}).items():
            weight, shape = original(model, name, base_weight(module)), shape_of(module)
            if layer.magnitude is not None:
                check_plain(part, weight)
            if matrix_shape(layer) != (shape[0], math.prod(shape[1:])):
                raise ValueError(
                    f"{where} does not fit {type(pipe).__name__}: layer {name} has the shape {shape} and the "
                    f"adapter {matrix_shape(layer)}; {other_model(adapter, pipe)}"
                )
            if layer.magnitude is not None and layer.magnitude.numel() not in shape[:2]:
                raise ValueError(
                    f"{where}: the DoRA's magnitude of layer {name} has {layer.magnitude.numel()} numbers, not "
                    f"one for each of {shape[0]} outputs or {shape[1]} inputs; fetch it anew"
                )
            made = _ready(layer, weight, shape)
            if not (made.up.isfinite().all() and made.down.isfinite().all()):
                raise ValueError(
                    f"{where}: layer {name} is beyond what {str(weight.dtype)[6:]} holds; load the pipeline "
                    "with dtype=torch.float32"
                )
            ready.setdefault(part, {})[name] = made
    return ready


def padded(made: Ready, rank: int) -> Ready:
    """The same ΔW with zeros up to a rank; its alpha grows with the rank, so that the scaling stays."""
    more = rank - made.rank
    if more < 0:
        raise ValueError(
            f"an adapter of rank {made.rank} does not fit where rank {rank} was prepared; load the first "
            f"with hotswap_rank={made.rank} or more"
        )
    down = torch.cat([made.down, made.down.new_zeros(more, *made.down.shape[1:])])
    up = torch.cat([made.up, made.up.new_zeros(made.up.shape[0], more, *made.up.shape[2:])], dim=1)
    return Ready(down, up, made.alpha * rank / made.rank)


def _match(pipe, adapter: Adapter, where: str) -> dict[str, dict[str, tuple[Layer, nn.Module]]]:
    """Each layer with the module it belongs to."""
    models = models_of(pipe)
    found: dict[str, dict] = {}
    lost = []
    for part, layers in adapter.layers.items():
        modules = dict(walk(models[part])) if part in models else {}
        for module, layer in layers.items():
            own = next(
                (n for n in (module, module.removeprefix("text_model.")) if n in modules), None
            )
            if own is None:
                lost.append((part, module))
            else:
                found.setdefault(part, {})[own] = layer, modules[own]
    if lost:
        raise ValueError(misfit(pipe, adapter, lost, where))
    return found


def _ready(layer: Layer, weight: Tensor, shape: tuple[int, ...]) -> Ready:
    out, *rest = shape
    if layer.is_plain:
        up, down, alpha = layer.tensors["up"], layer.tensors["down"], layer.alpha
    else:
        up, down = layer.factors(weight)
        alpha = down.shape[0]
    rank = down.shape[0]
    # weights that a model only keeps in 8 bits (layerwise casting) are computed with in more
    dtype = weight.dtype if weight.element_size() > 1 else torch.float32
    return Ready(
        down.reshape(rank, *rest).to(weight.device, dtype),
        up.reshape(out, rank, *[1] * (len(rest) - 1)).to(weight.device, dtype),
        alpha,
    )
