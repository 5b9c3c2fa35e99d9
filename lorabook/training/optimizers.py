"""The optimiser and its schedule, as the flags say."""

import importlib.util
import math

import torch
from diffusers.optimization import get_scheduler
from torch import nn

from lorabook.training.config import TrainingConfig


def check_optimizer(config: TrainingConfig) -> None:
    """Raise ValueError, naming the extra that brings it, if the optimiser's package is missing."""
    for wanted, package in (
        (config.optimizer == "prodigy", "prodigyopt"),
        (config.use_8bit_adam, "bitsandbytes"),
    ):
        if wanted and importlib.util.find_spec(package) is None:
            flag = "use_8bit_adam" if package == "bitsandbytes" else "optimizer prodigy"
            raise ValueError(
                f"{flag} needs the package {package}, which is not installed: pip install 'lorabook[lowbit]'"
            )


def make_optimizer(
    parameters: dict[str, list[nn.Parameter]], config: TrainingConfig, processes: int = 1
):
    """AdamW, 8-bit AdamW or Prodigy on the parameters of each component; text encoders with a rate of their own."""
    unet = {"lr": config.learning_rate, "weight_decay": config.adam_weight_decay}
    text = {
        "lr": _first(config.text_encoder_lr, config.learning_rate),
        "weight_decay": _first(config.adam_weight_decay_text_encoder, config.adam_weight_decay),
    }
    groups = [
        {"params": group} | (unet if part == "unet" else text) for part, group in parameters.items()
    ]
    if config.scale_lr:
        for group in groups:
            group["lr"] *= config.gradient_accumulation_steps * config.train_batch_size * processes
    shared = {"betas": (config.adam_beta1, config.adam_beta2), "eps": config.adam_epsilon}
    if config.optimizer == "prodigy":
        from prodigyopt import Prodigy

        return Prodigy(
            groups,
            beta3=config.prodigy_beta3,
            decouple=config.prodigy_decouple,
            use_bias_correction=config.prodigy_use_bias_correction,
            safeguard_warmup=config.prodigy_safeguard_warmup,
            **shared,
        )
    if config.use_8bit_adam:
        import bitsandbytes

        return bitsandbytes.optim.AdamW8bit(groups, **shared)
    return torch.optim.AdamW(groups, fused=True, **shared)


def make_schedule(optimizer: torch.optim.Optimizer, config: TrainingConfig, steps: int):
    """The schedule of the learning rate over all optimiser steps."""
    return get_scheduler(
        config.lr_scheduler,
        optimizer,
        num_warmup_steps=config.lr_warmup_steps,
        num_training_steps=steps,
        num_cycles=config.lr_num_cycles,
        power=config.lr_power,
    )


def steps_in(config: TrainingConfig, batches: int) -> tuple[int, int]:
    """Optimiser steps in all, and in an epoch of so many batches."""
    epoch = math.ceil(batches / config.gradient_accumulation_steps)
    return config.max_train_steps or config.num_train_epochs * epoch, epoch


def _first(*values):
    return next((value for value in values if value is not None), None)
