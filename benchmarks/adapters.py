"""What do loading, scaling, fusing and swapping an adapter cost?

tiny-sd on this machine, medians. Loading is set against diffusers' own, a fused UNet against one
with its adapter on and against the base, swapping against removing and loading anew.

    python benchmarks/adapters.py
"""

import statistics
import time

import torch

import lorabook as lb

FULL = {
    "unet": {
        "down": {f"block_{i}": [0.5, 0.6] for i in range(4)},
        "mid": [0.7, 0.8],
        "up": {f"block_{i}": [0.4, 0.8, 1.0] for i in range(4)},
        "cross-attention": 0.9,
        "*.to_k": 0.95,
    },
    "text_encoder": {"layer_0": 0.5, "feed-forward": 0.2},
}


def median(call, rounds: int = 7, after=None) -> float:
    """Seconds that a call takes; `after` undoes it between rounds, untimed."""
    found = []
    for _ in range(rounds):
        begun = time.perf_counter()
        call()
        found.append(time.perf_counter() - begun)
        if after:
            after()
    return statistics.median(found)


@torch.no_grad()
def unet_time(pipe, rounds: int = 30) -> float:
    """Seconds of one UNet forward with guidance's batch of two."""
    config = pipe.unet.config
    inputs = (
        torch.randn(2, config.in_channels, config.sample_size, config.sample_size),
        torch.tensor(500),
        torch.randn(2, 77, config.cross_attention_dim),
    )
    pipe.unet(*inputs)
    return median(lambda: pipe.unet(*inputs), rounds)


def main() -> None:
    """Measure and print."""
    pipe = lb.load_pipeline("tiny-sd", device="cpu")
    folder = lb.bundled("adapters/creatures")
    ours = median(
        lambda: lb.load_adapter(pipe, "creatures"), after=lambda: lb.unload_adapters(pipe)
    )
    theirs = median(
        lambda: pipe.load_lora_weights(folder, adapter_name="creatures"),
        after=pipe.unload_lora_weights,
    )
    print(
        f"load (279 layers, rank 16): {ours * 1e3:.0f} ms; diffusers' own load "
        f"{theirs * 1e3:.0f} ms"
    )

    base = unet_time(pipe)
    lb.load_adapter(pipe, "patch_cat")
    lb.load_adapter(pipe, "creatures")
    number = median(lambda: lb.set_scales(pipe, {"creatures": 0.5}), 30)
    full = median(lambda: lb.set_scales(pipe, {"patch_cat": FULL}), 30)
    print(
        f"set_scales: a number {number * 1e3:.1f} ms, a full dictionary (blocks, kinds, globs, "
        f"text encoder) {full * 1e3:.1f} ms"
    )

    lb.remove_adapter(pipe, "patch_cat")
    on = unet_time(pipe)
    fuse = median(lambda: lb.fuse(pipe), 5, after=lambda: lb.unfuse(pipe))
    lb.fuse(pipe)
    fused = unet_time(pipe)
    begun = time.perf_counter()
    lb.unfuse(pipe)
    unfuse = time.perf_counter() - begun
    print(
        f"UNet forward: base {base * 1e3:.1f} ms, adapter on {on * 1e3:.1f} ms "
        f"({on / base:.2f} of the base), fused {fused * 1e3:.1f} ms ({fused / base:.2f}); "
        f"fused is {on / fused:.2f} times as fast as on"
    )
    print(f"fuse {fuse * 1e3:.0f} ms, unfuse {unfuse * 1e3:.0f} ms")

    swap = median(lambda: lb.swap_adapter(pipe, "creatures", "ink"))

    def anew():
        lb.remove_adapter(pipe, "creatures")
        lb.load_adapter(pipe, "ink", "creatures")

    reload = median(anew)
    print(
        f"swap in place {swap * 1e3:.0f} ms, remove and load anew {reload * 1e3:.0f} ms "
        f"({reload / swap:.1f} times)"
    )


if __name__ == "__main__":
    main()
