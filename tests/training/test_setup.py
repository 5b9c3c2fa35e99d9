import pytest
import torch

import lorabook as lb
from conftest import quick_config, quick_dreambooth, quick_train
from lorabook.training.setup import check_early, set_up


def test_a_launchers_fp16_becomes_float32_on_the_cpu_and_says_so(monkeypatch):
    if torch.cuda.is_available():
        pytest.skip("a GPU takes fp16")
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "fp16")
    with (
        pytest.warns(
            UserWarning, match="the launcher asks for mixed precision fp16.*training in float32"
        ),
        set_up(quick_config()) as setup,
    ):
        assert setup.dtype == torch.float32


def test_a_tokenizer_and_a_vae_of_ones_own_are_used(tmp_path):
    pipe = lb.load_pipeline("tiny-sd", device="cpu")
    with torch.no_grad():
        pipe.vae.decoder.conv_out.bias.fill_(3.0)
    pipe.vae.save_pretrained(tmp_path / "vae")
    pipe.tokenizer.save_pretrained(tmp_path / "tokenizer")
    config = quick_dreambooth(
        pretrained_vae_model_name_or_path=str(tmp_path / "vae"),
        tokenizer_max_length=20,
        tokenizer_name=str(tmp_path / "tokenizer"),
        text_encoder_use_attention_mask=True,
    )
    with set_up(config) as setup:
        assert (setup.family.pipe.vae.decoder.conv_out.bias == 3).all()
        assert setup.family.encode_prompts(["a red cat"])[0].shape[1] == 20


def test_flags_that_need_what_is_not_here_say_so(tmp_path):
    xformers = quick_config(enable_xformers_memory_efficient_attention=True)
    sentence = "xformers_memory_efficient_attention has no effect, it"
    with pytest.warns(UserWarning, match=sentence), set_up(xformers):
        pass
    sentence = "local_rank has no effect"
    with pytest.warns(UserWarning, match=sentence), set_up(quick_config(local_rank=0)):
        pass


def test_a_push_without_a_token_ends_before_anything_is_loaded(tmp_path, monkeypatch):
    monkeypatch.setattr("lorabook.hub.find_token", lambda token=None: None)
    with pytest.raises(ValueError, match="no token for the Hub; set HF_TOKEN"):
        quick_train(tmp_path / "out", push_to_hub=True)
    assert not (tmp_path / "out").exists()


def test_a_random_seed_is_told_so_that_the_command_repeats_the_run(tmp_path):
    run = quick_train(tmp_path, seed=None, max_train_steps=1)
    assert "--seed=" in run.command and "--max_train_steps=1" in run.command


def test_a_missing_package_is_named_with_its_extra(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(
        ValueError, match="bitsandbytes, which is not installed: pip install 'lorabook\\[lowbit\\]'"
    ):
        check_early(quick_config(use_8bit_adam=True))


def test_nothing_is_left_of_the_accelerator():
    from accelerate.state import AcceleratorState, PartialState

    with set_up(quick_config()):
        pass
    assert not AcceleratorState._shared_state and not PartialState._shared_state
