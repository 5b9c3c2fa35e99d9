"""Limits of PEFT, diffusers, transformers and accelerate, worked around for adapters on a pipeline.

Each names its reason, and the version where it was seen: diffusers 0.42.1, PEFT 0.21.2,
transformers 5.23.0. `tests/live/test_upstream.py` has a canary for each, which fails when upstream
has mended it. A DoRA's scale, the fifth limit, is in `convert_doras` of `inject.py`.
"""

import inspect
import re
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial

import torch
from diffusers.hooks.group_offloading import _maybe_remove_and_reapply_group_offloading
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from lorabook.checks import listed
from lorabook.upstream import uncompiled

# a layer, an adapter's name, its scaling, and the number in it where that is a tensor
Scaling = tuple[LoraLayer, str, float | Tensor, float | Tensor]
TEXT_ENCODERS = ("text_encoder", "text_encoder_2")
CALL_KWARGS = ("cross_attention_kwargs", "joint_attention_kwargs", "attention_kwargs")
_OUT_OF_MEMORY = re.compile(
    "out of memory|can't allocate memory|not enough memory|alloc_failed|invalid buffer size", re.I
)


def is_compiled(model: nn.Module) -> bool:
    """Whether a model is compiled, by `torch.compile` or by its own `compile`."""
    return hasattr(model, "_orig_mod") or getattr(model, "_compiled_call_impl", None) is not None


def is_offloaded(model: nn.Module) -> bool:
    """Whether accelerate or diffusers bring weights to the device when they are needed."""
    return hasattr(model, "_hf_hook") or hasattr(model, "_diffusers_hook")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that the memory ran out, in the words of any backend."""
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or (
        isinstance(error, RuntimeError) and bool(_OUT_OF_MEMORY.search(str(error)))
    )


# Weights that are not there: offloaded by accelerate to the meta device, by diffusers to disk, or
# quantised. https://huggingface.co/docs/accelerate/package_reference/big_modeling,
# https://huggingface.co/docs/diffusers/optimization/memory


def check_weights_available(models: Mapping[str, nn.Module]) -> None:
    """Raise ValueError where weights of a model (by component) cannot be read or changed."""
    for component, model in models.items():
        if any(weight.is_meta for weight in model.parameters()):
            raise ValueError(
                f"the weights of {component} are offloaded; call pipe.remove_all_hooks() first and "
                "offload again afterwards"
            )
        if any(_is_on_disk(module) for module in model.modules()):
            raise ValueError(
                f"the weights of {component} are offloaded to disk; load the model anew, do this "
                "first and call enable_group_offload afterwards"
            )


def check_not_quantized(component: str, weight: Tensor) -> None:
    """Raise ValueError for a weight of bitsandbytes, torchao or GGUF: its sums cannot be undone."""
    if is_quantized(weight):
        raise ValueError(
            f"the weights of {component} are quantised ({type(weight).__name__}, "
            f"{str(weight.dtype)[6:]}); leave adapters beside them, or fuse before quantising"
        )


def is_quantized(weight: Tensor) -> bool:
    """Whether a weight is of another kind than torch's own floating-point tensors."""
    return type(weight) not in (Tensor, nn.Parameter) or not weight.is_floating_point()


def renew_group_offloading(model: nn.Module) -> None:
    """Let diffusers' group offloading take in layers that came or went.

    It looks at the layers once, when it is enabled; only diffusers' own loading of a LoRA renews
    it: https://github.com/huggingface/diffusers/blob/main/src/diffusers/hooks/group_offloading.py
    """
    if not any(_is_on_disk(module) for module in model.modules()):  # groups on disk cannot change
        _maybe_remove_and_reapply_group_offloading(model)


def _is_on_disk(module: nn.Module) -> bool:
    hooks = getattr(getattr(module, "_diffusers_hook", None), "hooks", {})
    groups = [getattr(hook, "group", None) for hook in hooks.values()]
    return any(getattr(group, "offload_to_disk_path", None) for group in groups)


# Saving a model that carries adapters. diffusers writes the weights of adapted layers as
# `….base_layer.weight`, which `from_pretrained` does not find, so that the saved model comes back
# with random weights; transformers writes the adapter in place of the model. Upstream says to
# unload first: https://huggingface.co/docs/diffusers/tutorials/using_peft_for_inference


def mark_adapted(model: nn.Module) -> None:
    """Tell diffusers and transformers of adapters on a model, and save it without them.

    `save_pretrained` of this one model is covered until `unmark_adapted`: nothing else is told when
    a pipeline is saved, and a hook of `state_dict` would also take the names of weights from PEFT
    and from accelerate's offloading, which read them there.
    """
    model._hf_peft_config_loaded = True
    if "save_pretrained" not in vars(model):
        save = partial(_save_without_adapters, model)
        save.__signature__ = inspect.signature(model.save_pretrained)  # diffusers looks there
        model.save_pretrained = save


def unmark_adapted(model: nn.Module) -> None:
    """Undo `mark_adapted`, after the last adapter was deleted."""
    if getattr(model, "_hf_peft_config_loaded", False):
        model._hf_peft_config_loaded = False
        vars(model).pop("peft_config", None)
    vars(model).pop("save_pretrained", None)


@contextmanager
def without_adapters(model: nn.Module) -> Iterator[None]:
    """Let a model have plain layers, without its adapters, within the block."""
    layers = [
        (name, layer) for name, layer in model.named_modules() if isinstance(layer, BaseTunerLayer)
    ]
    marks = {
        key: vars(model).pop(key)
        for key in ("peft_config", "_hf_peft_config_loaded")
        if key in vars(model)
    }
    for name, layer in layers:
        model.set_submodule(name, layer.get_base_layer())
    try:
        yield
    finally:
        for name, layer in layers:
            model.set_submodule(name, layer)
        vars(model).update(marks)


def _save_without_adapters(model: nn.Module, *args, **kwargs):
    with without_adapters(model):
        return type(model).save_pretrained(model, *args, **kwargs)


# A call's own scale, `cross_attention_kwargs={"scale": s}`. diffusers multiplies each scaling by s
# and divides it by s afterwards, which rounds; after s = 0 it sets every scaling to that of scale
# 1. On what is fused it has no effect, and nothing says so. `unscale_lora_layers`:
# https://github.com/huggingface/diffusers/blob/main/src/diffusers/utils/peft_utils.py


def hook_calls(model: nn.Module) -> list[RemovableHandle]:
    """Register the two hooks of a denoiser that put the scalings back after each call.

    They do nothing where a call has no scale of its own and no adapter has a schedule.
    """
    return [
        model.register_forward_pre_hook(_begin_call, with_kwargs=True),
        model.register_forward_hook(_end_call, always_call=True),
    ]


def _begin_call(model: nn.Module, args: tuple, kwargs: dict) -> None:
    state = model.lorabook
    key = next((key for key in CALL_KWARGS if kwargs.get(key)), None)
    scale = kwargs[key].get("scale", 1) if key else 1
    if scale != 1 or state.schedule is not None or state.scalings_before_call:
        _begin_scaled_call(model, key, scale, args, kwargs)


def _end_call(model: nn.Module, *_) -> None:
    if model.lorabook.scalings_before_call:
        model.lorabook.end_call()


@torch.compiler.disable
def _begin_scaled_call(
    model: nn.Module, key: str | None, scale: float, args: tuple, kwargs: dict
) -> None:
    state = model.lorabook
    state.end_call()  # an interrupted call may have left its scale
    layers = [layer for layer in model.modules() if isinstance(layer, LoraLayer)]
    state.scalings_before_call = scalings_of(layers)
    if state.schedule is not None:
        factors = state.schedule.factors(model, args, kwargs)
        for layer in layers:
            for name in factors.keys() & layer.scaling.keys():
                layer.scaling[name] = layer.scaling[name] * factors[name]
    pipe = state.pipeline()
    if scale != 1 and pipe is not None:
        models = [uncompiled(getattr(pipe, name, None)) for name in TEXT_ENCODERS]
        states = [model.lorabook for model in models if hasattr(model, "lorabook")]
        for encoder in states:
            _undo_rounding(encoder.scalings, scale)
        _warn_of_fused(state, [state, *states], key, scale)


def scalings_of(layers: Iterable[LoraLayer]) -> list[Scaling]:
    """The scalings of layers, to be put back by `restore_scalings`."""
    return [
        (layer, name, value, value.clone() if isinstance(value, Tensor) else value)
        for layer in layers
        for name, value in layer.scaling.items()
    ]


def restore_scalings(scalings: Iterable[Scaling]) -> None:
    """Put scalings back; a tensor stays the same tensor, which a compiled model holds on to."""
    for layer, name, value, number in scalings:
        if name in layer.scaling:
            if isinstance(value, Tensor):
                value.copy_(number)
            layer.scaling[name] = value


def _undo_rounding(scalings: Iterable[Scaling], scale: float) -> None:
    """Put scalings of a text encoder back, whose call with `scale` is over; not what others set."""
    for layer, name, value, number in scalings:
        if name in layer.scaling:
            present = float(layer.scaling[name])
            reset = scale == 0 and name in layer.active_adapters
            if reset or (scale and present == float(number * scale / scale)):
                restore_scalings([(layer, name, value, number)])


def _warn_of_fused(state, states: list, key: str, scale: float) -> None:
    fused = list(dict.fromkeys(name for each in states for name in each.fused))
    names = fused + [name for each in states for name in each.fused_for_good]
    if names and names != state.warned_of:
        state.warned_of = names
        remedy = "call unfuse(pipe)" if fused else "load the model anew"
        warnings.warn(
            f"{key}={{'scale': {scale:g}}} does nothing to what is fused "
            f"({listed(dict.fromkeys(names), 8)}); {remedy}, then "
            f"fuse(pipe, {{{names[0]!r}: {scale:g}}})",
            stacklevel=2,
        )
