"""The one training loop: every method and every model family goes through it."""

import signal
import threading
import time
from collections.abc import Callable

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from lorabook.training.dataset import Batch, to_device
from lorabook.training.sampler import seed_of
from lorabook.training.trainer import Trainer


def train(trainer: Trainer, after_step: Callable[[], None]) -> None:
    """Train from the step where `trainer` stands to its last one; the losses stay on the device.

    At a stop button it raises KeyboardInterrupt, with the step at hand done whole or not at all.
    """
    accelerator, optimizer, scheduler = trainer.accelerator, trainer.optimizer, trainer.scheduler
    parameters = list(trainer.parameters.values())
    accumulation = trainer.config.gradient_accumulation_steps
    losses: list[Tensor] = []
    rows: list[int] = []
    with StopButton() as stop:
        started = time.perf_counter()
        for batch in trainer.batches():
            stop.release()
            if trainer.has_dropout:  # seeding takes longer than all else beside the UNet
                torch.manual_seed(
                    seed_of(trainer.sampler.seed, 3, batch.number, trainer.sampler.process)
                )
            with accelerator.autocast():
                loss = training_loss(trainer, batch)
            accelerator.backward(loss)
            losses.append(loss.detach())
            rows += batch.rows.tolist()
            if (batch.number + 1) % accumulation:
                continue
            stop.held = True
            average_gradients(accelerator, parameters)
            accelerator.clip_grad_norm_(parameters, trainer.config.max_grad_norm)
            optimizer.step()
            rate = scheduler.get_last_lr()[0]
            scheduler.step()
            optimizer.zero_grad()
            trainer.record(torch.stack(losses).mean(), rate, time.perf_counter() - started, rows)
            losses, rows = [], []
            stop.release()
            after_step()
            started = time.perf_counter()


def training_loss(trainer: Trainer, batch: Batch) -> Tensor:
    """The loss of one batch: the mean over each group of its rows, weighed and summed."""
    config, family = trainer.config, trainer.family
    rng = trainer.sampler.rng(batch.number, purpose=2)
    mean, deviation = batch.moments.float().unbind(1)
    device, shape = mean.device, mean.shape[1:]
    latents = mean + deviation * to_device(rng.normal(*shape), device)
    noise = rng.normal(*shape)
    if config.noise_offset:
        noise = noise + config.noise_offset * rng.normal(shape[0], 1, 1)
    timesteps = to_device(rng.integers(family.noise.config.num_train_timesteps), device)
    noisy, target = family.add_noise(latents, to_device(noise, device), timesteps)
    prompts = batch.prompts or trainer.images.prompts(batch.captions)
    prediction = family.predict(noisy, timesteps, prompts, batch.geometry)
    errors = family.losses(
        prediction, target, timesteps, config.snr_gamma, denoised=config.do_edm_style_training
    )
    weights = trainer.group_weights
    return (errors.unflatten(0, (len(weights), -1)).mean(1) * weights).sum()


def average_gradients(accelerator: Accelerator, parameters: list[nn.Parameter]) -> None:
    """Give every process the mean of all gradients; a LoRA's are few enough to be sent at once."""
    if accelerator.num_processes == 1:
        return
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    mean = accelerator.reduce(torch.cat([gradient.flatten() for gradient in gradients]), "mean")
    sizes = [gradient.numel() for gradient in gradients]
    for gradient, part in zip(gradients, mean.split(sizes), strict=True):
        gradient.copy_(part.view_as(gradient))


class StopButton:
    """Ctrl-C or a notebook's stop button inside a `with` block.

    It raises KeyboardInterrupt at once, but not while `held` is true: `release` raises it then.
    Python drops the exception of an interrupt that meets a destructor or a callback; it is raised
    by the next `release`. A handler of one's own and other threads are left alone.
    """

    held = pressed = False

    def __enter__(self) -> "StopButton":
        self.before = signal.getsignal(signal.SIGINT)
        main = threading.current_thread() is threading.main_thread()
        if main and self.before is signal.default_int_handler:
            signal.signal(signal.SIGINT, self._press)
        return self

    def __exit__(self, *error) -> None:
        if signal.getsignal(signal.SIGINT) == self._press:
            signal.signal(signal.SIGINT, self.before)

    def release(self) -> None:
        """Let interrupts through again; raise KeyboardInterrupt if there was one."""
        self.held = False
        if self.pressed:
            raise KeyboardInterrupt

    def _press(self, number, frame) -> None:
        self.pressed = True
        if not self.held:
            raise KeyboardInterrupt
