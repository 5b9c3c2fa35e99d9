"""Is the base model the same, bit for bit, after any sequence of moves that is undone?

A thousand seeded sequences of load, scale, fuse, unfuse, swap and remove on tiny-sd, some of them
interrupted on the way, each undone at its end; after each the checksum of all base weights is
compared with the one at the start.

    python benchmarks/fuse_rounds.py [--sequences 1000] [--moves 8] [--dtype float32]
"""

import argparse
import random
import time
from collections import Counter
from contextlib import contextmanager, suppress
from itertools import count

import torch
from tqdm import tqdm

import lorabook as lb
from lorabook.live import merged_weights as fusing

ADAPTERS = ("creatures", "ink", "mosaic", "patch_cat")
SCALES = (
    0,
    0.5,
    -1,
    1.7,
    {"unet": {"down": 0.3, "up": {"block_1": [0.4, 0.8, 1.0]}}},
    "cross-attention only",
)


@contextmanager
def interrupted(place: int):
    """Interrupt fusing or unfusing in the block before it has changed so many layers."""
    whole, calls = fusing.base_weight, count()

    def stop(layer):
        if next(calls) == place:
            raise KeyboardInterrupt
        return whole(layer)

    fusing.base_weight = stop
    try:
        with suppress(KeyboardInterrupt):
            yield
    finally:
        fusing.base_weight = whole


def move(pipe, rng: random.Random) -> str:
    """One legal move by chance; returns what it was."""
    table = lb.list_adapters(pipe)
    fused, free = (
        [row.name for row in table if row.fused],
        [row.name for row in table if not row.fused],
    )
    missing = [name for name in ADAPTERS if name not in fused + free]
    on_free = ["scale", "fuse", "fuse", "fuse", "swap", "remove"] * bool(free)
    kind = rng.choice(
        ["load"] * bool(missing) + on_free + ["unfuse", "unfuse", "interrupt"] * bool(fused)
    )
    if kind == "load":
        lb.load_adapter(pipe, rng.choice(missing))
    elif kind == "unfuse":
        lb.unfuse(pipe, rng.choice(fused))
    elif kind == "interrupt":
        with interrupted(rng.randrange(1200)):
            lb.unfuse(pipe, rng.choice(fused))
            lb.fuse(
                pipe,
                dict.fromkeys((row.name for row in lb.list_adapters(pipe) if not row.fused), 0.7),
            )
    elif kind == "scale":
        lb.set_scales(pipe, {rng.choice(free): rng.choice(SCALES)})
    elif kind == "fuse":
        chosen = rng.sample(free, rng.randint(1, len(free)))
        lb.fuse(
            pipe,
            {name: rng.choice(SCALES) for name in chosen},
            components=rng.choice([None, None, "unet"]),
        )
    elif kind == "swap":
        lb.swap_adapter(pipe, rng.choice(free), rng.choice(ADAPTERS))
    else:
        lb.remove_adapter(pipe, rng.choice(free))
    return kind


def main() -> None:
    """Run the sequences and print how many left the base as it was."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--sequences", type=int, default=1000)
    parser.add_argument("--moves", type=int, default=7)
    parser.add_argument("--dtype", choices=("float32", "float16", "bfloat16"), default="float32")
    told = parser.parse_args()
    pipe = lb.load_pipeline("tiny-sd", device="cpu", dtype=getattr(torch, told.dtype))
    start, equal, kinds, begun = lb.base_checksum(pipe), 0, Counter(), time.time()
    for seed in tqdm(range(told.sequences)):
        rng = random.Random(seed)
        kinds.update(move(pipe, rng) for _ in range(told.moves))
        if any(row.fused for row in lb.list_adapters(pipe)):
            lb.unfuse(pipe)
        lb.unload_adapters(pipe)
        equal += lb.base_checksum(pipe) == start
    print(
        f"{told.dtype}: {equal} of {told.sequences} sequences left the base bit-equal "
        f"({time.time() - begun:.0f} s)"
    )
    print(", ".join(f"{count} {kind}" for kind, count in kinds.most_common()))


if __name__ == "__main__":
    main()
