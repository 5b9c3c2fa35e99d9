import subprocess
import sys

import pytest
import torch

import lorabook as lb
from conftest import quick_config, quick_dreambooth
from lorabook.training.setup import close, set_up


def test_a_launchers_fp16_becomes_float32_on_the_cpu_and_says_so(monkeypatch):
    if torch.cuda.is_available():
        pytest.skip("a GPU takes fp16")
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "fp16")
    with pytest.warns(
        UserWarning, match="the launcher asks for mixed precision fp16.*training in float32"
    ):
        setup = set_up(quick_config())
    assert setup.dtype == torch.float32
    close(setup)


def test_a_tokenizer_and_a_vae_of_ones_own_are_used(tmp_path):
    pipe = lb.load_pipeline("tiny-sd", device="cpu")
    with torch.no_grad():
        pipe.vae.decoder.conv_out.bias.fill_(3.0)
    pipe.vae.save_pretrained(tmp_path / "vae")
    pipe.tokenizer.save_pretrained(tmp_path / "tokenizer")
    setup = set_up(
        quick_dreambooth(
            pretrained_vae_model_name_or_path=str(tmp_path / "vae"),
            tokenizer_max_length=20,
            tokenizer_name=str(tmp_path / "tokenizer"),
            text_encoder_use_attention_mask=True,
        )
    )
    assert (setup.family.pipe.vae.decoder.conv_out.bias == 3).all()
    assert setup.family.encode_prompts(["a red cat"])[0].shape[1] == 20
    close(setup)


def test_flags_that_need_what_is_not_here_say_so(tmp_path):
    with pytest.warns(UserWarning, match="xformers_memory_efficient_attention has no effect, it"):
        close(set_up(quick_config(enable_xformers_memory_efficient_attention=True)))
    with pytest.warns(UserWarning, match="local_rank has no effect"):
        close(set_up(quick_config(local_rank=0)))


def test_a_push_without_a_token_ends_before_anything_is_loaded(tmp_path, monkeypatch):
    monkeypatch.setattr("lorabook.hub.find_token", lambda token=None: None)
    with pytest.raises(ValueError, match="no token for the Hub; set HF_TOKEN"):
        lb.train_text_to_image(quick_config(push_to_hub=True, output_dir=str(tmp_path / "out")))
    assert not (tmp_path / "out").exists()


def test_a_random_seed_is_told_so_that_the_command_repeats_the_run(tmp_path):
    run = lb.train_text_to_image(
        quick_config(seed=None, output_dir=str(tmp_path), max_train_steps=1)
    )
    assert "--seed=" in run.command and "--max_train_steps=1" in run.command


def test_one_process_where_two_were_asked_for_says_so(tmp_path):
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "accelerate.commands.launch",
            "--cpu",
            "--num_processes",
            "2",
            "-m",
            "lorabook.training.text_to_image",
            "--pretrained_model_name_or_path=tiny-sd",
            "--dataset_name=creatures",
            "--max_train_samples=4",
            "--max_train_steps=1",
            "--train_batch_size=2",
            f"--output_dir={tmp_path}/cli",
            "--report_to=none",
        ],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert "2 processes were asked for and one runs" in done.stderr and "torchrun" in done.stderr


def test_nothing_is_left_of_the_accelerator():
    from accelerate.state import AcceleratorState, PartialState

    close(set_up(quick_config()))
    assert not AcceleratorState._shared_state and not PartialState._shared_state
