"""Teaches tiny-clip's image tower to see through softness: python data/make/steady_clip.py BASE.npz VAE CLIP [--steps N]

Trained on crisp drawings alone, it takes a slightly soft yellow fish for a star. It learns on from the same drawings,
warped, blurred, and passed through the VAE with noise on their latents. The text tower, which is tiny-sd's text encoder,
stays as it is, and no picture of the UNet is ever shown to it.
"""
import argparse
import time

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from torch import Tensor
from transformers import CLIPModel, CLIPTokenizer

from lorabook.metrics import text_features
from train_clip import contrastive_loss, meaning, styled


@torch.no_grad()
def passed_through(vae: AutoencoderKL, pixels: Tensor) -> Tensor:
    """Pictures after the VAE, with noise on their latents; (batch, 3, 64, 64), −1 to 1."""
    latents = vae.encode(pixels).latent_dist.mean
    strength = 0.35 * torch.rand(len(pixels), 1, 1, 1) / vae.config.scaling_factor
    return vae.decode(latents + strength * torch.randn_like(latents)).sample.clamp(-1, 1)


def warped(pixels: Tensor, pull: float = 0.07) -> Tensor:
    """Pictures bent smoothly, by up to about two pixels."""
    rough = pull * (torch.rand(len(pixels), 2, 5, 5) - 0.5)
    bend = F.interpolate(rough, pixels.shape[-2:], mode="bicubic", align_corners=True).permute(0, 2, 3, 1)
    straight = F.affine_grid(torch.eye(2, 3).expand(len(pixels), 2, 3), list(pixels.shape), align_corners=False)
    return F.grid_sample(pixels, straight + bend, padding_mode="border", align_corners=False)


def blurred(pixels: Tensor) -> Tensor:
    """Half of the pictures softened by a 3 x 3 mean, wholly or in part."""
    soft = F.avg_pool2d(F.pad(pixels, (1, 1, 1, 1), "replicate"), 3, 1)
    share = torch.rand(len(pixels), 1, 1, 1) * (torch.rand(len(pixels), 1, 1, 1) < 0.5)
    return pixels + share * (soft - pixels)


def main():
    parser = argparse.ArgumentParser()
    for name in ("base", "vae", "clip"):
        parser.add_argument(name)
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--batch", type=int, default=96)
    args = parser.parse_args()
    torch.manual_seed(1)
    clip, vae = CLIPModel.from_pretrained(args.clip), AutoencoderKL.from_pretrained(args.vae).eval()
    data, extra = np.load(args.base), styled(700)
    images = torch.from_numpy(np.concatenate([data["images"][:12_000], np.stack([i for i, _ in extra])])).permute(0, 3, 1, 2)
    captions = [str(c) for c in data["captions"][:12_000]] + [c for _, c in extra]
    texts = sorted(set(captions))
    known = torch.cat([text_features(texts[i:i + 500], model=args.clip) for i in range(0, len(texts), 500)])
    number = {text: i for i, text in enumerate(texts)}
    through = torch.cat([(passed_through(vae, part.float() / 127.5 - 1) * 127.5 + 127.5).byte()
                         for part in images[::6].split(100)])
    print("passed through the VAE:", len(through), flush=True)
    parameters = [*clip.vision_model.parameters(), *clip.visual_projection.parameters()]
    optimizer = torch.optim.AdamW(parameters, 5e-4, weight_decay=1e-2, fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 5e-4, args.steps + 1, pct_start=0.1)
    start = time.time()
    for step in range(args.steps):
        chosen = torch.randint(0, len(images), (args.batch,))
        chosen[: args.batch // 2] -= chosen[: args.batch // 2] % 6  # this half has been through the VAE
        half = args.batch // 2
        pixels = torch.cat([through[chosen[:half] // 6], images[chosen[half:]]]).float() / 127.5 - 1
        seen = F.normalize(clip.visual_projection(clip.vision_model(blurred(warped(pixels))).pooler_output), dim=-1)
        told = [captions[i] for i in chosen]
        logits = clip.logit_scale.exp().detach() * seen @ known[[number[text] for text in told]].T
        loss = contrastive_loss(logits, [meaning(text) for text in told])
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        if step % 50 == 0:
            print(f"{step} loss {loss.item():.3f} {time.time() - start:.0f} s", flush=True)
    clip.save_pretrained(args.clip)
    CLIPTokenizer.from_pretrained(args.clip).save_pretrained(args.clip)


if __name__ == "__main__":
    main()
