"""Kohya's keys, which A1111, ComfyUI and others read: flat module names, and alpha as a weight beside each layer."""
import torch
from torch import Tensor

PARTS = {"unet": "lora_unet", "text_encoder": "lora_te", "text_encoder_2": "lora_te2"}
ENDINGS = {".lora_A.weight": "lora_down.weight", ".lora_B.weight": "lora_up.weight",
           ".lora_magnitude_vector": "dora_scale", ".lora_magnitude_vector.weight": "dora_scale"}


def to_kohya(weights: dict[str, Tensor], alpha: float) -> dict[str, Tensor]:
    """An adapter's weights by Kohya's keys.

    Args:
        weights: by diffusers keys with lora_A and lora_B.
        alpha: of every layer.
    Returns: new keys for the same tensors; with a second text encoder the first is «lora_te1», as in SDXL's files.
    Source: the key names of kohya-ss/sd-scripts, networks/lora.py.
    """
    parts = dict(PARTS)
    if any(key.startswith("text_encoder_2.") for key in weights):
        parts["text_encoder"] = "lora_te1"
    found = {}
    for key, value in weights.items():
        part, rest = key.split(".", 1)
        ending = next(ending for ending in ENDINGS if rest.endswith(ending))
        layer = f"{parts[part]}_{rest.removesuffix(ending).replace('.', '_')}"
        found[f"{layer}.{ENDINGS[ending]}"] = value.reshape(-1, 1) if ending.startswith(".lora_magnitude") else value
        found[f"{layer}.alpha"] = torch.tensor(float(alpha))
    return found
