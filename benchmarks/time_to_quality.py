"""How soon does a run with our settings reach what the reference's defaults reach in 400 steps?

Both learn the bundled creatures on tiny-sd, with the same images kept out; the measure is the
validation loss at fixed noise. Seconds count training alone. Ours: the settings of notebook 02.
Reference: the defaults of diffusers' train_text_to_image_lora.py. Then: two processes of one thread
over one process of one thread.

    python benchmarks/time_to_quality.py [--seeds 0 1 2] [--picture time_to_quality.png]
"""

import argparse
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from matplotlib.figure import Figure

import lorabook as lb
from lorabook.show.plots import BLUE, ORANGE, Plot
from lorabook.training import callbacks as watch

SHARED = dict(
    pretrained_model_name_or_path="tiny-sd",
    dataset_name="creatures",
    validation_split=0.1,
    report_to="none",
)
WORLD = lb.world("bundled")
WAYS = {
    "reference defaults": dict(max_train_steps=400),
    "notebook 02": dict(
        rank=WORLD.rank,
        target=WORLD.target,
        learning_rate=WORLD.learning_rate,
        lr_scheduler="cosine",
        lr_warmup_steps=20,
        train_batch_size=WORLD.train_batch_size,
        max_train_steps=WORLD.max_train_steps,
    ),
    "notebook 02, rate 1e-4": dict(
        rank=WORLD.rank,
        target=WORLD.target,
        lr_scheduler="cosine",
        lr_warmup_steps=20,
        train_batch_size=WORLD.train_batch_size,
        max_train_steps=WORLD.max_train_steps,
    ),
    "notebook 02, attention alone": dict(
        rank=WORLD.rank,
        learning_rate=WORLD.learning_rate,
        lr_scheduler="cosine",
        lr_warmup_steps=20,
        train_batch_size=WORLD.train_batch_size,
        max_train_steps=WORLD.max_train_steps,
    ),
    "notebook 02, batch 16": dict(
        rank=WORLD.rank,
        target=WORLD.target,
        learning_rate=WORLD.learning_rate,
        lr_scheduler="cosine",
        lr_warmup_steps=20,
        max_train_steps=WORLD.max_train_steps // 2,
    ),
}


def curve(told: dict, seed: int) -> list[tuple[float, float]]:
    """Seconds of training and the validation loss then."""
    with tempfile.TemporaryDirectory() as folder:
        run = lb.train_text_to_image(
            lb.TextToImageConfig(**SHARED, **told, seed=seed, output_dir=folder)
        )
    seconds, points = 0.0, []
    for record in run.history:
        seconds += record.get("seconds", 0)
        if "validation_loss" in record:
            points.append((seconds, record["validation_loss"]))
    return points


def seconds_until(points: list[tuple[float, float]], loss: float) -> float:
    """When a curve first reaches a loss, linear between its points; infinite if it never does."""
    for (before, high), (after, low) in zip(points, points[1:], strict=False):
        if low <= loss:
            return (
                before + (after - before) * (high - loss) / (high - low) if high > loss else before
            )
    return float("inf")


def images_a_second(processes: int) -> float:
    """Throughput of training by processes of one thread each, four images a process and step."""
    with tempfile.TemporaryDirectory() as folder:
        script = (
            "import lorabook as lb\nrun = "
            "lb.train_text_to_image(lb.TextToImageConfig(pretrained_model_name_or_path="
            "'tiny-sd', dataset_name='creatures', rank=16, target='all', train_batch_size=4, "
            "max_train_steps=45,"
            f"report_to='none', seed=0, checkpointing_steps=1000, output_dir={folder!r}))\n"
            "print('seconds', sum(r['seconds'] for r in run.history[5:]), flush=True)"
        )
        Path(folder, "one.py").write_text(script)
        done = subprocess.run(
            [
                sys.executable,
                "-m",
                "torch.distributed.run",
                "--standalone",
                "--nproc_per_node",
                str(processes),
                f"{folder}/one.py",
            ],
            capture_output=True,
            text=True,
            check=True,
            env=os.environ | {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"},
        )
    seconds = max(
        float(line.split()[1]) for line in done.stdout.splitlines() if line.startswith("seconds")
    )
    return 40 * 4 * processes / seconds


def picture(curves: dict[str, list]) -> Plot:
    """Validation loss against seconds, a line a seed."""
    figure = Figure(figsize=(7, 3.5))
    axes = figure.subplots()
    for (way, runs), color in zip(list(curves.items())[:2], (BLUE, ORANGE), strict=True):
        for number, points in enumerate(runs):
            axes.plot(
                *zip(*points, strict=True),
                color=color,
                marker=".",
                label=way if number == 0 else None,
            )
    axes.set(
        xlabel="seconds of training, two cores",
        ylabel="validation loss, fixed noise",
        ylim=(0, None),
    )
    axes.legend(frameon=False)
    return Plot(figure, "Validation loss against seconds, by settings.")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--picture", type=Path)
    told = parser.parse_args()
    watch.CHECKS = 20  # points of a curve
    curves, goal = {}, {}
    print(
        f"{'settings':<30}{'seed':>5}{'loss at the end':>17}{'goal':>8}"
        f"{'seconds to it':>15}{'of reference':>14}"
    )
    for way, settings in WAYS.items():
        for seed in told.seeds if len(curves) < 2 else told.seeds[:1]:
            points = curve(settings, seed)
            curves.setdefault(way, []).append(points)
            goal.setdefault(seed, points[-1])
            needed = seconds_until(points, goal[seed][1])
            print(
                f"{way:<30}{seed:>5}{points[-1][1]:>17.3f}{goal[seed][1]:>8.3f}{needed:>15.1f}"
                f"{needed / goal[seed][0]:>14.2f}",
                flush=True,
            )
    if told.picture:
        picture(curves).save(told.picture)
    one, two = images_a_second(1), images_a_second(2)
    print(
        f"one process of one thread {one:.1f} images a second, two {two:.1f}: {two / one:.2f} times"
    )
