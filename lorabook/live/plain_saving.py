"""One limit of diffusers and transformers, worked around: a model that carries adapters saves its own weights.

diffusers writes the weights of adapted layers as `….base_layer.weight`, which `from_pretrained` does not find, so that
the saved model comes back with random weights; transformers writes the adapter in place of the model. Upstream says to
unload first: https://github.com/huggingface/diffusers/blob/main/docs/source/en/tutorials/using_peft_for_inference.md
"""

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from lorabook.live.layers import walk


def save_plainly(model: nn.Module) -> None:
    """Let `model.save_pretrained` write the model without its adapters, what is fused into it included."""
    if "save_pretrained" not in model.__dict__:
        signature = inspect.signature(
            model.save_pretrained
        )  # diffusers looks there for what it may hand on
        model.save_pretrained = partial(_save, model)
        model.save_pretrained.__signature__ = signature


def save_as_before(model: nn.Module) -> None:
    """Take `save_plainly` back."""
    model.__dict__.pop("save_pretrained", None)


@contextmanager
def bare(model: nn.Module) -> Iterator[nn.Module]:
    """The model without the adapters' layers, for the time of the block."""
    wrapped = [(name, layer) for name, layer in walk(model) if isinstance(layer, BaseTunerLayer)]
    kept = {
        key: model.__dict__.pop(key)
        for key in ("peft_config", "_hf_peft_config_loaded")
        if key in model.__dict__
    }
    _put(model, [(name, layer.get_base_layer()) for name, layer in wrapped])
    try:
        yield model
    finally:
        _put(model, wrapped)
        model.__dict__.update(kept)


def _save(model: nn.Module, *args, **kwargs):
    with bare(model):
        return type(model).save_pretrained(model, *args, **kwargs)


def _put(model: nn.Module, layers: list[tuple[str, nn.Module]]) -> None:
    for name, layer in layers:
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, layer)
