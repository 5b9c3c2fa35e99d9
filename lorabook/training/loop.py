"""The one training loop."""

import signal
import threading
import time
from collections.abc import Callable
from contextlib import contextmanager

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from lorabook.training.checkpoints import Progress
from lorabook.training.config import TrainingConfig
from lorabook.training.dataset import Batch, EncodedImages
from lorabook.training.devices import to_device
from lorabook.training.families import StableDiffusion
from lorabook.training.sampler import BatchSampler, seed_of


def train(
    accelerator: Accelerator,
    family: StableDiffusion,
    examples: EncodedImages,
    order: BatchSampler,
    config: TrainingConfig,
    optimizer: torch.optim.Optimizer,
    schedule,
    progress: Progress,
    steps: int,
    after_step: Callable[[], None],
    *,
    group_weights: tuple[float, ...] = (1.0,),
) -> None:
    """Train the optimiser's parameters from where `progress` stands.

    Args:
        accelerator: devices, precision and accumulation.
        family: the pipeline and what is particular to it.
        examples: what to learn.
        order: which of them when, and every random number.
        config: how.
        optimizer, schedule: what moves the parameters, and at which rate.
        progress: grows by a record a step; its losses stay on the device.
        steps: optimiser steps at the end.
        after_step: called after each; looks, saves, draws.
        group_weights: weight of each of the order's groups in the loss.
    """
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    every, weights = (
        config.gradient_accumulation_steps,
        torch.tensor(group_weights, device=accelerator.device),
    )
    batches = examples.batches(
        order,
        progress.step * every,
        steps * every,
        workers=config.dataloader_num_workers,
        dropout=config.caption_dropout,
    )
    drops = (
        config.lora_dropout
        or config.train_text_encoder
        or getattr(family.pipe.unet.config, "dropout", 0)
    )
    losses: list[Tensor] = []
    rows: list[int] = []
    with noted_interrupts() as noted:
        started = time.perf_counter()
        for batch in batches:
            if noted:
                raise KeyboardInterrupt
            if drops:  # seeding every kind of device takes longer than all else beside the UNet
                torch.manual_seed(
                    seed_of(order.seed, 3, batch.number, order.process)
                )  # whatever ran before
            with accelerator.autocast():
                loss = training_loss(family, examples, batch, order, config, weights)
            accelerator.backward(loss)
            losses.append(loss.detach())
            rows += batch.rows.tolist()
            if (batch.number + 1) % every:
                continue
            with held_interrupts():
                average_gradients(accelerator, parameters)
                accelerator.clip_grad_norm_(parameters, config.max_grad_norm)
                optimizer.step()
                rate = schedule.get_last_lr()[0]
                schedule.step()
                optimizer.zero_grad()
                progress.step += 1
                progress.history.append(
                    {
                        "step": progress.step,
                        "loss": torch.stack(losses).mean(),
                        "learning_rate": rate,
                        "seconds": time.perf_counter() - started,
                    }
                    | ({"rows": rows} if getattr(config, "debug_loss", False) else {})
                )
            losses, rows = [], []
            after_step()
            started = time.perf_counter()


def training_loss(
    family: StableDiffusion,
    examples: EncodedImages,
    batch: Batch,
    order: BatchSampler,
    config: TrainingConfig,
    group_weights: Tensor,
) -> Tensor:
    """The loss of one batch: the mean over each group of its rows, weighed and summed."""
    draws = order.rng(batch.number, purpose=2)
    mean, deviation = batch.moments.float().unbind(1)
    shape = mean.shape[1:]
    latents = mean + deviation * to_device(draws.normal(*shape), mean.device)
    noise = draws.normal(*shape)
    if config.noise_offset:
        noise = noise + config.noise_offset * draws.normal(shape[0], 1, 1)
    timesteps = to_device(draws.integers(family.noise.config.num_train_timesteps), mean.device)
    noisy, target = family.add_noise(latents, to_device(noise, mean.device), timesteps)
    prompts = batch.prompts or examples.prompts(batch.captions)
    prediction = family.predict(noisy, timesteps, prompts, batch.geometry)
    errors = family.losses(
        prediction,
        target,
        timesteps,
        config.snr_gamma,
        denoised=getattr(config, "do_edm_style_training", False),
    )
    return (errors.unflatten(0, (len(group_weights), -1)).mean(1) * group_weights).sum()


def average_gradients(accelerator: Accelerator, parameters: list[nn.Parameter]) -> None:
    """Let every process have the mean of all gradients; LoRA's are few enough to be sent at once."""
    if accelerator.num_processes == 1:
        return
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    mean = accelerator.reduce(torch.cat([gradient.flatten() for gradient in gradients]), "mean")
    for gradient, part in zip(gradients, mean.split([g.numel() for g in gradients]), strict=True):
        gradient.copy_(part.view_as(gradient))


@contextmanager
def held_interrupts():
    """Hold a stop button's interrupt until the block's end, so that a step is done whole or not at all."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    seen: list[tuple] = []
    before = signal.signal(signal.SIGINT, lambda *arguments: seen.append(arguments))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
        if seen and callable(before):
            before(*seen[0])


@contextmanager
def noted_interrupts():
    """Note the interrupts that come in the block: Python drops the exception of one that meets a destructor or a callback.

    Gives a list, empty until then.
    """
    noted: list[int] = []
    before = signal.getsignal(signal.SIGINT)
    if (
        threading.current_thread() is not threading.main_thread()
        or before is not signal.default_int_handler
    ):
        yield noted
        return

    def note(number, frame):
        noted.append(number)
        before(number, frame)

    signal.signal(signal.SIGINT, note)
    try:
        yield noted
    finally:
        signal.signal(signal.SIGINT, before)
