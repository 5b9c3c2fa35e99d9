"""How much slower is a training step than the UNet's forward and backward pass alone? Prints seconds and their ratio."""
import time
from statistics import median

import torch

import lorabook as lb
from lorabook.training.cache import Examples
from lorabook.training.families import family_of
from lorabook.training.loop import make_optimizer, training_loss
from lorabook.training.text_to_image import add_lora

ROUNDS = 20


def seconds(step) -> float:
    """Median time of one call, after three to warm up."""
    times = []
    for number in range(ROUNDS + 3):
        started = time.perf_counter()
        step()
        if number >= 3:
            times.append(time.perf_counter() - started)
    return median(times)


def measure(target: str, rank: int, batch: int) -> tuple[float, float]:
    """Seconds of the floor and of our step, for one kind of adapter and one batch size."""
    config = lb.TextToImageConfig(target=target, rank=rank, train_batch_size=batch, random_flip=True)
    family = family_of(lb.load_pipeline("tiny-sd", device="cpu"))
    unet = family.pipe.unet
    examples = Examples(family, lb.load_captioned_images("creatures", max_samples=64), resolution=64, center_crop=True,
                        random_flip=True, interpolation="lanczos", progress=False)
    add_lora(family, "measured", config)
    parameters = [p for p in unet.parameters() if p.requires_grad]
    optimizer, generator = make_optimizer(parameters, config), torch.Generator().manual_seed(0)
    latents, timesteps = torch.randn(batch, 4, 16, 16), torch.randint(0, 1000, (batch,))
    prompts = examples.prompts(torch.arange(batch), 0, generator)

    def floor():
        unet(latents, timesteps, prompts, return_dict=False)[0].mean().backward()

    def step():
        training_loss(family, unet, examples, torch.randint(0, 64, (batch,)), config, generator).backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()

    unet.train()
    return seconds(floor), seconds(step)


if __name__ == "__main__":
    print(f"{'adapter':<24}{'batch':>6}{'UNet alone':>12}{'our step':>10}{'ratio':>7}")
    for target, rank in (("attention", 8), ("all", 16)):
        for batch in (1, 8):
            alone, ours = measure(target, rank, batch)
            print(f"{target + ', rank ' + str(rank):<24}{batch:>6}{alone:>11.3f}s{ours:>9.3f}s{ours / alone:>7.2f}")
