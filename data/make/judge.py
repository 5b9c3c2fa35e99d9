"""Judges pictures of the base world by tiny-clip: python data/make/judge.py drawings|MODEL [--count
300] [--clip CLIP]
"""

import argparse
import random

import torch
from PIL import Image

from lorabook.metrics import prompt_similarity
from world import COLORS, KINDS, PLACES, caption, scene

ASPECTS = {"kind": list(KINDS), "color": list(COLORS), "place": list(PLACES)}
Wanted = tuple[str, str, str]


def wanted(count: int, seed: int) -> list[Wanted]:
    """Random (kind, color, place) triples."""
    rng = random.Random(seed)
    return [tuple(rng.choice(options) for options in ASPECTS.values()) for _ in range(count)]


def judge(images: list[Image.Image], triples: list[Wanted], clip=None) -> dict[str, float]:
    """Share of images in which tiny-clip sees the wanted kind, color and place; each against all
    others of its sort.
    """
    right = dict.fromkeys(ASPECTS, 0)
    for image, triple in zip(images, triples, strict=True):
        for place, (aspect, options) in enumerate(ASPECTS.items()):
            candidates = [
                caption(*triple[:place], option, *triple[place + 1 :]) for option in options
            ]
            seen = int(prompt_similarity([image], candidates, model=clip).argmax())
            right[aspect] += options[seen] == triple[place]
    return {aspect: count / len(images) for aspect, count in right.items()}


def drawings(triples: list[Wanted], seed: int) -> list[Image.Image]:
    """Real drawings of the triples, by other random numbers than those of training."""
    rng = random.Random(seed)
    return [scene(*triple, rng) for triple in triples]


def generated(
    pipe, triples: list[Wanted], *, batch: int = 20, steps: int = 15, guidance: float = 4.0
) -> list[Image.Image]:
    """One picture a triple, seeded by its number."""
    pipe.set_progress_bar_config(disable=True)
    images = []
    for start in range(0, len(triples), batch):
        part = range(start, min(start + batch, len(triples)))
        images += pipe(
            [caption(*triples[i]) for i in part],
            num_inference_steps=steps,
            guidance_scale=guidance,
            generator=[torch.Generator().manual_seed(i) for i in part],
        ).images
    return images


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("model")
    parser.add_argument("--count", type=int, default=300)
    parser.add_argument("--clip", default=None)
    args = parser.parse_args()
    triples = wanted(args.count, seed=9)
    if args.model == "drawings":
        print(judge(drawings(triples, seed=90_000), triples, args.clip))
    else:
        from diffusers import StableDiffusionPipeline

        print(
            judge(
                generated(StableDiffusionPipeline.from_pretrained(args.model), triples),
                triples,
                args.clip,
            )
        )
