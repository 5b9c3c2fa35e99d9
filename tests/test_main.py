import dataclasses
import subprocess
import sys

from PIL import Image
from safetensors.torch import load_file

from lorabook import __main__, worlds


def test_the_demo_trains_and_draws(tmp_path, monkeypatch, capsys):
    short = dataclasses.replace(
        worlds.BUNDLED, max_train_steps=2, train_batch_size=2, num_inference_steps=1
    )
    monkeypatch.setattr(worlds, "BUNDLED", short)
    __main__.demo(tmp_path / "demo.png", tmp_path / "lora")
    assert Image.open(tmp_path / "demo.png").width > 5 * 128
    assert (tmp_path / "lora/pytorch_lora_weights.safetensors").is_file()
    assert "validation loss" in capsys.readouterr().out


def test_an_output_that_cannot_be_written_ends_before_training(tmp_path):
    for output in (tmp_path, tmp_path / "nowhere" / "x.png"):
        done = subprocess.run(
            [sys.executable, "-m", "lorabook", "demo", f"--output={output}"],
            capture_output=True,
            text=True,
        )
        assert (
            done.returncode == 2
            and done.stderr.startswith("error: output")
            and done.stderr.count("\n") == 1
        )


def test_unknown_and_abbreviated_arguments_are_errors():
    for arguments in (["dance"], ["demo", "--outp=x"]):
        done = subprocess.run(
            [sys.executable, "-m", "lorabook", *arguments], capture_output=True, text=True
        )
        assert (
            done.returncode == 2
            and done.stderr.startswith("error:")
            and done.stderr.count("\n") == 1
        )


def lorabook(*arguments):
    return subprocess.run(
        [sys.executable, "-m", "lorabook", *map(str, arguments)], capture_output=True, text=True
    )


def test_inspect_says_what_is_in_a_file_and_draws_it(tmp_path):
    done = lorabook("inspect", "ink", "--picture", tmp_path / "ink.png")
    assert done.returncode == 0 and "rank" in done.stdout and "up.1" in done.stdout
    assert Image.open(tmp_path / "ink.png").width > 300


def test_convert_writes_the_form_that_was_asked_for(tmp_path):
    done = lorabook("convert", "ink", tmp_path / "ink.safetensors", "--format", "kohya")
    assert done.returncode == 0 and "kohya" in done.stdout
    assert any(key.startswith("lora_unet_") for key in load_file(tmp_path / "ink.safetensors"))


def test_convert_tells_what_a_smaller_rank_costs(tmp_path):
    assert "% off its ΔW" in lorabook("convert", "ink", tmp_path / "small", "--rank", 2).stdout


def test_a_command_that_fails_says_so_in_one_line(tmp_path):
    (tmp_path / "old.bin").write_bytes(b"pickle")
    for arguments in (["inspect", "nothing"], ["convert", tmp_path / "old.bin", tmp_path / "new"]):
        done = lorabook(*arguments)
        assert (
            done.returncode == 2
            and done.stderr.startswith("error: ")
            and done.stderr.count("\n") == 1
        )
