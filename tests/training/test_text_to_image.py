import json
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

import lorabook as lb
from conftest import quick_config, quick_train
from lorabook.training.run import split


def test_a_run_returns_its_adapter_and_history(quick_run):
    assert (
        quick_run.adapter.name == "pytorch_lora_weights.safetensors" and quick_run.adapter.is_file()
    )
    assert [record["step"] for record in quick_run.history] == [1, 2, 3]
    assert all(
        record["loss"] > 0 and record["seconds"] > 0 and record["learning_rate"] == 1e-3
        for record in quick_run.history
    )


def test_the_weights_have_changed_and_are_finite(quick_run):
    weights = load_file(quick_run.adapter)
    assert all(value.isfinite().all() for value in weights.values())
    assert any(value.abs().max() > 0 for key, value in weights.items() if "lora_B" in key)


def test_the_file_tells_rank_alpha_base_model_and_settings(tmp_path):
    run = quick_train(tmp_path, alpha=6.0, max_train_steps=1)
    with safe_open(run.adapter, "pt") as file:
        metadata = file.metadata()
    settings = json.loads(metadata["lora_adapter_metadata"])
    assert (settings["unet.r"], settings["unet.lora_alpha"]) == (2, 6.0)
    assert metadata["base_model"] == "tiny-sd" and json.loads(metadata["training"])["alpha"] == 6.0


def test_the_same_seed_gives_the_same_weights(tmp_path):
    first, second = (load_file(quick_train(tmp_path / name).adapter) for name in ("a", "b"))
    assert all(torch.equal(first[key], second[key]) for key in first)


def test_every_target_trains_and_loads(tmp_path, pipe):
    layers = [
        lb.load_adapter(
            pipe,
            quick_train(tmp_path / name, target=target, max_train_steps=1),
            name,
        ).layers["unet"]
        for name, target in (("few", "attention"), ("more", "attention+ff"), ("most", "all"))
    ]
    assert layers == [128, 160, 279]


def test_pictures_and_validation_loss_come_with_the_run(tmp_path):
    run = quick_train(
        tmp_path / "pets",
        validation_split=0.34,
        validation_prompt="a red cat",
        num_validation_images=1,
    )
    assert len(run.validation_losses) >= 2
    assert list(run.grid.columns) == ["step 0", "step 2", "step 3"] and not np.array_equal(
        *run.grid.images[0][::2]
    )
    assert run._repr_html_().count("<img alt=") == 2


def test_own_images_of_any_shape_can_be_learned_with_random_crops(tmp_path, picture):
    folder = tmp_path / "own"
    folder.mkdir()
    for number, size in enumerate([(90, 64), (70, 120), (300, 200)]):
        picture("blue", size).save(folder / f"{number}.jpg")
        (folder / f"{number}.txt").write_text("a blue wall")
    run = quick_train(
        tmp_path / "out",
        dataset_name=None,
        train_data_dir=str(folder),
        random_flip=True,
        caption_dropout=0.5,
        snr_gamma=5.0,
    )
    assert len(run.losses) == 3


def test_half_precision_trains_float32_weights_and_leaves_the_pipeline_usable(tmp_path):
    run = quick_train(
        tmp_path, mixed_precision="bf16", validation_prompt="a red cat", num_validation_images=1
    )
    assert {value.dtype for value in load_file(run.adapter).values()} == {torch.float32}
    assert not np.array_equal(run.grid.images[0][0], run.grid.images[0][-1])


COMMAND = """-m accelerate.commands.launch {} -m lorabook.training.text_to_image
    --pretrained_model_name_or_path=tiny-sd --dataset_name=creatures --max_train_samples=8
    --max_train_steps=2 --train_batch_size=2 --rank=2 --output_dir={}"""


@pytest.mark.parametrize(
    "flags",
    [
        "--cpu --num_processes=1",
        "--multi_gpu --num_processes=2 --num_machines=1 --mixed_precision=no --dynamo_backend=no "
        "--main_process_port=0",
    ],
)
def test_the_command_line_trains_in_one_and_in_two_processes(tmp_path, flags):
    cpu = {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, *COMMAND.format(flags, tmp_path).split()],
        capture_output=True,
        text=True,
        timeout=300,
        env=os.environ | cpu,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("2 steps in") == 1
    assert (tmp_path / "pytorch_lora_weights.safetensors").is_file()


@pytest.mark.parametrize(
    ("changes", "error", "told"),
    [
        (
            dict(pretrained_model_name_or_path="nothing"),
            FileNotFoundError,
            "model 'nothing' not found",
        ),
        (dict(dataset_name="nowhere"), FileNotFoundError, "image folder 'nowhere' not found"),
        (dict(resolution=63), ValueError, "resolution 63 is not a multiple of 4"),
        (dict(validation_split=0.01), ValueError, "leaves 0 to validate on"),
        (dict(caption_column="prompt"), ValueError, "no column 'prompt'; its columns are: text"),
    ],
)
def test_bad_input_ends_before_training_with_nothing_written(tmp_path, changes, error, told):
    with pytest.raises(error, match=told) as raised:
        quick_train(tmp_path / "out", **changes)
    assert len(str(raised.value)) <= 400 and "\n" not in str(raised.value)
    assert not (tmp_path / "out").exists()


def test_a_loss_that_is_not_finite_stops_the_run_with_nothing_written(tmp_path):
    with pytest.raises(FloatingPointError, match="learning rate"):
        quick_train(tmp_path / "out", learning_rate=1e30, max_grad_norm=1e30, max_train_steps=8)
    assert not (tmp_path / "out").exists()


def test_the_last_images_are_kept_out():
    images = lb.load_captioned_images("creatures")
    learned, held_out = split(images, quick_config(validation_split=0.1))
    assert (len(learned), len(held_out)) == (270, 30) and held_out[-1]["text"] == images[-1]["text"]


def test_training_stops_where_no_image_has_a_caption_unless_that_is_meant(tmp_path, picture):
    (tmp_path / "set").mkdir()
    picture(size=(64, 64)).save(tmp_path / "set" / "a.png")
    (tmp_path / "set" / "words.csv").write_text("nr,words\n1,red\n")
    told = dict(
        dataset_name=None,
        train_data_dir=str(tmp_path / "set"),
        output_dir=str(tmp_path / "run"),
        max_train_steps=1,
        train_batch_size=1,
        validation_prompt=None,
    )
    with pytest.raises(
        ValueError, match="none of the 1 images.*allow_empty_captions; these files.*words.csv"
    ):
        lb.train_text_to_image(quick_config(**told))
    assert not (tmp_path / "run").exists()
    assert lb.train_text_to_image(quick_config(**told, allow_empty_captions=True)).adapter.is_file()
