"""Trains tiny-sd's VAE: python data/make/train_vae.py BASE.npz OUT [--steps N]

64 x 64 pixels to 16 x 16 x 4 latents. The loss leans on what stands out from the background and on
edges: a plain L1 is satisfied by the background alone and leaves the small things grey.
"""

import argparse
import time

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL

SCALING_FACTOR = 0.18215  # Stable Diffusion's own; the latents are brought to it below


def make_vae() -> AutoencoderKL:
    vae = AutoencoderKL(
        block_out_channels=(32, 64, 64),
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        latent_channels=4,
        norm_num_groups=8,
        layers_per_block=1,
        sample_size=64,
        mid_block_add_attention=False,
        scaling_factor=SCALING_FACTOR,
    )
    with (
        torch.no_grad()
    ):  # start with a small deviation, so that the first samples are worth decoding
        vae.quant_conv.weight[4:] *= 0.1
        vae.quant_conv.bias[4:] = -4
    return vae


def differences(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return x[..., 1:] - x[..., :-1], x[..., 1:, :] - x[..., :-1, :]


def attention_map(x: torch.Tensor) -> torch.Tensor:
    """(batch, 1, h, w) weights: 1 on the background, up to 8 on the thing and its edges."""
    background = x.flatten(2).median(-1).values[..., None, None]
    stands_out = ((x - background).abs().amax(1, keepdim=True) > 0.15).float()
    across, down = differences(x)
    edge = F.pad(across.abs(), (0, 1)) + F.pad(down.abs(), (0, 0, 0, 1))
    edge = F.max_pool2d((edge.amax(1, keepdim=True) > 0.3).float(), 3, 1, 1)
    return 1 + 4 * stands_out + 3 * edge


def reconstruction_loss(y: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    error, weight = y - x, attention_map(x)
    loss = (weight * error.abs()).mean()
    for size in (4, 8):
        loss = loss + 4 * (F.avg_pool2d(error, size) ** 2 * F.avg_pool2d(weight, size)).mean()
    across, down = differences(error)
    return loss + (weight[..., 1:] * across.abs()).mean() + (weight[..., 1:, :] * down.abs()).mean()


@torch.no_grad()
def normalise(vae: AutoencoderKL, images: torch.Tensor) -> None:
    """Fold an affine map into the 1 x 1 convolutions: each latent channel gets mean 0, deviation 1
    / scaling factor.
    """
    latents = torch.cat(
        [vae.encode(batch.float() / 127.5 - 1).latent_dist.mean for batch in images.split(64)]
    )
    mean = latents.mean((0, 2, 3))
    factor = latents.std((0, 2, 3)) * SCALING_FACTOR
    quant, post = vae.quant_conv, vae.post_quant_conv
    post.bias += post.weight[..., 0, 0] @ mean
    post.weight *= factor[None, :, None, None]
    quant.bias[:4] = (quant.bias[:4] - mean) / factor
    quant.weight[:4] /= factor[:, None, None, None]
    quant.bias[4:] -= 2 * factor.log()


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("base")
    parser.add_argument("out")
    parser.add_argument("--steps", type=int, default=8000)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.manual_seed(0)
    torch.set_num_threads(args.threads)
    data = np.load(args.base)
    drawings, scribbles = (
        torch.from_numpy(data[k]).permute(0, 3, 1, 2) for k in ("images", "scribbles")
    )
    vae = make_vae()
    optimizer = torch.optim.AdamW(vae.parameters(), 2e-3, betas=(0.9, 0.99))
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, args.steps + 1, pct_start=0.05)
    half, start = args.batch // 2, time.time()
    for step in range(args.steps):
        x = torch.cat(
            [source[torch.randint(0, len(source), (half,))] for source in (drawings, scribbles)]
        )
        x = x.float() / 127.5 - 1
        with torch.autocast("cpu", torch.bfloat16):
            posterior = vae.encode(x).latent_dist
            y = vae.decode(posterior.sample()).sample
        loss = reconstruction_loss(y.float(), x) + 4e-6 * posterior.kl().float().mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 100 == 0:
            l1, sigma = (
                (y - x).abs().mean().item(),
                posterior.std.mean().item() / posterior.mean.std().item(),
            )
            print(
                f"{step} loss {loss.item():.4f} l1 {l1:.4f} sigma {sigma:.3f} {time.time() - start:.0f} s",
                flush=True,
            )
        if step % 1000 == 999:
            vae.save_pretrained(args.out)
    vae.eval()
    normalise(vae, drawings[:1024])
    vae.save_pretrained(args.out)


if __name__ == "__main__":
    main()
