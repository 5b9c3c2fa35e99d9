import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

import lorabook as lb
from conftest import quick_dreambooth, quick_train_dreambooth, tiny_sdxl
from lorabook.training.config import DreamBoothConfig


def prior(tmp_path, **changes):
    return (
        dict(
            with_prior_preservation=True,
            class_data_dir=str(tmp_path / "class"),
            class_prompt="a drawing of a cat",
            num_class_images=3,
            sample_batch_size=2,
        )
        | changes
    )


def test_a_run_writes_an_adapter_with_its_trigger_words(tmp_path, pipe):
    run = quick_train_dreambooth(tmp_path / "cat")
    with safe_open(run.adapter, "pt") as file:
        metadata = file.metadata()
    assert (
        json.loads(metadata["trigger_words"])
        == [metadata["instance_prompt"]]
        == ["a drawing of sks cat"]
    )
    assert lb.load_adapter(pipe, run).layers == {"unet": 128}


def test_a_trained_text_encoder_is_saved_by_its_full_keys_and_with_its_alpha(tmp_path, pipe):
    run = quick_train_dreambooth(tmp_path / "cat", train_text_encoder=True, alpha=6.0)
    keys = [key for key in load_file(run.adapter) if key.startswith("text_encoder.")]
    assert keys and all(key.startswith("text_encoder.text_model.encoder.layers.") for key in keys)
    report = lb.load_adapter(pipe, run)
    assert report.alpha == (6.0,) and report.layers["text_encoder"] == len(keys) // 2
    changed = [
        value
        for key, value in load_file(run.adapter).items()
        if "text_encoder" in key and "lora_B" in key
    ]
    assert all(value.abs().max() > 0 for value in changed)


def test_class_images_are_drawn_where_they_are_too_few_and_used_again(tmp_path):
    quick_train_dreambooth(tmp_path / "a", **prior(tmp_path))
    drawn = {path: path.read_bytes() for path in sorted((tmp_path / "class").iterdir())}
    assert [path.name for path in drawn] == ["class-0000.png", "class-0001.png", "class-0002.png"]
    quick_train_dreambooth(tmp_path / "b", **prior(tmp_path, num_class_images=4))
    assert len(list((tmp_path / "class").iterdir())) == 4
    assert all(path.read_bytes() == content for path, content in drawn.items())


def test_drawing_that_was_cut_short_ends_in_the_same_class_images(tmp_path):
    told = prior(tmp_path, num_class_images=4)
    quick_train_dreambooth(tmp_path / "a", max_train_steps=1, **told)
    whole = {path: path.read_bytes() for path in (tmp_path / "class").iterdir()}
    for name in ("class-0001.png", "class-0002.png", "class-0003.png"):
        (tmp_path / "class" / name).unlink()
    quick_train_dreambooth(tmp_path / "b", max_train_steps=1, **told)
    assert {path: path.read_bytes() for path in (tmp_path / "class").iterdir()} == whole


def test_the_prior_counts_by_its_weight(tmp_path):
    losses = [
        quick_train_dreambooth(
            tmp_path / str(weight), max_train_steps=1, **prior(tmp_path, prior_loss_weight=weight)
        ).losses[0]
        for weight in (0.0, 1.0, 2.0)
    ]
    assert (
        losses[1] - losses[0] == pytest.approx(losses[2] - losses[1], rel=1e-4)
        and losses[0] < losses[1]
    )


def test_images_can_have_a_caption_each(tmp_path, creature_folder):
    run = quick_train_dreambooth(
        tmp_path / "out", instance_data_dir=str(creature_folder), caption_column="text"
    )
    assert len(run.losses) == 3


def test_an_epoch_counts_repeats(tmp_path):
    run = quick_train_dreambooth(
        tmp_path, max_train_steps=None, num_train_epochs=1, repeats=2, train_batch_size=5
    )
    assert len(run.losses) == 2


@pytest.mark.parametrize("method", ["dreambooth", "text_to_image"])
def test_sdxl_trains_both_text_encoders_and_loads(tmp_path, method):
    model = tiny_sdxl(tmp_path)
    told = dict(
        pretrained_model_name_or_path=model,
        resolution=64,
        rank=2,
        train_text_encoder=True,
        max_train_steps=2,
        train_batch_size=2,
        seed=0,
        output_dir=str(tmp_path / "xl"),
        report_to="none",
        validation_prompt="a cat",
        num_validation_images=1,
        output_kohya_format=True,
    )
    run = (
        lb.train_dreambooth(
            DreamBoothConfig(
                **told, instance_data_dir="subjects/patch_cat", instance_prompt="a sks cat"
            )
        )
        if method == "dreambooth"
        else lb.train_text_to_image(
            lb.TextToImageConfig(**told, dataset_name="creatures", max_train_samples=4)
        )
    )
    report = lb.load_adapter(lb.load_pipeline(model, device="cpu"), run)
    assert (
        report.layers["unet"] > 20
        and report.layers["text_encoder"] == report.layers["text_encoder_2"] == 8
    )
    kohya = load_file(run.folder / "pytorch_lora_weights_kohya.safetensors")
    assert {key.split("_text_model")[0] for key in kohya if key.startswith("lora_te")} == {
        "lora_te1",
        "lora_te2",
    }


def test_sdxl_has_the_rates_of_its_reference_script(tmp_path):
    run = lb.train_dreambooth(
        DreamBoothConfig(
            pretrained_model_name_or_path=tiny_sdxl(tmp_path),
            resolution=64,
            max_train_steps=1,
            report_to="none",
            instance_data_dir="subjects/patch_cat",
            instance_prompt="a sks cat",
            output_dir=str(tmp_path / "xl"),
        )
    )
    assert run.history[0]["learning_rate"] == 1e-4
    assert (
        quick_train_dreambooth(tmp_path / "sd", max_train_steps=1).history[0]["learning_rate"]
        == 5e-4
    )


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        (dict(instance_prompt=" "), "instance_prompt is empty"),
        (dict(class_data_dir="somewhere"), "class_prompt is missing: class_data_dir needs"),
        (dict(with_prior_preservation=True), "class_prompt is missing: prior preservation needs"),
        (dict(with_prior_preservation=True, class_prompt="a cat"), "class_data_dir is missing"),
        (
            dict(train_text_encoder=True, pre_compute_text_embeddings=True),
            "pre_compute_text_embeddings cannot go with",
        ),
        (dict(dataset_name="a/b"), "both given"),
    ],
)
def test_settings_that_cannot_go_together_are_named(changes, told):
    with pytest.raises(ValueError, match=told):
        quick_dreambooth(**changes)


@pytest.mark.parametrize(
    ("changes", "error", "told"),
    [
        (dict(instance_data_dir=None), ValueError, "instance_data_dir is missing"),
        (dict(instance_prompt=None), ValueError, "instance_prompt is missing"),
        (dict(instance_data_dir="nowhere"), FileNotFoundError, "image folder 'nowhere' not found"),
        (
            dict(train_batch_size=6),
            ValueError,
            "train_batch_size 6 is larger than the data set of 5 image",
        ),
        (dict(rank=500), ValueError, "rank 500 is larger than layer"),
        (dict(mixed_precision="fp16"), ValueError, "fp16 needs a GPU"),
        (
            dict(target_blocks=["down.3"]),
            ValueError,
            "'down.3' has no layer for .*the blocks are: down.0, down.1",
        ),
        (dict(target_blocks=["sideways"]), ValueError, "'sideways' is no block of this UNet"),
        (dict(tokenizer_name="nowhere"), FileNotFoundError, "tokenizer 'nowhere' not found"),
        (
            dict(pretrained_vae_model_name_or_path="nowhere"),
            FileNotFoundError,
            "VAE 'nowhere' not found",
        ),
    ],
)
def test_bad_input_ends_before_training_with_nothing_written(tmp_path, changes, error, told):
    if torch.cuda.is_available() and "mixed_precision" in changes:
        pytest.skip("a GPU takes fp16")
    with pytest.raises(error, match=told) as raised:
        quick_train_dreambooth(tmp_path / "out", **changes)
    assert len(str(raised.value)) <= 400 and "\n" not in str(raised.value)
    assert not (tmp_path / "out").exists()


def test_a_folder_without_images_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="has no images"):
        quick_train_dreambooth(tmp_path / "out", instance_data_dir=str(tmp_path))


def test_flags_without_effect_say_so(tmp_path):
    with pytest.warns(UserWarning, match="class_labels_conditioning has no effect"):
        quick_train_dreambooth(tmp_path, class_labels_conditioning="timesteps", max_train_steps=1)
