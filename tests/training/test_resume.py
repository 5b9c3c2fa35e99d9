"""Runs that are killed from outside, and the command lines of diffusers' documentation."""

import os
import signal
import subprocess
import sys
import time

import torch
from safetensors.torch import load_file

from loopback_hub import TOKEN, LoopbackHub
from lorabook.worlds import DATA

ALONE = os.environ | {"OMP_NUM_THREADS": "1"}


def weights(folder):
    return load_file(folder / "pytorch_lora_weights.safetensors")


def largest_difference(one, other):
    assert one.keys() == other.keys()
    return max((one[key] - other[key]).abs().max().item() for key in one)


def dreambooth(folder, *flags):
    return [
        sys.executable,
        "-m",
        "lorabook.training.dreambooth",
        "--pretrained_model_name_or_path=tiny-sd",
        "--rank=2",
        "--instance_data_dir=subjects/patch_cat",
        "--instance_prompt=a drawing of sks cat",
        "--train_batch_size=2",
        "--max_train_steps=8",
        "--checkpointing_steps=2",
        "--resume_from_checkpoint=latest",
        "--seed=5",
        "--train_text_encoder",
        "--lora_dropout=0.1",
        "--report_to=none",
        f"--output_dir={folder}",
        *flags,
    ]


def test_a_run_killed_after_a_checkpoint_ends_in_the_same_weights(tmp_path):
    subprocess.run(dreambooth(tmp_path / "whole"), check=True, capture_output=True, env=ALONE)
    process = subprocess.Popen(
        dreambooth(tmp_path / "killed"),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env=ALONE,
    )
    while process.poll() is None and not (tmp_path / "killed/checkpoint-4").exists():
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "killed/pytorch_lora_weights.safetensors").exists()
    subprocess.run(dreambooth(tmp_path / "killed"), check=True, capture_output=True, env=ALONE)
    one, other = weights(tmp_path / "whole"), weights(tmp_path / "killed")
    assert all(torch.equal(one[key], other[key]) for key in one)


def test_an_interrupt_on_the_terminal_saves_and_says_how_far_it_came(tmp_path):
    process = subprocess.Popen(
        dreambooth(tmp_path / "run", "--max_train_steps=2000"),
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        env=ALONE,
    )
    while process.poll() is None and not (tmp_path / "run/checkpoint-2").exists():
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    told = process.communicate()[0]
    assert process.returncode == 130 and "stopped: " in told
    assert (tmp_path / "run/pytorch_lora_weights.safetensors").is_file()


def test_the_documentations_text_to_image_command_runs(tmp_path):
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "accelerate.commands.launch",
            "--mixed_precision=fp16",
            "-m",
            "lorabook.training.text_to_image",
            f"--pretrained_model_name_or_path={DATA / 'tiny-sd'}",
            f"--dataset_name={DATA / 'creatures'}",
            "--dataloader_num_workers=8",
            "--resolution=64",
            "--center_crop",
            "--random_flip",
            "--train_batch_size=1",
            "--gradient_accumulation_steps=4",
            "--max_train_steps=4",
            "--learning_rate=1e-04",
            "--max_grad_norm=1",
            "--lr_scheduler=cosine",
            "--lr_warmup_steps=0",
            f"--output_dir={tmp_path}/out",
            "--report_to=wandb",
            "--checkpointing_steps=2",
            "--validation_prompt=A pokemon with blue eyes.",
            "--seed=1337",
        ],
        capture_output=True,
        text=True,
        env=os.environ | {"WANDB_MODE": "offline"},
    )
    assert done.returncode == 0, done.stderr
    assert "4 steps in" in done.stdout and (tmp_path / "out/checkpoint-2").is_dir()
    assert len(list((tmp_path / "out/validation").glob("step-000004*.png"))) == 4


def test_the_documentations_dreambooth_command_runs(tmp_path):
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "accelerate.commands.launch",
            "-m",
            "lorabook.training.dreambooth",
            f"--pretrained_model_name_or_path={DATA / 'tiny-sd'}",
            f"--instance_data_dir={DATA / 'subjects/patch_cat'}",
            f"--output_dir={tmp_path}/out",
            "--instance_prompt=a photo of sks dog",
            "--resolution=64",
            "--train_batch_size=1",
            "--gradient_accumulation_steps=1",
            "--checkpointing_steps=2",
            "--learning_rate=1e-4",
            "--report_to=wandb",
            "--lr_scheduler=constant",
            "--lr_warmup_steps=0",
            "--max_train_steps=4",
            "--validation_prompt=A photo of sks dog in a bucket",
            "--validation_epochs=50",
            "--seed=0",
        ],
        capture_output=True,
        text=True,
        env=os.environ | {"WANDB_MODE": "offline"},
    )
    assert done.returncode == 0, done.stderr
    assert (
        "4 steps in" in done.stdout
        and (tmp_path / "out/pytorch_lora_weights.safetensors").is_file()
    )


def test_two_processes_make_the_adapter_of_one_with_the_same_global_batch(tmp_path):
    told = [
        "--no_cache_latents",
        "--random_flip",
        "--with_prior_preservation",
        "--class_prompt=a drawing of a cat",
        "--num_class_images=3",
        f"--class_data_dir={tmp_path}/class",
        "--validation_prompt=a cat",
        "--learning_rate=1e-3",
        "--num_validation_images=1",
        "--lora_dropout=0.0",
        "--max_train_steps=3",
    ]
    subprocess.run(dreambooth(tmp_path / "one", *told), check=True, capture_output=True, env=ALONE)
    command = dreambooth(tmp_path / "two", *told, "--train_batch_size=1")
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--standalone",
            "--nproc_per_node=2",
            *command[1:],
        ],
        capture_output=True,
        text=True,
        timeout=300,
        env=ALONE | {"ACCELERATE_USE_CPU": "true"},
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("3 steps in") == 1
    one, two = weights(tmp_path / "one"), weights(tmp_path / "two")
    moved = max(value.abs().max().item() for key, value in one.items() if "lora_B" in key)
    assert moved > 1e-3 and largest_difference(one, two) < 0.02 * moved


def test_a_run_pushes_its_adapter_and_its_pictures(tmp_path):
    with LoopbackHub() as hub:
        done = subprocess.run(
            dreambooth(
                tmp_path / "pushed",
                "--push_to_hub",
                "--max_train_steps=2",
                "--validation_prompt=a sks cat",
                "--num_validation_images=1",
            ),
            capture_output=True,
            text=True,
            env=ALONE
            | {"HF_ENDPOINT": hub.url, "HF_TOKEN": TOKEN, "HF_HOME": str(tmp_path / "hub")},
        )
        assert done.returncode == 0, done.stderr
        assert f"pushed to {hub.url}" in done.stdout and TOKEN not in done.stdout + done.stderr
        files = next(iter(hub.repos.values()))
    assert {"pytorch_lora_weights.safetensors", "README.md", "images/grid.png"} <= set(files)
    assert (
        files["pytorch_lora_weights.safetensors"]
        == (tmp_path / "pushed/pytorch_lora_weights.safetensors").read_bytes()
    )
