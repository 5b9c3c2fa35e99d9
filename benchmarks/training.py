"""How fast is our training loop beside the floor, and beside a loop that encodes in each step?

The floor is the UNet's forward and backward pass and AdamW on one batch that stays the same, and
nothing else. Each way runs in a process of its own, three times in turn; told are the medians of
steps a second and of peak memory.

    python benchmarks/training.py [--rounds 3] [--steps 40]
"""

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from statistics import median

import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader

import lorabook as lb
from lorabook.training.callbacks import Callbacks
from lorabook.training.dataset import ImageTransform, TransformedImages
from lorabook.training.loop import train
from lorabook.training.lora import add_lora, merged_products, trainable_parameters
from lorabook.training.setup import set_up
from lorabook.training.trainer import Trainer, TrainingData

WAYS = ("floor", "ours", "encoding every step")
WARM = 5


def ours(setup, images, steps: int) -> float:
    """Steps a second of the package's own loop, with all that it does between the steps."""
    trainer = Trainer(setup, TrainingData(images, (len(images),)), {}, {})
    callbacks, times = Callbacks(trainer), []

    def after_step():
        callbacks.after_step()
        times.append(time.perf_counter())

    for model in trainer.models.values():
        model.train()
    with merged_products(trainer.models.values()):
        train(trainer, after_step)
    return steps / (times[-2] - times[-2 - steps])  # the last one saves


def floor(setup, models, images, steps: int) -> float:
    """Steps a second of forward, backward and AdamW on one batch, and nothing else."""
    size, unet = setup.config.train_batch_size, setup.family.pipe.unet
    optimizer = torch.optim.AdamW(list(trainable_parameters(models).values()), 1e-4, fused=True)
    noisy, target, timesteps = (
        torch.randn(size, 4, 16, 16),
        torch.randn(size, 4, 16, 16),
        torch.randint(0, 1000, (size,)),
    )
    prompts = setup.family.encode_prompts(images["text"][:size])[0]

    def step():
        F.mse_loss(unet(noisy, timesteps, prompts, return_dict=False)[0], target).backward()
        optimizer.step()
        optimizer.zero_grad()

    return rate(step, steps)


def encoding(setup, models, images, steps: int) -> float:
    """Steps a second of diffusers' script: read, encode image and prompt, train, log the loss."""
    family, size, unet, pipe = (
        setup.family,
        setup.config.train_batch_size,
        setup.family.pipe.unet,
        setup.family.pipe,
    )
    pictures = TransformedImages(images, ImageTransform(64))
    tokens = pipe.tokenizer(
        list(images["text"]), padding="max_length", truncation=True, return_tensors="pt"
    ).input_ids
    rows = [*range(len(images))] * (size * (steps + WARM) // len(images) + 1)
    loader = DataLoader(rows, size, shuffle=True, collate_fn=list)
    batches, parameters = iter(loader), list(trainable_parameters(models).values())
    optimizer = setup.accelerator.prepare(torch.optim.AdamW(parameters, 1e-4))

    def step():
        rows = next(batches)
        pixels = torch.stack([pictures.pixels(row) for row in rows])
        latents = pipe.vae.encode(pixels).latent_dist.sample() * pipe.vae.config.scaling_factor
        timesteps = torch.randint(0, 1000, (size,))
        noisy, target = family.add_noise(latents, torch.randn_like(latents), timesteps)
        loss = F.mse_loss(
            unet(noisy, timesteps, pipe.text_encoder(tokens[rows])[0], return_dict=False)[0], target
        )
        setup.accelerator.gather(loss.repeat(size)).mean().item()
        setup.accelerator.backward(loss)
        setup.accelerator.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return rate(step, steps)


def rate(step, steps: int) -> float:
    """Steps a second, after a few to warm up."""
    for _ in range(WARM):
        step()
    started = time.perf_counter()
    for _ in range(steps):
        step()
    return steps / (time.perf_counter() - started)


def measure(way: str, target: str, rank: int, batch: int, steps: int) -> dict:
    """Steps a second and peak memory of one way, in this process."""
    with tempfile.TemporaryDirectory() as folder:
        config = lb.TextToImageConfig(
            pretrained_model_name_or_path="tiny-sd",
            target=target,
            rank=rank,
            seed=0,
            train_batch_size=batch,
            max_train_steps=steps + WARM + 1,
            report_to="none",
            output_dir=folder,
            cache_dir=folder,
        )
        images = lb.load_captioned_images("creatures", max_samples=64)
        with set_up(config) as setup:
            if way == "ours":
                speed = ours(setup, images, steps)
            else:
                models = add_lora(setup.family, setup.config)
                setup.family.pipe.unet.train()
                speed = (floor if way == "floor" else encoding)(setup, models, images, steps)
    return {"rate": speed, "mebibytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024}


def apart(*arguments) -> dict:
    """What `measure` finds in a process of its own."""
    command = [sys.executable, __file__, "--measure", *map(str, arguments)]
    return json.loads(
        subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()[-1]
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--measure", nargs=5, help="way, target, rank, batch, steps")
    told = parser.parse_args()
    if told.measure:
        way, target, rank, batch, steps = told.measure
        print(json.dumps(measure(way, target, int(rank), int(batch), int(steps))))
        sys.exit()
    print(
        f"{'adapter, batch':<26}{'way':<22}{'steps/s':>9}{'of floor':>10}"
        f"{'of encoding':>13}{'peak MiB':>10}"
    )
    for target, rank, batch in (("attention", 4, 8), ("all", 16, 8)):
        found = {way: [] for way in WAYS}
        for _ in range(told.rounds):
            for way in WAYS:
                found[way].append(apart(way, target, rank, batch, told.steps))
        rates = {way: median(run["rate"] for run in runs) for way, runs in found.items()}
        for way in WAYS:
            memory = median(run["mebibytes"] for run in found[way])
            print(
                f"{f'{target}, rank {rank}, {batch}':<26}{way:<22}{rates[way]:>9.2f}"
                f"{rates[way] / rates['floor']:>10.2f}"
                f"{rates[way] / rates['encoding every step']:>13.2f}{memory:>10.0f}",
                flush=True,
            )
