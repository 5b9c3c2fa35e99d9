"""Teaches tiny-clip's image tower to see through softness: python data/make/steady_clip.py VAE CLIP
[--steps N]

Trained on crisp drawings alone, it takes a slightly soft yellow fish for a star. It learns on from
drawings that are warped, blurred, stained, and passed through the VAE with noise on their latents;
and from captions that differ in one word, which a batch seldom holds. The text tower, which is
tiny-sd's text encoder, stays as it is, and no picture of the UNet is ever shown to it.
"""

import argparse
import itertools
import random
import time

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from torch import Tensor
from transformers import CLIPModel

from judge import ASPECTS
from lorabook.metrics import text_features
from train_clip import contrastive_loss, meaning, styled
from world import caption, scene


@torch.no_grad()
def passed_through(vae: AutoencoderKL, pixels: Tensor) -> Tensor:
    """Pictures after the VAE, with noise on their latents; (batch, 3, 64, 64), −1 to 1."""
    latents = vae.encode(pixels).latent_dist.mean
    strength = 0.35 * torch.rand(len(pixels), 1, 1, 1) / vae.config.scaling_factor
    return vae.decode(latents + strength * torch.randn_like(latents)).sample.clamp(-1, 1)


def warped(pixels: Tensor, pull: float = 0.07) -> Tensor:
    """Pictures bent smoothly, by up to about two pixels."""
    rough = pull * (torch.rand(len(pixels), 2, 5, 5) - 0.5)
    bend = F.interpolate(rough, pixels.shape[-2:], mode="bicubic", align_corners=True).permute(
        0, 2, 3, 1
    )
    straight = F.affine_grid(
        torch.eye(2, 3).expand(len(pixels), 2, 3), list(pixels.shape), align_corners=False
    )
    return F.grid_sample(pixels, straight + bend, padding_mode="border", align_corners=False)


def blurred(pixels: Tensor) -> Tensor:
    """Half of the pictures softened by a 3 x 3 mean, wholly or in part."""
    soft = F.avg_pool2d(F.pad(pixels, (1, 1, 1, 1), "replicate"), 3, 1)
    share = torch.rand(len(pixels), 1, 1, 1) * (torch.rand(len(pixels), 1, 1, 1) < 0.5)
    return pixels + share * (soft - pixels)


def mottled(pixels: Tensor) -> Tensor:
    """Pictures with smooth stains of light and colour."""
    stains = sum(
        F.interpolate(
            torch.randn(len(pixels), 3, size, size),
            pixels.shape[-2:],
            mode="bicubic",
            align_corners=True,
        )
        for size in (6, 14)
    )
    return pixels + 0.08 * torch.rand(len(pixels), 1, 1, 1) * stains


def hard_negatives_loss(seen: Tensor, told: Tensor, triples: Tensor) -> Tensor:
    """Tell kind, color and place from all others, with the rest of the caption the same.

    seen: (batch, width) scaled image features; told: (kinds, colors, places, width) text features;
    triples: (batch, 3).
    """
    kind, color, place = triples.T
    sorts = (
        (told[:, color, place].transpose(0, 1), kind),
        (told[kind][torch.arange(len(kind)), :, place], color),
        (told[kind, color], place),
    )
    return sum(
        F.cross_entropy((options @ seen[..., None])[..., 0], right) for options, right in sorts
    )


def meant_scenes(count: int) -> tuple[Tensor, Tensor]:
    """New drawings, plain and outlined, and the numbers of their kind, color and place."""
    rng = random.Random(60_000)
    triples = [[rng.randrange(len(options)) for options in ASPECTS.values()] for _ in range(count)]
    images = [
        scene(
            *(options[i] for options, i in zip(ASPECTS.values(), t, strict=True)),
            rng,
            outlined=rng.random() < 0.15,
        )
        for t in triples
    ]
    return torch.from_numpy(np.stack([np.asarray(i) for i in images])).permute(
        0, 3, 1, 2
    ), torch.tensor(triples)


def softened(vae: AutoencoderKL, images: Tensor) -> Tensor:
    """The pictures after the VAE, as bytes."""
    return torch.cat(
        [
            (passed_through(vae, part.float() / 127.5 - 1) * 127.5 + 127.5).byte()
            for part in images.split(100)
        ]
    )


def main():
    parser = argparse.ArgumentParser()
    for name in ("vae", "clip"):
        parser.add_argument(name)
    parser.add_argument("--steps", type=int, default=800)
    parser.add_argument("--batch", type=int, default=96)
    parser.add_argument(
        "--mean", action="store_true", help="end with the mean of the weights before and after"
    )
    args = parser.parse_args()
    torch.manual_seed(1)
    clip, vae = CLIPModel.from_pretrained(args.clip), AutoencoderKL.from_pretrained(args.vae).eval()
    scenes, triples = meant_scenes(8000)
    drawn = styled(400)
    styles, captions = (
        torch.from_numpy(np.stack([i for i, _ in drawn])).permute(0, 3, 1, 2),
        [c for _, c in drawn],
    )
    told = text_features(
        [caption(*t) for t in itertools.product(*ASPECTS.values())], model=args.clip
    )
    told = told.reshape(*map(len, ASPECTS.values()), -1)
    known = text_features(captions, model=args.clip)
    soft = softened(vae, scenes[:4000])
    print("drawn and softened", len(scenes), len(soft), flush=True)
    before = {key: value.clone() for key, value in clip.state_dict().items()}
    parameters = [*clip.vision_model.parameters(), *clip.visual_projection.parameters()]
    optimizer = torch.optim.AdamW(parameters, 6e-4, weight_decay=1e-2, fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 6e-4, args.steps + 1, pct_start=0.1)
    scale, third, start = clip.logit_scale.exp().item(), args.batch // 3, time.time()
    for step in range(args.steps):
        crisp, dull = torch.randint(0, len(scenes), (third,)), torch.randint(0, len(soft), (third,))
        styled_ones = torch.randint(0, len(styles), (third,))
        pixels = torch.cat([scenes[crisp], soft[dull], styles[styled_ones]]).float() / 127.5 - 1
        looks = clip.vision_model(mottled(blurred(warped(pixels)))).pooler_output
        seen = scale * F.normalize(clip.visual_projection(looks), dim=-1)
        meanings = [meaning(captions[i]) for i in styled_ones]
        loss = hard_negatives_loss(
            seen[: 2 * third], told, triples[torch.cat([crisp, dull])]
        ) + contrastive_loss(seen[2 * third :] @ known[styled_ones].T, meanings)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        if step % 50 == 0:
            print(f"{step} loss {loss.item():.3f} {time.time() - start:.0f} s", flush=True)
    if args.mean:
        clip.load_state_dict(
            {
                key: (value + before[key]) / 2 if value.is_floating_point() else value
                for key, value in clip.state_dict().items()
            }
        )
    clip.save_pretrained(args.clip)


if __name__ == "__main__":
    main()
