"""A call's own scale, `cross_attention_kwargs={"scale": …}`, does not reach what is fused: said once."""

import warnings
from collections.abc import Sequence
from functools import partial

from torch import nn

from lorabook.live.layers import listed, models_of
from lorabook.live.originals import fused_in, fused_names
from lorabook.live.scale_schedule import denoiser

_ARGUMENTS = ("cross_attention_kwargs", "joint_attention_kwargs", "attention_kwargs")


def watch_call_scale(pipe) -> None:
    """Let a pipeline with fused adapters warn at the first call with a scale of its own; one without them is left alone."""
    model = denoiser(pipe)
    if model is None:
        return
    record = fused_in(model)
    if record.hook:
        record.hook.remove()
        record.hook = None
    models = models_of(pipe)
    remedy = "call unfuse(pipe)" if fused_names(models) else "load the model anew"
    if names := fused_names(models) + [
        name for each in models.values() for name in fused_in(each).for_good
    ]:
        called = (
            pipe.transformer if getattr(pipe, "unet", None) is None else pipe.unet
        )  # of a compiled one, the wrapper
        record.hook = called.register_forward_pre_hook(
            partial(_warn, names, remedy), with_kwargs=True
        )


def _warn(names: Sequence[str], remedy: str, model: nn.Module, args: tuple, kwargs: dict) -> None:
    for key in _ARGUMENTS:
        scale = (kwargs.get(key) or {}).get("scale", 1)
        if scale != 1:
            fused_in(getattr(model, "_orig_mod", model)).hook.remove()
            warnings.warn(
                f"{key}={{'scale': {scale:g}}} does nothing to what is fused ({listed(dict.fromkeys(names))}); "
                f"{remedy}, then fuse(pipe, {{{names[0]!r}: {scale:g}}})",
                stacklevel=2,
            )
