"""The one training loop."""
import math
import time
from collections.abc import Callable

import torch
from accelerate import Accelerator
from diffusers.optimization import get_scheduler
from torch import Tensor
from torch.utils.data import DataLoader
from tqdm.auto import tqdm

from lorabook.training.cache import Examples
from lorabook.training.config import TextToImageConfig
from lorabook.training.families import StableDiffusion

SHOW_EVERY = 10  # steps between two looks at the loss; each look waits for the device


def train(accelerator: Accelerator, family: StableDiffusion, examples: Examples, config: TextToImageConfig, *,
          seed: int, validate: Callable[[], float] | None = None) -> list[dict]:
    """Train those of the UNet's parameters that require gradients.

    Args:
        accelerator: devices, precision and accumulation.
        family: the pipeline and what is particular to it.
        examples: what to learn.
        config: how.
        seed: seed of order, noise, timesteps, flips and dropped captions.
        validate: measures a validation loss; called before, five times on the way, and after.
    Returns: the history, a record a step.
    Raises: FloatingPointError if the loss is no longer finite.
    """
    loader = DataLoader(range(len(examples)), config.train_batch_size, shuffle=True,
                        generator=torch.Generator().manual_seed(seed))
    parameters = [p for p in family.pipe.unet.parameters() if p.requires_grad]
    unet, optimizer, loader = accelerator.prepare(
        family.pipe.unet, make_optimizer(parameters, config, accelerator.num_processes), loader,
        device_placement=[True, True, False])  # the loader's numbers stay on the CPU, where they choose
    steps = config.max_train_steps or config.num_train_epochs * math.ceil(
        len(loader) / config.gradient_accumulation_steps)
    schedule = accelerator.prepare(get_scheduler(
        config.lr_scheduler, optimizer, num_warmup_steps=config.lr_warmup_steps * accelerator.num_processes,
        num_training_steps=steps * accelerator.num_processes))
    generator = torch.Generator().manual_seed(seed + 1 + accelerator.process_index)
    checks = {round(steps * i / 5) for i in range(1, 6)} if validate else set()
    history = [{"step": 0, "validation_loss": validate()}] if validate else []
    losses: list[Tensor] = []
    step, started = 0, time.perf_counter()
    unet.train()
    progress = tqdm(total=steps, desc="training", disable=not accelerator.is_local_main_process)
    while step < steps:
        for chosen in loader:
            with accelerator.accumulate(unet):
                loss = training_loss(family, unet, examples, chosen, config, generator)
                accelerator.backward(loss)
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(parameters, config.max_grad_norm)
                optimizer.step()
                schedule.step()
                optimizer.zero_grad()
            losses.append(loss.detach())
            if not accelerator.sync_gradients:
                continue
            step += 1
            progress.update()
            history.append({"step": step, "loss": torch.stack(losses).mean(),
                            "learning_rate": schedule.get_last_lr()[0]})
            losses.clear()
            if step % SHOW_EVERY == 0 or step == steps:
                _read_losses(history, progress)
            if step in checks:
                history[-1]["validation_loss"] = validate()
                unet.train()
            history[-1]["seconds"] = time.perf_counter() - started
            started = time.perf_counter()
            if step == steps:
                break
    progress.close()
    unet.eval()
    return history


def make_optimizer(parameters: list[Tensor], config: TextToImageConfig, processes: int = 1) -> torch.optim.Optimizer:
    """AdamW as the config says."""
    rate = config.learning_rate
    if config.scale_lr:
        rate *= config.gradient_accumulation_steps * config.train_batch_size * processes
    return torch.optim.AdamW(parameters, rate, betas=(config.adam_beta1, config.adam_beta2),
                             weight_decay=config.adam_weight_decay, eps=config.adam_epsilon, fused=True)


def training_loss(family: StableDiffusion, unet, examples: Examples, chosen: Tensor, config: TextToImageConfig,
                  generator: torch.Generator) -> Tensor:
    """The loss of one batch; `chosen` are the examples' numbers."""
    latents = examples.latents(chosen, generator)
    noise = torch.randn(latents.shape, generator=generator)
    if config.noise_offset:
        noise = noise + config.noise_offset * torch.randn(*latents.shape[:2], 1, 1, generator=generator)
    timesteps = torch.randint(0, family.noise.config.num_train_timesteps, (len(chosen),), generator=generator)
    noise, timesteps = noise.to(latents), timesteps.to(latents.device)
    noisy, target = family.add_noise(latents, noise, timesteps)
    prompts = examples.prompts(chosen, config.caption_dropout, generator)
    return family.loss(family.predict(unet, noisy, timesteps, prompts), target, timesteps, config.snr_gamma)


def _read_losses(history: list[dict], progress: tqdm) -> None:
    """Bring the losses from the device, show the last, and stop where one is not finite."""
    for record in reversed(history):
        if not isinstance(record.get("loss"), Tensor):
            break
        record["loss"] = record["loss"].item()
        if not math.isfinite(record["loss"]):
            raise FloatingPointError(f"the loss at step {record['step']} is {record['loss']}: the learning rate is "
                                     "usually too high, or fp16 overflows; nothing was written")
    progress.set_postfix(loss=f"{history[-1]['loss']:.3f}", refresh=False)
