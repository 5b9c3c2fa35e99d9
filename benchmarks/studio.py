"""How long from a slider to the picture, and what 200 movements leave behind.

Measured from the moment a slider's value is set to the moment the new picture's bytes are there, on
two cores:

    OMP_NUM_THREADS=2 taskset -c 0,1 python benchmarks/studio.py [--rounds 30] [--adapter creatures]
"""

import argparse
import gc
import statistics
import threading
import time

import numpy as np
import psutil
import torch

import lorabook as lb
from lorabook.metrics import image_similarity
from lorabook.studio.generate import StudioGenerator, first_settings
from lorabook.sweeps.batched import generate_image
from lorabook.worlds import world

STEPS, ENOUGH = (2, 4, 5, 6, 8), 30
PROMPTS = ("a drawing of a red boat", "a drawing of a yellow dog on a sandy beach")


class Hand:
    """A person's hand on a block's slider, and their eye on the picture."""

    def __init__(self, studio: lb.ScaleStudio):
        studio.wait()
        self.studio, self.arrived = studio, []
        self.slider = find(studio.widget, "lorabook-block-up-1")
        find(studio.widget, "lorabook-now").observe(
            lambda _: self.arrived.append(time.perf_counter()), names="value"
        )

    def seconds(self, value: float) -> tuple[float, float]:
        """Move and wait; returns the seconds to the first new picture's bytes and to the last's."""
        self.arrived.clear()
        begun = time.perf_counter()
        self.slider.value = value
        self.studio.wait()
        return self.arrived[0] - begun, self.arrived[-1] - begun


def find(widget, kind: str):
    """The first widget of a DOM class in a box, or None."""
    if kind in getattr(widget, "_dom_classes", ()):
        return widget
    return next(
        (
            found
            for child in getattr(widget, "children", ())
            if (found := find(child, kind)) is not None
        ),
        None,
    )


def ordinary(studio: lb.ScaleStudio):
    """What a call of the pipeline draws now."""
    told = studio.settings
    return generate_image(
        studio.pipe,
        prompt=told.prompt,
        seed=told.seeds[0],
        guidance_scale=told.guidance_scale,
        num_inference_steps=told.num_inference_steps,
    )


def measure_times(hand: Hand, rounds: int) -> None:
    """Print the median times, and how they stand to an ordinary call of as many steps."""
    for value in (0.1, 0.2, 0.3):
        hand.seconds(value)
    times = [hand.seconds(round(2 * i / rounds - 0.5, 3)) for i in range(rounds)]
    plain = []
    for _ in range(7):
        begun = time.perf_counter()
        ordinary(hand.studio)
        plain.append(time.perf_counter() - begun)
    call = statistics.median(plain)
    print(f"{'':16}{'median':>8} {'worst':>8} {'target':>8} {'of an ordinary call':>20}")
    for name, column, target in (("preview", 0, 0.15), ("full picture", 1, 0.35)):
        found = [time[column] for time in times]
        print(
            f"{name:16}{statistics.median(found):>7.3f}s {max(found):>7.3f}s {target:>7.2f}s "
            f"{statistics.median(found) / call:>20.2f}"
        )
    print(f"{'ordinary call':16}{call:>7.3f}s {max(plain):>7.3f}s {'':>8} {1:>20.2f}")


def measure_likeness(pipe) -> None:
    """Print how alike pictures of few steps and of many are."""
    prompts, alike, painter = (
        (*world("bundled").prompts, *PROMPTS),
        {steps: [] for steps in STEPS},
        StudioGenerator(pipe),
    )
    for prompt in prompts:
        settings = first_settings(pipe, prompt, seeds=range(4))
        best = painter.generate(settings.with_(num_inference_steps=ENOUGH)).images
        for steps in STEPS:
            images = painter.generate(settings.with_(num_inference_steps=steps)).images
            alike[steps] += image_similarity(images, best, model="tiny-clip").diagonal().tolist()
    print(
        f"\n{'steps':>5} {f'similarity to {ENOUGH}':>17} {'median':>8} {'above 0.97':>11}   "
        f"({len(prompts)} prompts, 4 seeds)"
    )
    for steps, values in alike.items():
        print(
            f"{steps:>5} {statistics.mean(values):>17.3f} {statistics.median(values):>8.3f} "
            f"{sum(value > 0.97 for value in values) / len(values):>11.0%}"
        )


def measure_drag(hand: Hand, moves: int = 200, seconds: float = 20.0) -> None:
    """Print what a long drag leaves behind."""
    process = psutil.Process()
    gc.collect()
    memory, threads = process.memory_info().rss, process.num_threads()
    hand.arrived.clear()
    for i in range(moves):
        hand.slider.value = round(i / moves * 2, 3)
        time.sleep(seconds / moves)
    hand.studio.wait()
    time.sleep(0.5)
    gc.collect()
    own = sum(thread.name == "lorabook studio" for thread in threading.enumerate())
    apart = np.abs(
        np.asarray(hand.studio.picture, int) - np.asarray(ordinary(hand.studio), int)
    ).max()
    print(
        f"{moves} movements in {seconds:.0f} s: {len(hand.arrived)} pictures shown; memory "
        f"{(process.memory_info().rss - memory) / 1e6:+.1f} MB; {own} threads of the studio left, "
        f"{threads} in all before "
        f"and {process.num_threads()} after; the last picture is "
        f"{'right' if apart <= 1 else 'WRONG'}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--adapter", default="creatures")
    told = parser.parse_args()
    pipe = lb.load_pipeline("tiny-sd", device="cpu")
    lb.load_adapter(pipe, told.adapter)
    hand = Hand(lb.ScaleStudio(pipe))
    print(
        f"tiny-sd, {told.adapter}, {hand.studio.settings.num_inference_steps} steps, "
        f"{torch.get_num_threads()} threads"
    )
    measure_times(hand, told.rounds)
    print()
    for _ in range(3):  # the first still warms up
        measure_drag(hand)
    hand.studio.close()
    measure_likeness(pipe)


if __name__ == "__main__":
    main()
