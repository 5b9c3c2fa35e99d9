"""What the loop needs, in one object, and the optimiser that it steps."""

import math
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

import datasets
import torch
from diffusers.optimization import get_scheduler
from torch import Tensor, nn
from torch.optim.lr_scheduler import LRScheduler

from lorabook.training.cache import cache_folder
from lorabook.training.config import TrainingConfig
from lorabook.training.dataset import Batch, EncodedImages, ImageTransform
from lorabook.training.devices import activation_bytes
from lorabook.training.lora import add_lora, trainable_parameters, write_lora
from lorabook.training.sampler import BatchSampler
from lorabook.training.setup import Setup

COMMAND = "command.txt"
ADAM_BYTES = 12  # a gradient and two moments in float32, beside each weight that learns


@dataclass(frozen=True)
class TrainingData:
    """What is learned.

    Attributes:
        images: Images with their texts, group after group.
        groups: How many of each group: (images,) or (instance images, class images).
        weights: The weight of each group in the loss.
        held_out: Images to measure the validation loss on, or None.
        repeats: How often an image of the first group counts in an epoch.
    """

    images: datasets.Dataset
    groups: tuple[int, ...]
    weights: tuple[float, ...] = (1.0,)
    held_out: datasets.Dataset | None = None
    repeats: int = 1


@dataclass(kw_only=True)
class Trainer(Setup):
    """A setup with all that the loop needs, and how far it has come.

    Attributes:
        images: What to learn from, encoded.
        sampler: Which of the images come when, and every random number.
        group_weights: The weight of each of the sampler's groups in the loss, on the device.
        models: The models that carry the LoRA, by component.
        parameters: The LoRA's parameters, by component and name.
        optimizer: What moves the parameters.
        scheduler: What sets the learning rate.
        steps: Optimiser steps at the end of the run.
        identity: What makes this run the one it is: settings, images, base model, seed.
        step: Optimiser steps so far.
        history: A record a step.
    """

    images: EncodedImages
    sampler: BatchSampler
    group_weights: Tensor
    models: dict[str, nn.Module]
    parameters: dict[str, nn.Parameter]
    optimizer: torch.optim.Optimizer
    scheduler: LRScheduler
    steps: int
    identity: dict = field(default_factory=dict)
    step: int = 0
    history: list[dict] = field(default_factory=list)

    @property
    def has_dropout(self) -> bool:
        """Whether a forward pass may use random numbers of its own."""
        unet = getattr(self.family.pipe.unet.config, "dropout", 0)
        return bool(self.config.lora_dropout or self.config.train_text_encoder or unet)

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
            "seed": self.given.seed,
            "identity": self.identity,
            "history": self.history,
            "weights": {name: value.detach() for name, value in self.parameters.items()},
            **{name: part.state_dict() for name, part in self._stateful().items()},
        }

    @torch.no_grad()
    def load_state_dict(self, state: dict) -> None:
        """Go on from what `state_dict` returned."""
        self.step, self.history = state["step"], state["history"]
        for name, value in self.parameters.items():
            value.copy_(state["weights"][name])
        for name, part in self._stateful().items():
            part.load_state_dict(state[name])

    def write_adapter(self, folder: Path) -> Path:
        """Write the adapter, and the command line that repeats the run with its paths."""
        adapter = write_lora(folder, self.models, self.given)
        (folder / COMMAND).write_text(f"{self.given.command}\n")
        return adapter

    def _stateful(self) -> dict:
        scaler = {"scaler": self.accelerator.scaler} if self.accelerator.scaler else {}
        return {"optimizer": self.optimizer, "scheduler": self.scheduler} | scaler


def make_trainer(
    setup: Setup, data: TrainingData, identity: dict, state: dict
) -> tuple[Trainer, EncodedImages | None]:
    """The trainer, where its checkpoint left off, and the held-out images, encoded.

    Args:
        setup: The base model and the settings.
        data: What is learned.
        identity: See `Trainer`.
        state: See `Trainer.state_dict`; empty begins afresh.
    """
    config, accelerator = setup.config, setup.accelerator
    models = add_lora(setup.family, config)
    parameters = {name: dict(trainable_parameters({name: models[name]})) for name in models}
    sampler = BatchSampler(
        setup.given.seed,
        data.groups,
        config.train_batch_size,
        accelerator.process_index,
        accelerator.num_processes,
        data.repeats,
    )
    epoch = math.ceil(sampler.batches / config.gradient_accumulation_steps)
    steps = config.max_train_steps or config.num_train_epochs * epoch
    by_name = {name: value for group in parameters.values() for name, value in group.items()}
    if accelerator.is_local_main_process and state.get("step", 0) < steps:
        print(_estimate(setup, data, sampler, steps, sum(p.numel() for p in by_name.values())))
    transform = ImageTransform(
        setup.resolution,
        config.center_crop,
        config.random_flip,
        config.image_interpolation_mode,
    )
    with accelerator.local_main_process_first():
        images, held_out = _encode(setup, data.images, transform), None
        if data.held_out is not None:
            plain = replace(transform, center_crop=True, random_flip=False)
            held_out = _encode(setup, data.held_out, plain)
    optimizer = make_optimizer(parameters, config, accelerator.num_processes)
    if accelerator.scaler:  # else accelerate's wrapper has nothing to do, and takes time for it
        optimizer = accelerator.prepare(optimizer)
    scheduler = get_scheduler(
        config.lr_scheduler,
        optimizer,
        num_warmup_steps=config.lr_warmup_steps,
        num_training_steps=steps,
        num_cycles=config.lr_num_cycles,
        power=config.lr_power,
    )
    trainer = Trainer(
        **vars(setup),
        images=images,
        sampler=sampler,
        group_weights=torch.tensor(data.weights, device=accelerator.device),
        models=models,
        parameters=by_name,
        optimizer=optimizer,
        scheduler=scheduler,
        steps=steps,
        identity=identity,
    )
    if state:
        trainer.load_state_dict(state)
        if state["steps"] != steps and not config.lr_scheduler.startswith("constant"):
            warnings.warn(
                f"the run had {state['steps']} steps and now has {steps}: from here on the rate "
                f"follows the {config.lr_scheduler} schedule of {steps}, so it ends elsewhere than "
                f"a run of {steps} from its start",
                stacklevel=2,
            )
    return trainer, held_out


def _encode(setup: Setup, images: datasets.Dataset, transform: ImageTransform) -> EncodedImages:
    config = setup.config
    return EncodedImages(
        setup.family,
        images,
        transform,
        folder=cache_folder(config.cache_dir) if config.cache_latents else None,
        frozen_text=not config.train_text_encoder,
    )


def make_optimizer(
    models: dict[str, dict[str, nn.Parameter]], config: TrainingConfig, processes: int = 1
) -> torch.optim.Optimizer:
    """AdamW, 8-bit AdamW or Prodigy; text encoders have a rate and a decay of their own.

    Args:
        models: The parameters of each component, by name.
        config: The optimiser's settings.
        processes: With `scale_lr` the rates are multiplied by this, too.
    """
    unet = {"lr": config.learning_rate, "weight_decay": config.adam_weight_decay}
    text_encoder = dict(unet)
    if config.text_encoder_lr is not None:
        text_encoder["lr"] = config.text_encoder_lr
    if config.adam_weight_decay_text_encoder is not None:
        text_encoder["weight_decay"] = config.adam_weight_decay_text_encoder
    groups = [
        {"params": list(parameters.values())} | (unet if name == "unet" else text_encoder)
        for name, parameters in models.items()
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


def _estimate(
    setup: Setup, data: TrainingData, sampler: BatchSampler, steps: int, parameters: int
) -> str:
    """What a run will take, in a sentence."""
    config, family = setup.config, setup.family
    images = config.train_batch_size * config.gradient_accumulation_steps * sampler.processes
    names = family.text_encoders if config.train_text_encoder else ()
    names = names if config.cache_latents else family.encoders
    models = [family.pipe.unet, *(getattr(family.pipe, name) for name in names)]
    weights = sum(p.nbytes for model in models for p in (*model.parameters(), *model.buffers()))
    activations = activation_bytes(family, setup.resolution)
    batch = config.train_batch_size * len(data.groups)
    memory = weights + ADAM_BYTES * parameters + batch * activations
    return (
        f"{len(data.images)} images, {steps} steps of {images * len(data.groups)} "
        f"({steps * images / sampler.epoch:.1f} epochs); {parameters:,} parameters learn, an "
        f"adapter of {4 * parameters / 1e6:.1f} MB; about {memory / 2**30:.1f} GiB of memory on a "
        "GPU; minutes are told after the first steps"
    )
