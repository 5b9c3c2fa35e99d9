"""What the loop needs, in one object, and the optimiser that it steps."""

import math
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import datasets
import torch
from diffusers.optimization import get_scheduler
from torch import Tensor, nn

from lorabook.training.cache import cache_folder
from lorabook.training.config import TrainingConfig
from lorabook.training.dataset import Batch, EncodedImages, ImageTransform
from lorabook.training.lora import add_lora, trainable_parameters, write_lora
from lorabook.training.sampler import BatchSampler
from lorabook.training.setup import Setup

COMMAND = "command.txt"


@dataclass(frozen=True)
class TrainingData:
    """What is learned: images with their texts, group after group."""

    images: datasets.Dataset
    groups: tuple[int, ...]  # how many of each: (images,) or (instance images, class images)
    weights: tuple[float, ...] = (1.0,)  # of each group in the loss
    held_out: datasets.Dataset | None = None  # to measure the validation loss on
    repeats: int = 1  # how often an image of the first group counts in an epoch


class Trainer:
    """All that the loop needs, and how far it has come.

    Attributes:
        models, parameters: What carries the LoRA, by component; its tensors, by component and name.
        images, held_out: What to learn from, encoded; what to validate on, or None.
        sampler: Which of the images come when, and every random number.
        identity: What makes this run the one it is: settings, images, base model, seed.
        steps, step, history: Optimiser steps in all and so far, and a record of each.
    """

    def __init__(self, setup: Setup, data: TrainingData, identity: dict, state: dict):
        """Begin where a checkpoint's `state_dict` left off; an empty one begins afresh."""
        self.config, self.family, self.dtype = setup.config, setup.family, setup.dtype
        self.accelerator, self.identity = setup.accelerator, identity
        self.step, self.history = 0, []
        config, accelerator = self.config, self.accelerator
        self.models = add_lora(self.family, config)
        self.parameters = trainable_parameters(self.models)
        self.sampler = BatchSampler(
            config.seed,
            data.groups,
            config.train_batch_size,
            accelerator.process_index,
            accelerator.num_processes,
            data.repeats,
        )
        self.group_weights = torch.tensor(data.weights, device=accelerator.device)
        self.steps = config.max_train_steps or config.num_train_epochs * self.steps_in_epoch
        if accelerator.is_local_main_process and state.get("step", 0) < self.steps:
            print(self._forecast(data))
        transform = ImageTransform(
            config.resolution,
            config.center_crop,
            config.random_flip,
            config.image_interpolation_mode,
        )
        with accelerator.local_main_process_first():
            self.images, self.held_out = self._encode(data.images, transform), None
            if data.held_out is not None:
                plain = replace(transform, center_crop=True, random_flip=False)
                self.held_out = self._encode(data.held_out, plain)
        self.optimizer = make_optimizer(self.parameters, config, accelerator.num_processes)
        if accelerator.scaler:  # else accelerate's wrapper has nothing to do, and takes time for it
            self.optimizer = accelerator.prepare(self.optimizer)
        self.scheduler = get_scheduler(
            config.lr_scheduler,
            self.optimizer,
            num_warmup_steps=config.lr_warmup_steps,
            num_training_steps=self.steps,
            num_cycles=config.lr_num_cycles,
            power=config.lr_power,
        )
        if state:
            self._load_state_dict(state)

    @property
    def steps_in_epoch(self) -> int:
        """Optimiser steps, the last one filled up from the next epoch."""
        return math.ceil(self.sampler.batches / self.config.gradient_accumulation_steps)

    @property
    def has_dropout(self) -> bool:
        """Whether a forward pass may use random numbers of its own."""
        unet = getattr(self.family.pipe.unet.config, "dropout", 0)
        return bool(self.config.lora_dropout or self.config.train_text_encoder or unet)

    def learn(self, learning: bool) -> None:
        """Have the models learn, or compute as they do for images.

        While they learn under autocast, LoRA layers leave their input in half precision: bringing
        it to float32 costs two passes over the activations, and the products bring it back.
        """
        casts = not learning or self.config.use_dora or self.config.mixed_precision == "no"
        for model in self.models.values():
            model.train(learning)
            for layer in model.modules():
                if hasattr(layer, "cast_input_dtype_enabled"):
                    layer.cast_input_dtype_enabled = casts

    def batches(self) -> Iterator[Batch]:
        """The batches that are still to come."""
        accumulation = self.config.gradient_accumulation_steps
        return self.images.batches(
            self.sampler,
            self.step * accumulation,
            self.steps * accumulation,
            workers=self.config.dataloader_num_workers,
            dropout=self.config.caption_dropout,
        )

    def record(self, loss: Tensor, rate: float, seconds: float, rows: list[int]) -> None:
        """Count a step and remember it."""
        self.step += 1
        entry = {"step": self.step, "loss": loss, "learning_rate": rate, "seconds": seconds}
        if self.config.debug_loss:
            entry["rows"] = rows
        self.history.append(entry)

    def state_dict(self) -> dict:
        """All that a run goes on from, as plain data and tensors."""
        return {
            "step": self.step,
            "steps": self.steps,
            "seed": self.config.seed,
            "identity": self.identity,
            "history": self.history,
            "weights": {name: value.detach() for name, value in self.parameters.items()},
            **{name: part.state_dict() for name, part in self._stateful().items()},
        }

    @torch.no_grad()
    def _load_state_dict(self, state: dict) -> None:
        self.step, self.history = state["step"], state["history"]
        for name, value in self.parameters.items():
            value.copy_(state["weights"][name])
        for name, part in self._stateful().items():
            part.load_state_dict(state[name])
        if state["steps"] != self.steps and not self.config.lr_scheduler.startswith("constant"):
            warnings.warn(
                f"the run had {state['steps']} steps and now has {self.steps}: from here on the "
                f"rate follows the {self.config.lr_scheduler} schedule of {self.steps}, so it ends "
                f"elsewhere than a run of {self.steps} from its start",
                stacklevel=3,
            )

    def write_adapter(self, folder: Path) -> Path:
        """Write the adapter, and the command line that repeats the run with its paths."""
        adapter = write_lora(folder, self.models, self.config)
        (folder / COMMAND).write_text(f"{self.config.command}\n")
        return adapter

    def _stateful(self) -> dict:
        scaler = {"scaler": self.accelerator.scaler} if self.accelerator.scaler else {}
        return {"optimizer": self.optimizer, "scheduler": self.scheduler} | scaler

    def _encode(self, images: datasets.Dataset, transform: ImageTransform) -> EncodedImages:
        config = self.config
        folder = cache_folder(config.cache_dir) if config.cache_latents else None
        frozen = not config.train_text_encoder
        return EncodedImages(self.family, images, transform, folder=folder, frozen_text=frozen)

    def _forecast(self, data: TrainingData) -> str:
        """What the run will do, in a sentence."""
        config, sampler = self.config, self.sampler
        images = config.train_batch_size * config.gradient_accumulation_steps * sampler.processes
        parameters = sum(parameter.numel() for parameter in self.parameters.values())
        return (
            f"{len(data.images)} images, {self.steps} steps of {images * len(data.groups)} "
            f"({self.steps * images / sampler.epoch:.1f} epochs); {parameters:,} parameters learn, "
            f"an adapter of {4 * parameters / 1e6:.1f} MB"
        )


def make_optimizer(
    parameters: dict[str, nn.Parameter], config: TrainingConfig, processes: int = 1
) -> torch.optim.Optimizer:
    """AdamW, 8-bit AdamW or Prodigy; text encoders have a rate and a decay of their own."""
    components: dict[str, list[nn.Parameter]] = {}
    for name, parameter in parameters.items():
        components.setdefault(name.split(".")[0], []).append(parameter)
    unet = {"lr": config.learning_rate, "weight_decay": config.adam_weight_decay}
    own = {"lr": config.text_encoder_lr, "weight_decay": config.adam_weight_decay_text_encoder}
    text_encoder = unet | {name: value for name, value in own.items() if value is not None}
    groups = [
        {"params": values} | (unet if component == "unet" else text_encoder)
        for component, values in components.items()
    ]
    if config.scale_lr:
        for group in groups:
            group["lr"] *= config.gradient_accumulation_steps * config.train_batch_size * processes
    settings = {"betas": (config.adam_beta1, config.adam_beta2), "eps": config.adam_epsilon}
    if config.optimizer == "prodigy":
        from prodigyopt import Prodigy

        return Prodigy(
            groups,
            beta3=config.prodigy_beta3,
            decouple=config.prodigy_decouple,
            use_bias_correction=config.prodigy_use_bias_correction,
            safeguard_warmup=config.prodigy_safeguard_warmup,
            **settings,
        )
    if config.use_8bit_adam:
        from bitsandbytes.optim import AdamW8bit

        return AdamW8bit(groups, **settings)
    return torch.optim.AdamW(groups, fused=True, **settings)
