"""How an adapter was trained, as far as its metadata say so and others may see it."""

import json
from collections.abc import Mapping

from lorabook.lora.redact import shareable

KOHYA = {
    "ss_network_module": "network",
    "ss_network_args": "network settings",
    "ss_network_dim": "rank",
    "ss_network_alpha": "alpha",
    "ss_num_train_images": "images",
    "ss_num_reg_images": "class images",
    "ss_resolution": "resolution",
    "ss_num_epochs": "epochs",
    "ss_epoch": "epoch of this file",
    "ss_max_train_steps": "steps in all",
    "ss_steps": "steps of this file",
    "ss_batch_size_per_device": "batch",
    "ss_total_batch_size": "batch in all",
    "ss_gradient_accumulation_steps": "accumulated batches",
    "ss_learning_rate": "learning rate",
    "ss_unet_lr": "learning rate of unet",
    "ss_text_encoder_lr": "learning rate of text encoder",
    "ss_lr_scheduler": "schedule",
    "ss_lr_warmup_steps": "warm-up steps",
    "ss_optimizer": "optimizer",
    "ss_mixed_precision": "mixed precision",
    "ss_clip_skip": "clip skip",
    "ss_min_snr_gamma": "SNR gamma",
    "ss_noise_offset": "noise offset",
    "ss_network_dropout": "dropout",
    "ss_caption_dropout_rate": "caption dropout",
    "ss_seed": "seed",
}
LONGEST = 120  # letters of a value


def training_in(metadata: Mapping[str, str]) -> dict[str, str]:
    """The settings of the training, by name.

    Args:
        metadata: of a safetensors file; lorabook keeps its settings under "training", Kohya's scripts theirs under ss_….
    Returns: what was set, without tokens and folders, of paths their last part only; empty where nothing is told.
    """
    settings = parsed(metadata.get("training"))
    settings |= {
        label: metadata[key]
        for key, label in KOHYA.items()
        if metadata.get(key) not in (None, "", "None", "{}")
    }
    return {
        key: _short(value) for key, value in shareable(settings).items() if not key.endswith("_dir")
    }


def parsed(text: str | None, kind: type = dict):
    """JSON, or an empty one of its kind where it is malformed or something else; files from elsewhere hold all sorts."""
    try:
        value = json.loads(text or "null")
    except (ValueError, TypeError, RecursionError):
        value = None
    return value if isinstance(value, kind) else kind()


def _short(value) -> str:
    text = " ".join(
        (value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)).split()
    )
    return text if len(text) <= LONGEST else f"{text[: LONGEST - 1]}…"
