import dataclasses
import subprocess
import sys

from PIL import Image

from lorabook import __main__, worlds


def test_the_demo_trains_and_draws(tmp_path, monkeypatch, capsys):
    short = dataclasses.replace(worlds.BUNDLED, max_train_steps=2, train_batch_size=2, num_inference_steps=1)
    monkeypatch.setattr(worlds, "BUNDLED", short)
    __main__.demo(tmp_path / "demo.png", tmp_path / "lora")
    assert Image.open(tmp_path / "demo.png").width > 5 * 128
    assert (tmp_path / "lora/pytorch_lora_weights.safetensors").is_file()
    assert "validation loss" in capsys.readouterr().out


def test_an_output_that_cannot_be_written_ends_before_training(tmp_path):
    for output in (tmp_path, tmp_path / "nowhere" / "x.png"):
        done = subprocess.run([sys.executable, "-m", "lorabook", "demo", f"--output={output}"], capture_output=True,
                              text=True)
        assert done.returncode == 2 and done.stderr.startswith("error: output") and done.stderr.count("\n") == 1


def test_unknown_and_abbreviated_arguments_are_errors():
    for arguments in (["dance"], ["demo", "--outp=x"]):
        done = subprocess.run([sys.executable, "-m", "lorabook", *arguments], capture_output=True, text=True)
        assert done.returncode == 2 and done.stderr.startswith("error:") and done.stderr.count("\n") == 1
