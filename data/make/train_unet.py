"""Trains tiny-sd's UNet and puts the pipeline together:

python data/make/train_unet.py BASE.npz VAE CLIP OUT --steps N

It predicts v under a schedule whose last step has no signal at all: a latent with a flat background
keeps its mean through the strongest noise of the usual schedule, and a model trained on that one
never learns to make it. A run that was stopped goes on from OUT/state.pt.
"""

import argparse
import os
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import (
    AutoencoderKL,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from transformers import CLIPModel, CLIPTextModel, CLIPTokenizer

from judge import generated, judge, wanted

SCHEDULE = dict(
    beta_schedule="scaled_linear",
    beta_start=0.00085,
    beta_end=0.012,
    prediction_type="v_prediction",
    rescale_betas_zero_snr=True,
    timestep_spacing="trailing",
    steps_offset=1,
)


def make_unet() -> UNet2DConditionModel:
    """Stable Diffusion 1.5's topology at a tenth of its width."""
    return UNet2DConditionModel(
        sample_size=16,
        block_out_channels=(32, 64, 96, 128),
        layers_per_block=2,
        cross_attention_dim=128,
        attention_head_dim=4,
        norm_num_groups=8,
        down_block_types=("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
        up_block_types=("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
    )


def text_tower(clip: CLIPModel) -> CLIPTextModel:
    """tiny-clip's text tower as a model of its own, as Stable Diffusion's text encoder is CLIP's."""
    encoder = CLIPTextModel(clip.config.text_config)
    inner = getattr(encoder, "text_model", encoder)
    inner.load_state_dict(clip.text_model.state_dict())
    return encoder.eval().requires_grad_(False)


def assemble(vae, clip_folder: str, unet) -> StableDiffusionPipeline:
    return StableDiffusionPipeline(
        vae=vae,
        text_encoder=text_tower(CLIPModel.from_pretrained(clip_folder)),
        tokenizer=CLIPTokenizer.from_pretrained(clip_folder),
        unet=unet,
        scheduler=DPMSolverMultistepScheduler(**SCHEDULE),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


@torch.no_grad()
def encode(pipe: StableDiffusionPipeline, data) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Latents (images, 4, 16, 16), prompt embeddings (captions, 77, 128) with the empty one last,
    caption numbers.
    """
    pixels = torch.from_numpy(data["images"]).permute(0, 3, 1, 2)
    latents = torch.cat(
        [pipe.vae.encode(part.float() / 127.5 - 1).latent_dist.mean for part in pixels.split(100)]
    )
    texts, numbers = np.unique(data["captions"], return_inverse=True)
    texts = [str(text) for text in texts] + [""]
    embeddings = torch.cat(
        [
            pipe.encode_prompt(texts[i : i + 200], "cpu", 1, False)[0].half()
            for i in range(0, len(texts), 200)
        ]
    )
    return latents * pipe.vae.config.scaling_factor, embeddings, torch.from_numpy(numbers)


def rate(step: int, steps: int, peak: float) -> float:
    """Rise for 200 steps, stay, fall to a fiftieth over the last six tenths."""
    fall = min(1.0, max(0.0, (step / steps - 0.4) / 0.6))
    return peak * min(1.0, (step + 1) / 200) * (0.02 + 0.98 * (1 + np.cos(np.pi * fall)) / 2)


class Average:
    """Exponential moving average of weights."""

    def __init__(self, model):
        self.live, self.kept = (
            list(model.parameters()),
            [p.detach().clone() for p in model.parameters()],
        )

    @torch.no_grad()
    def update(self, step: int):
        torch._foreach_lerp_(self.kept, self.live, 1 - min(0.9985, (1 + step) / (10 + step)))

    @torch.no_grad()
    def swap(self):
        """Exchange the averaged weights and the live ones."""
        for live, kept in zip(self.live, self.kept, strict=True):
            live.data, kept.data = kept.data, live.data


def main():
    parser = argparse.ArgumentParser()
    for name in ("base", "vae", "clip", "out"):
        parser.add_argument(name)
    parser.add_argument("--steps", type=int, default=9000)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--learning_rate", type=float, default=1.2e-3)
    parser.add_argument("--compile", action="store_true")
    args = parser.parse_args()
    torch.manual_seed(0)
    torch.set_num_threads(2)
    out, unet = Path(args.out), make_unet()
    pipe = assemble(AutoencoderKL.from_pretrained(args.vae).eval(), args.clip, unet)
    latents, embeddings, numbers = encode(pipe, np.load(args.base))
    print(
        "latents",
        latents.shape,
        "deviation",
        latents.std((0, 2, 3)),
        "captions",
        len(embeddings),
        flush=True,
    )
    noiser, average = DDPMScheduler(**SCHEDULE), Average(unet)
    optimizer = torch.optim.AdamW(
        unet.parameters(), args.learning_rate, betas=(0.9, 0.99), weight_decay=1e-4, fused=True
    )
    first, generator = 0, torch.Generator().manual_seed(0)
    if (out / "state.pt").exists():
        state = torch.load(out / "state.pt", weights_only=True)
        unet.load_state_dict(state["unet"]), optimizer.load_state_dict(state["optimizer"])
        average.kept, first = state["average"], state["step"]
        generator.set_state(state["generator"])
    forward = torch.compile(unet) if args.compile else unet
    unet.train()
    running, start = None, time.time()
    for step in range(first, args.steps):
        for group in optimizer.param_groups:
            group["lr"] = rate(step, args.steps, args.learning_rate)
        chosen = torch.randint(0, len(latents), (args.batch,), generator=generator)
        told = torch.where(
            torch.rand(args.batch, generator=generator) < 0.1, len(embeddings) - 1, numbers[chosen]
        )
        clean, noise = (
            latents[chosen],
            torch.randn(args.batch, *latents.shape[1:], generator=generator),
        )
        spread = (
            torch.arange(args.batch) + torch.rand(args.batch, generator=generator)
        ) / args.batch
        timesteps = (spread * 1000).long()
        prediction = forward(
            noiser.add_noise(clean, noise, timesteps),
            timesteps,
            embeddings[told].float(),
            return_dict=False,
        )[0]
        loss = F.mse_loss(prediction, noiser.get_velocity(clean, noise, timesteps))
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(unet.parameters(), 1.0)
        optimizer.step()
        average.update(step)
        running = loss.item() if running is None else 0.98 * running + 0.02 * loss.item()
        if step % 100 == 0:
            print(f"{step} loss {running:.4f} {time.time() - start:.0f} s", flush=True)
        if step % 500 == 499 or step == args.steps - 1:
            out.mkdir(exist_ok=True)
            torch.save(
                dict(
                    unet=unet.state_dict(),
                    optimizer=optimizer.state_dict(),
                    average=average.kept,
                    step=step + 1,
                    generator=generator.get_state(),
                ),
                out / "state.part",
            )
            os.replace(out / "state.part", out / "state.pt")
        if step % 1500 == 1499 or step == args.steps - 1:
            average.swap()
            unet.eval()
            pipe.save_pretrained(out / "pipeline")
            triples = wanted(40, seed=9)
            print(step, judge(generated(pipe, triples), triples, args.clip), flush=True)
            average.swap()
            unet.train()


if __name__ == "__main__":
    main()
