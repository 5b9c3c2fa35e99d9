"""Draws the base model's training pictures: python data/make/base_set.py OUT.npz"""

import random
import sys
from multiprocessing import Pool

import numpy as np

from scribbles import scribble
from world import drawing

DRAWINGS, SCRIBBLES, BLOCK = 32_000, 16_000, 1000


def _drawings(seed: int):
    rng = random.Random(seed)
    pairs = [drawing(rng) for _ in range(BLOCK)]
    return np.stack([np.asarray(image) for image, _ in pairs]), [text for _, text in pairs]


def _scribbles(seed: int):
    rng = random.Random(10_000 + seed)
    return np.stack([np.asarray(scribble(rng)) for _ in range(BLOCK)])


if __name__ == "__main__":
    with Pool() as pool:
        drawn = pool.map(_drawings, range(DRAWINGS // BLOCK))
        scribbled = pool.map(_scribbles, range(SCRIBBLES // BLOCK))
    np.savez(
        sys.argv[1],
        images=np.concatenate([i for i, _ in drawn]),
        captions=sum((c for _, c in drawn), []),
        scribbles=np.concatenate(scribbled),
    )
