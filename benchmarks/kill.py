"""Does a run that was killed end in the same weights as one that was not, whenever it was killed?

A DreamBooth run with class images, text encoder, dropout, accumulation and cosine is killed (kill
-9) at seeded moments of its life, from the first line to the last, sometimes twice, resumed with
`latest`, and its weights and losses compared bit for bit.

    python benchmarks/kill.py [--moments 20]
"""

import argparse
import json
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from safetensors.torch import load_file

FLAGS = [
    "--pretrained_model_name_or_path=tiny-sd",
    "--instance_data_dir=subjects/patch_cat",
    "--rank=2",
    "--train_batch_size=2",
    "--max_train_steps=12",
    "--checkpointing_steps=2",
    "--checkpoints_total_limit=2",
    "--resume_from_checkpoint=latest",
    "--seed=5",
    "--lora_dropout=0.1",
    "--train_text_encoder",
    "--gradient_accumulation_steps=2",
    "--lr_scheduler=cosine",
    "--lr_warmup_steps=2",
    "--random_flip",
    "--with_prior_preservation",
    "--num_class_images=6",
    "--sample_batch_size=2",
    "--report_to=none",
]


def command(folder: Path) -> list[str]:
    """The command line of a run below a folder, with a cache and class images of its own."""
    return [
        sys.executable,
        "-m",
        "lorabook.training.dreambooth",
        *FLAGS,
        "--instance_prompt=a drawing of sks cat",
        "--class_prompt=a drawing of a cat",
        f"--class_data_dir={folder}/class",
        f"--output_dir={folder}/run",
        f"--cache_dir={folder}/cache",
    ]


def outcome(folder: Path) -> tuple[dict, list]:
    """The final weights, and the losses of all steps."""
    history = json.loads((folder / "run/checkpoint-12/history.json").read_text())
    return load_file(folder / "run/pytorch_lora_weights.safetensors"), [
        record["loss"] for record in history
    ]


def same(one: tuple[dict, list], other: tuple[dict, list]) -> bool:
    """Whether weights and losses are equal, bit for bit."""
    return (
        one[0].keys() == other[0].keys()
        and all(one[0][key].equal(other[0][key]) for key in one[0])
        and one[1] == other[1]
    )


def killed(folder: Path, moments: list[float]) -> int:
    """Run, kill at each moment, go on to the end; returns the steps done at the last kill."""
    for moment in moments:
        process = subprocess.Popen(
            command(folder), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        try:
            process.wait(moment)
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
            process.wait()
    steps = max(
        (int(path.name.split("-")[1]) for path in folder.glob("run/checkpoint-*")), default=0
    )
    subprocess.run(command(folder), check=True, capture_output=True)
    return steps


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--moments", type=int, default=20)
    count, rng, equal = parser.parse_args().moments, random.Random(0), 0
    with tempfile.TemporaryDirectory() as root:
        started = time.perf_counter()
        subprocess.run(command(Path(root, "whole")), check=True, capture_output=True)
        life = time.perf_counter() - started
        whole = outcome(Path(root, "whole"))
        print(f"a whole run takes {life:.1f} s")
        for number in range(count):
            folder, moments = Path(root, str(number)), [rng.uniform(0.3, 1.0) * life]
            moments += [rng.uniform(0.3, 0.8) * life] * (number % 4 == 0)
            steps = killed(folder, moments)
            good = same(whole, outcome(folder))
            equal += good
            print(
                f"killed after {' and '.join(f'{m:.1f}' for m in moments)} s with "
                f"{steps} steps saved: {'equal' if good else 'DIFFERENT'}",
                flush=True,
            )
            shutil.rmtree(folder)
    print(f"{equal} of {count} equal bit for bit")
    sys.exit(equal != count)
