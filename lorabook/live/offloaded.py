"""Weights that are not at hand: quantised, offloaded to the meta device by accelerate, or to disk in diffusers' groups."""

from collections.abc import Mapping

from diffusers.hooks.group_offloading import _maybe_remove_and_reapply_group_offloading
from torch import Tensor, nn


def check_at_hand(models: Mapping[str, nn.Module]) -> None:
    """Raise ValueError where a model's weights, or those of adapters on it, cannot be read or changed.

    Args:
        models: by component.
    """
    for part, model in models.items():
        if any(weight.is_meta for weight in model.parameters()):
            raise ValueError(
                f"the weights of {part} are offloaded, so they can be neither read nor changed; call "
                "pipe.remove_all_hooks() first and offload again afterwards"
            )
        if any(_is_on_disk(module) for module in model.modules()):
            raise ValueError(
                f"the weights of {part} are offloaded to disk, so they can be neither read nor changed; load "
                "the model anew, do this first and call enable_group_offload afterwards"
            )


def check_plain(part: str, weight: Tensor) -> None:
    """Raise ValueError for a quantised weight (bitsandbytes, torchao, GGUF): what is added to it cannot be taken out."""
    if not is_plain(weight):
        raise ValueError(
            f"the weights of {part} are quantised ({type(weight).__name__}, {str(weight.dtype)[6:]}), so no "
            "adapter can be computed into them; leave it beside them, or fuse before quantising"
        )


def regroup(model: nn.Module) -> None:
    """Let diffusers' group offloading know of layers that came or went; groups on disk hold nothing to be known anew."""
    if not any(_is_on_disk(module) for module in model.modules()):
        _maybe_remove_and_reapply_group_offloading(model)


def is_plain(weight: Tensor) -> bool:
    """Whether a weight is an ordinary one, which a quantised one is not."""
    return type(weight) in (Tensor, nn.Parameter) and weight.is_floating_point()


def _is_on_disk(module: nn.Module) -> bool:
    hooks: Mapping = getattr(getattr(module, "_diffusers_hook", None), "hooks", {})
    return any(
        getattr(getattr(hook, "group", None), "offload_to_disk_path", None)
        for hook in hooks.values()
    )
