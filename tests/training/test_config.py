import subprocess
import sys

import pytest

import lorabook as lb
from lorabook.training.flags import parse


@pytest.mark.parametrize(
    ("field", "value", "expected"),
    [
        ("rank", 0, "rank must be at least 1, not 0"),
        ("rank", 4.5, "rank must be of type int, not 4.5"),
        ("rank", "8", "rank must be of type int, not '8'"),
        ("random_flip", 1, "random_flip must be of type bool"),
        ("output_dir", None, "output_dir must be of type str"),
        ("rank", -4, "rank must be at least 1"),
        ("alpha", 0.0, "alpha must be a number above 0"),
        ("train_batch_size", 0, "train_batch_size must be at least 1"),
        ("max_train_steps", 0, "max_train_steps must be at least 1"),
        ("learning_rate", 0.0, "learning_rate must be a number above 0"),
        ("learning_rate", float("nan"), "learning_rate must be"),
        ("validation_split", 1.0, "validation_split must be 0 or more and below 1"),
        ("caption_dropout", -0.1, "caption_dropout must be"),
        ("target", "everything", "target must be one of attention, attention\\+ff, all"),
        ("lr_scheduler", "cosinus", "lr_scheduler must be one of linear, cosine"),
        ("prediction_type", "x0", "prediction_type must be one of epsilon, v_prediction"),
    ],
)
def test_a_bad_value_names_the_field_and_what_it_takes(field, value, expected):
    with pytest.raises(ValueError, match=expected):
        lb.TextToImageConfig(**{field: value})


def test_an_output_folder_that_is_a_file_is_an_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="is a file; give a folder"):
        lb.TextToImageConfig(output_dir=str(tmp_path / "file"))


def test_an_output_folder_below_a_file_is_an_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="cannot be made"):
        lb.TextToImageConfig(output_dir=tmp_path / "file" / "sub")


def test_paths_become_text(tmp_path):
    assert lb.TextToImageConfig(train_data_dir=tmp_path).train_data_dir == str(tmp_path)


def test_two_sources_of_images_are_an_error():
    with pytest.raises(ValueError, match="both given"):
        lb.TextToImageConfig(dataset_name="a/b", train_data_dir="c")


def test_flags_are_the_fields():
    config = parse(
        lb.TextToImageConfig,
        ["--rank=8", "--random_flip", "--snr_gamma", "5.0", "--lr_scheduler=cosine"],
    )
    assert (config.rank, config.random_flip, config.snr_gamma, config.lr_scheduler) == (
        8,
        True,
        5.0,
        "cosine",
    )


def test_the_defaults_are_those_of_the_reference_script():
    config = lb.TextToImageConfig()
    assert (config.train_batch_size, config.num_train_epochs, config.learning_rate) == (
        16,
        100,
        1e-4,
    )
    assert (config.rank, config.lr_scheduler, config.max_grad_norm) == (4, "constant", 1.0)
    assert (config.output_dir, config.image_interpolation_mode) == (
        "sd-model-finetuned-lora",
        "lanczos",
    )


def test_the_command_repeats_the_config():
    config = lb.TextToImageConfig(
        rank=8, random_flip=True, validation_prompt="it's a cat", alpha=4.0
    )
    import shlex

    assert parse(lb.TextToImageConfig, shlex.split(config.command)[5:]) == config


@pytest.mark.parametrize(
    ("flag", "told"),
    [
        ("--no_such_flag=1", "unknown flag --no_such_flag"),
        ("--resol=64", "unknown flag --resol=64; did you mean --resolution"),
    ],
)
def test_unknown_and_abbreviated_flags_end_with_a_sentence(flag, told, capsys):
    with pytest.raises(SystemExit) as ended:
        parse(lb.TextToImageConfig, [flag])
    complaint = capsys.readouterr().err
    assert (
        ended.value.code == 2
        and complaint.startswith(f"error: {told}")
        and complaint.count("\n") == 1
    )


def test_the_command_line_ends_in_one_sentence_without_a_traceback(tmp_path):
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "lorabook.training.text_to_image",
            "--rank=0",
            f"--output_dir={tmp_path}/out",
        ],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2 and done.stderr == "error: rank must be at least 1, not 0\n"
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("pictures", [[1, 2], {"image": []}, iter(())])
def test_pictures_in_memory_are_to_be_saved_first(pictures):
    with pytest.raises(ValueError, match="train_data_dir names a folder.*save_to_disk"):
        lb.TextToImageConfig(train_data_dir=pictures)
