"""Old adapter files that are pickles: opened as weights and nothing more, and only where that is asked for."""

import os
from collections.abc import Mapping

import torch
from torch import Tensor

from lorabook.lora.formats.other_files import other_kind

PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")


def read_pickle(path: str | os.PathLike) -> dict[str, Tensor]:
    """The weights in an old .bin, .pt or .ckpt file; no code in it is run.

    Args:
        path: the file; a checkpoint's weights may stand below "state_dict", and numbers beside them are passed over.
    Returns: tensors by key, on the CPU; whether they are finite is not looked at.
    Raises: FileNotFoundError if there is no such file; ValueError if it holds anything but weights or is damaged.
    """
    try:
        held = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise
    except (
        Exception
    ) as error:  # damaged, no pickle, or code in it; torch's own advice would be to run that code
        raise ValueError(
            f"{path} cannot be opened as weights alone ({type(error).__name__}): it is damaged or holds other "
            "things, which could run code; get it as .safetensors"
        ) from error
    if isinstance(held, Mapping) and isinstance(held.get("state_dict"), Mapping):
        held = held["state_dict"]
    weights = _tensors(held)
    if not weights and (
        other := other_kind(
            _below(held), str(path) if len(str(path)) <= 90 else os.path.basename(path)
        )
    ):
        raise ValueError(other)
    if not weights:
        raise ValueError(
            f"{path} holds no weights by name but a {type(held).__name__}; get the adapter as .safetensors"
        )
    others = [
        str(key) for key, value in held.items() if not isinstance(value, (Tensor, int, float))
    ]
    if others:
        raise ValueError(
            f"{path} holds other things than weights, for example {others[0][:80]!r}; "
            "get the adapter as .safetensors"
        )
    return weights


def _tensors(held) -> dict[str, Tensor]:
    if not isinstance(held, Mapping):
        return {}
    return {
        key: value.detach()
        for key, value in held.items()
        if isinstance(key, str) and isinstance(value, Tensor)
    }


def _below(held) -> dict[str, Tensor]:
    """Tensors one level down, as a textual inversion of A1111's, an IP-Adapter or a hypernetwork keeps them."""
    groups = held.items() if isinstance(held, Mapping) else ()
    found = {
        f"{name}.{key}": value
        for name, group in groups
        for key, value in (
            group.items()
            if isinstance(group, Mapping)
            else enumerate(group)
            if isinstance(group, list)
            else ()
        )
    }
    return {key: value for key, value in found.items() if isinstance(value, Tensor)} | {
        f"{key}.{inner}": value
        for key, group in found.items()
        if isinstance(group, Mapping)
        for inner, value in group.items()
        if isinstance(value, Tensor)
    }
