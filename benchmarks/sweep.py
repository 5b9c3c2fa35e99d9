"""How much faster is a sweep of scales in one denoising pass than one call after another?

python benchmarks/sweep.py [--adapter creatures] [--rounds 3]
"""

import argparse
import statistics
import time

import numpy as np
import torch

import lorabook as lb
from lorabook.sweeps.batched import Passes
from lorabook.sweeps.cells import Cell, Present
from lorabook.worlds import world


def one_by_one(pipe, adapter: str, scales: list[float], prompt: str, **call) -> list:
    """An ordinary call for each scale."""
    images = []
    for scale in scales:
        lb.set_scales(pipe, {adapter: scale})
        images.append(
            pipe(prompt, generator=torch.Generator("cpu").manual_seed(0), **call).images[0]
        )
    return images


def in_one_pass(pipe, adapter: str, scales: list[float], prompt: str, **call) -> np.ndarray:
    """The same pictures as numbers from 0 to 1, as the VAE gives them."""
    fixed = {"prompt": prompt, "seed": 0, **call}
    cells = [Cell(fixed).with_scales(pipe, adapter, scale, whole=True) for scale in scales]
    return np.asarray(Passes(pipe, Present.of(pipe), {"output_type": "np"}).generate_pass(cells))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--adapter", default="creatures")
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    here, pipe = world(), lb.load_pipeline()
    pipe.set_progress_bar_config(disable=True)
    lb.load_adapter(pipe, args.adapter, "it")
    call = {"num_inference_steps": here.num_inference_steps, "guidance_scale": here.guidance_scale}
    print(
        f"{here.model}, {args.adapter}, {call['num_inference_steps']} steps, "
        f"{torch.get_num_threads()} threads"
    )
    print(
        f"{'scales':>6} {'one by one':>11} {'in one pass':>12} {'faster':>7} "
        f"{'largest difference':>19}"
    )
    for count in (6, 24):
        scales = [round(-0.25 + 1.75 * i / (count - 1), 3) for i in range(count)]
        slow, quick = [], []
        for _ in range(args.rounds):
            start = time.perf_counter()
            one_by_one(pipe, "it", scales, here.adapter_prompt, **call)
            slow.append(time.perf_counter() - start)
            start = time.perf_counter()
            lb.sweep(pipe, here.adapter_prompt, columns={"it": scales})
            quick.append(time.perf_counter() - start)
        plain = one_by_one(pipe, "it", scales, here.adapter_prompt, **call, output_type="np")
        worst = np.abs(
            np.asarray(plain) - in_one_pass(pipe, "it", scales, here.adapter_prompt, **call)
        ).max()
        before, after = statistics.median(slow), statistics.median(quick)
        print(f"{count:>6} {before:>10.2f}s {after:>11.2f}s {before / after:>6.1f}× {worst:>19.1e}")


if __name__ == "__main__":
    main()
