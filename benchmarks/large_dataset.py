"""Does training take the same memory and time a step however many images there are?

Generated images, learned from for 60 steps, each size in a process of its own, after a run that
fills the cache. Told are peak memory of the training run (its own, and with the pages of mapped
files that the system may take back at will) and the median time of a step.

    python benchmarks/large_dataset.py [--sizes 100 1000 10000 50000]
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from statistics import median

import numpy as np
from PIL import Image

import lorabook as lb


def generate(folder: Path, count: int) -> None:
    """Write `count` different pictures of 64 x 64 with captions of a few hundred kinds."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    with open(folder / "metadata.jsonl", "w") as metadata:
        for number in range(count):
            colors = rng.integers(0, 255, (4, 4, 3), dtype=np.uint8)
            Image.fromarray(colors).resize((64, 64), Image.NEAREST).save(
                folder / f"{number:05}.png"
            )
            metadata.write(
                json.dumps(
                    {"file_name": f"{number:05}.png", "text": f"tiles of pattern {number % 300}"}
                )
                + "\n"
            )


def memory() -> tuple[float, float]:
    """Mebibytes in use now: this process's own, and all that is resident."""
    lines = dict(line.split(":") for line in Path("/proc/self/status").read_text().splitlines())
    return tuple(int(lines[name].split()[0]) / 1024 for name in ("RssAnon", "VmRSS"))


def measure(folder: str, steps: int) -> dict:
    """Train, watching the memory from the first step on."""
    peaks, done = [], threading.Event()

    def watch():
        while not done.wait(0.2):
            peaks.append(memory())

    threading.Thread(target=watch, daemon=True).start()
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as output:
        run = lb.train_text_to_image(
            lb.TextToImageConfig(
                pretrained_model_name_or_path="tiny-sd",
                train_data_dir=folder,
                train_batch_size=8,
                max_train_steps=steps,
                seed=0,
                report_to="none",
                output_dir=output,
                cache_dir=f"{folder}-cache",
            )
        )
    done.set()
    seconds = [record["seconds"] for record in run.history[5:]]
    return {
        "own": max(own for own, _ in peaks),
        "all": max(resident for _, resident in peaks),
        "step": median(seconds),
        "before": time.perf_counter() - started - sum(r["seconds"] for r in run.history),
    }


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sizes", type=int, nargs="+", default=[100, 1000, 10000, 50000])
    parser.add_argument("--measure", nargs=2, help="folder, steps")
    told = parser.parse_args()
    if told.measure:
        print(json.dumps(measure(told.measure[0], int(told.measure[1]))))
        sys.exit()
    print(
        f"{'images':>8}{'own MiB':>9}{'resident MiB':>14}{'s a step':>10}{'first time: own':>17}"
        f"{'s before step 1':>17}{'then':>8}"
    )
    with tempfile.TemporaryDirectory() as root:
        for size in told.sizes:
            folder = Path(root, str(size))
            generate(folder, size)
            first, again = (
                json.loads(
                    subprocess.run(
                        [sys.executable, __file__, "--measure", str(folder), str(steps)],
                        capture_output=True,
                        text=True,
                        check=True,
                        env=os.environ | {"HF_DATASETS_CACHE": f"{root}/hf"},
                    ).stdout.splitlines()[-1]
                )
                for steps in (10, 60)
            )
            print(
                f"{size:>8}{again['own']:>9.0f}{again['all']:>14.0f}{again['step']:>10.3f}{first['own']:>17.0f}"
                f"{first['before']:>17.1f}{again['before']:>8.1f}",
                flush=True,
            )
