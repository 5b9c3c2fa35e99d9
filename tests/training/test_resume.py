"""Runs that are killed from outside, and the command lines of diffusers' documentation."""

import os
import shlex
import signal
import subprocess
import sys
import time

import torch
from safetensors.torch import load_file

from loopback_hub import TOKEN, LoopbackHub
from lorabook.worlds import DATA

LAUNCH = "-m accelerate.commands.launch"
DREAMBOOTH = """-m lorabook.training.dreambooth --pretrained_model_name_or_path=tiny-sd --rank=2
    --instance_data_dir=subjects/patch_cat --instance_prompt='a drawing of sks cat'
    --train_batch_size=2 --max_train_steps=8 --checkpointing_steps=2 --seed=5 --train_text_encoder
    --resume_from_checkpoint=latest --lora_dropout=0.1 --report_to=none"""


def start(command, **environment):
    """Python with these arguments, on one thread."""
    return subprocess.Popen(
        [sys.executable, *shlex.split(command)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"} | environment,
    )


def run(command, **environment):
    """What it prints, after it came to a good end."""
    process = start(command, **environment)
    output, errors = process.communicate(timeout=600)
    assert process.returncode == 0, errors
    return output + errors


def wait_for(checkpoint, process):
    while process.poll() is None and not checkpoint.exists():
        time.sleep(0.01)


def weights(folder):
    return load_file(folder / "pytorch_lora_weights.safetensors")


def test_a_run_killed_after_a_checkpoint_ends_in_the_same_weights(tmp_path):
    run(f"{DREAMBOOTH} --output_dir={tmp_path}/whole")
    process = start(f"{DREAMBOOTH} --output_dir={tmp_path}/killed")
    wait_for(tmp_path / "killed/checkpoint-4", process)
    process.kill()
    process.wait()
    assert not (tmp_path / "killed/pytorch_lora_weights.safetensors").exists()
    run(f"{DREAMBOOTH} --output_dir={tmp_path}/killed")
    one, other = weights(tmp_path / "whole"), weights(tmp_path / "killed")
    assert all(torch.equal(one[key], other[key]) for key in one)


def test_an_interrupt_on_the_terminal_saves_and_says_how_far_it_came(tmp_path):
    process = start(f"{DREAMBOOTH} --output_dir={tmp_path}/run --max_train_steps=2000")
    wait_for(tmp_path / "run/checkpoint-2", process)
    process.send_signal(signal.SIGINT)
    output = process.communicate()[0]
    assert process.returncode == 130 and "stopped: " in output
    assert (tmp_path / "run/pytorch_lora_weights.safetensors").is_file()


def test_the_documentations_text_to_image_command_runs(tmp_path):
    output = run(
        f"""{LAUNCH} --mixed_precision=fp16 -m lorabook.training.text_to_image
        --pretrained_model_name_or_path={DATA}/tiny-sd --dataset_name={DATA}/creatures
        --dataloader_num_workers=8 --resolution=64 --center_crop --random_flip
        --train_batch_size=1 --gradient_accumulation_steps=4 --max_train_steps=4
        --learning_rate=1e-04 --max_grad_norm=1 --lr_scheduler=cosine --lr_warmup_steps=0
        --output_dir={tmp_path}/out --report_to=wandb --checkpointing_steps=2
        --validation_prompt='A pokemon with blue eyes.' --seed=1337""",
        WANDB_MODE="offline",
    )
    assert "4 steps in" in output and (tmp_path / "out/checkpoint-2").is_dir()
    assert len(list((tmp_path / "out/validation").glob("step-000004*.png"))) == 4


def test_the_documentations_dreambooth_command_runs(tmp_path):
    output = run(
        f"""{LAUNCH} -m lorabook.training.dreambooth
        --pretrained_model_name_or_path={DATA}/tiny-sd
        --instance_data_dir={DATA}/subjects/patch_cat --output_dir={tmp_path}/out
        --instance_prompt='a photo of sks dog' --resolution=64 --train_batch_size=1
        --gradient_accumulation_steps=1 --checkpointing_steps=2 --learning_rate=1e-4
        --report_to=wandb --lr_scheduler=constant --lr_warmup_steps=0 --max_train_steps=4
        --validation_prompt='A photo of sks dog in a bucket' --validation_epochs=50 --seed=0""",
        WANDB_MODE="offline",
    )
    assert "4 steps in" in output
    assert (tmp_path / "out/pytorch_lora_weights.safetensors").is_file()


def test_two_processes_make_the_adapter_of_one_with_the_same_global_batch(tmp_path):
    command = f"""{DREAMBOOTH} --no_cache_latents --random_flip --with_prior_preservation
        --class_prompt='a drawing of a cat' --num_class_images=3
        --class_data_dir={tmp_path}/class --validation_prompt='a cat' --learning_rate=1e-3
        --num_validation_images=1 --lora_dropout=0.0 --max_train_steps=3"""
    run(f"{command} --output_dir={tmp_path}/one")
    output = run(
        f"-m torch.distributed.run --standalone --nproc_per_node=2 {command} "
        f"--output_dir={tmp_path}/two --train_batch_size=1",
        ACCELERATE_USE_CPU="true",
    )
    assert output.count("3 steps in") == 1
    one, two = weights(tmp_path / "one"), weights(tmp_path / "two")
    moved = max(value.abs().max().item() for key, value in one.items() if "lora_B" in key)
    assert one.keys() == two.keys() and moved > 1e-3
    assert max((one[key] - two[key]).abs().max().item() for key in one) < 0.02 * moved


def test_a_run_pushes_its_adapter_and_its_pictures(tmp_path):
    with LoopbackHub() as hub:
        output = run(
            f"""{DREAMBOOTH} --push_to_hub --max_train_steps=2 --validation_prompt='a sks cat'
            --num_validation_images=1 --output_dir={tmp_path}/pushed""",
            HF_ENDPOINT=hub.url,
            HF_TOKEN=TOKEN,
            HF_HOME=str(tmp_path / "hub"),
        )
        assert f"pushed to {hub.url}" in output and TOKEN not in output
        files = next(iter(hub.repos.values()))
    assert {"pytorch_lora_weights.safetensors", "README.md", "images/grid.png"} <= set(files)
    adapter = tmp_path / "pushed/pytorch_lora_weights.safetensors"
    assert files["pytorch_lora_weights.safetensors"] == adapter.read_bytes()
