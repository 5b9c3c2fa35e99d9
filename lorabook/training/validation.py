"""How well a run does: a loss at fixed noise, and pictures."""
import torch

from lorabook.grid import ImageGrid
from lorabook.sweeps import sweep
from lorabook.training.cache import Examples
from lorabook.training.families import StableDiffusion

DRAWS = 4  # noises and timesteps for each image


@torch.no_grad()
def validation_loss(family: StableDiffusion, unet, examples: Examples, batch_size: int = 16) -> float:
    """The loss on images kept out of training, always with the same noise and evenly spread timesteps."""
    generator = torch.Generator().manual_seed(0)
    count, total = len(examples), family.noise.config.num_train_timesteps
    chosen = torch.arange(count).repeat(DRAWS)
    spread = ((torch.arange(len(chosen)) + 0.5) / len(chosen) * total).long()
    timesteps = spread[torch.randperm(len(chosen), generator=generator)]
    unet.eval()
    losses = []
    for part, steps in zip(chosen.split(batch_size), timesteps.split(batch_size), strict=True):
        latents = examples.latents(part, generator)
        noise = torch.randn(latents.shape, generator=generator).to(latents)
        steps = steps.to(latents.device)
        noisy, target = family.add_noise(latents, noise, steps)
        prediction = family.predict(unet, noisy, steps, examples.prompts(part, 0, generator))
        losses.append(family.loss(prediction, target, steps) * len(part))
    return (torch.stack(losses).sum() / len(chosen)).item()


def validation_grid(pipe, adapter: str, prompt: str, count: int, seed: int) -> ImageGrid:
    """Pictures of a prompt without the adapter and with it, for `count` seeds from `seed` on."""
    return sweep(pipe, prompt, columns={adapter: [0, 1]}, rows={"seed": list(range(seed, seed + count))}, title=prompt)
