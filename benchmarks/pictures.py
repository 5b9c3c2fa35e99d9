"""What does a picture cost, and a sweep beside plain calls of the pipeline? Prints seconds and "
"their ratio."""

import time
from functools import partial
from statistics import median

import torch

import lorabook as lb

PROMPT = "a red cat on a green field"


def seconds(generate, rounds: int = 5) -> float:
    """Median time of one call, after one to warm up."""
    generate()
    times = []
    for _ in range(rounds):
        started = time.perf_counter()
        generate()
        times.append(time.perf_counter() - started)
    return median(times)


if __name__ == "__main__":
    pipe = lb.load_pipeline("tiny-sd", device="cpu")
    pipe.set_progress_bar_config(disable=True)
    print(f"{'steps':>6}{'one call':>10}{'sweep of 4':>12}{'ratio to 4 calls':>18}")
    for steps in (4, 8, 15, 30):
        call = {"num_inference_steps": steps, "guidance_scale": 4.0}
        generator = torch.Generator()
        one = seconds(partial(pipe, PROMPT, generator=generator.manual_seed(0), **call))
        grid = partial(
            lb.sweep, pipe, PROMPT, columns={"seed": range(4)}, num_inference_steps=steps
        )
        four = seconds(grid, rounds=3)
        print(f"{steps:>6}{one:>9.3f}s{four:>11.3f}s{four / (4 * one):>18.2f}")
