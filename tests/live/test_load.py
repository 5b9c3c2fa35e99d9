import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline
from safetensors.torch import load_file, save_file

import lorabook as lb
from lorabook.live.layers import active_adapters, adapter_names

CALL = dict(prompt="a red cat", num_inference_steps=3)


def draw(pipe):
    return np.asarray(pipe(**CALL, generator=torch.Generator().manual_seed(0)).images[0])


def test_the_report_says_what_was_loaded(pipe, quick_run):
    report = lb.load_adapter(pipe, quick_run)
    assert (report.name, report.rank, report.alpha, report.base_model) == (
        "quick",
        2,
        (2.0,),
        "tiny-sd",
    )
    assert report.layers == {"unet": 128} and report.matched == 256
    assert "rank 2" in report._repr_html_()


def test_loading_is_silent(pipe, quick_run, silent, capfd):
    lb.load_adapter(pipe, quick_run)
    assert capfd.readouterr() == ("", "")


def test_plain_diffusers_loads_the_file_and_draws_the_same_picture(pipe, quick_run):
    lb.load_adapter(pipe, quick_run)
    plain = StableDiffusionPipeline.from_pretrained(lb.bundled("tiny-sd"))
    plain.set_progress_bar_config(disable=True)
    plain.load_lora_weights(quick_run.adapter.parent, weight_name=quick_run.adapter.name)
    assert np.array_equal(draw(pipe), draw(plain))


def test_two_adapters_take_part_together(pipe, quick_run):
    lb.load_adapter(pipe, quick_run, "one")
    once = draw(pipe)
    lb.load_adapter(pipe, quick_run, "two")
    assert active_adapters(pipe) == ["one", "two"]
    lb.set_scales(pipe, {"one": 0.5, "two": 0.5})
    assert np.abs(once.astype(int) - draw(pipe)).max() <= 1


def test_nothing_on_the_pipeline_becomes_trainable(pipe, quick_run):
    pipe.unet.requires_grad_(False)
    lb.load_adapter(pipe, quick_run)
    lb.set_scales(pipe, {"quick": 0.5})
    assert not any(p.requires_grad for p in pipe.unet.parameters())


def test_a_name_that_torch_has_for_itself_gets_an_ending(pipe, quick_run):
    assert lb.load_adapter(pipe, quick_run, "train").name == "train_lora"


def test_dots_in_a_name_are_replaced(pipe, quick_run):
    assert lb.load_adapter(pipe, quick_run, "v1.0").name == "v1_0"


def test_a_name_in_use_is_an_error(pipe, quick_run):
    lb.load_adapter(pipe, quick_run, "quick")
    with pytest.raises(ValueError, match="'quick' already"):
        lb.load_adapter(pipe, quick_run, "quick")


def test_an_adapter_for_another_architecture_leaves_the_pipeline_as_it_was(
    pipe, quick_run, tmp_path
):
    lb.load_adapter(pipe, quick_run, "quick")
    before = draw(pipe)
    weights = load_file(quick_run.adapter)
    save_file(
        {
            key: torch.randn(*(2 * n if n > 2 else n for n in value.shape))
            for key, value in weights.items()
        },
        tmp_path / "wide.safetensors",
    )
    with pytest.raises(ValueError, match="wide.safetensors does not fit StableDiffusionPipeline"):
        lb.load_adapter(pipe, tmp_path / "wide.safetensors")
    assert adapter_names(pipe) == active_adapters(pipe) == ["quick"] and np.array_equal(
        before, draw(pipe)
    )


def test_keys_that_match_nothing_are_an_error(pipe, tmp_path):
    save_file(
        {f"unet.other.{i}.lora_{ab}.weight": torch.ones(2, 2) for i in range(3) for ab in "AB"},
        tmp_path / "other.safetensors",
    )
    with pytest.raises(ValueError, match="does not fit"):
        lb.load_adapter(pipe, tmp_path / "other.safetensors")
    assert adapter_names(pipe) == []
