import random
import shutil
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from diffusers import UNet2DConditionModel
from peft.helpers import disable_input_dtype_casting
from safetensors.torch import load_file
from transformers import CLIPTextModel

from conftest import quick_train, quick_train_dreambooth
from lorabook.training.dataset import read_ahead
from lorabook.training.families import StableDiffusion, family_of
from lorabook.training.validation import ValidationImages
from lorabook.worlds import DATA


@pytest.fixture
def places(monkeypatch):
    """What is away from the training device when the UNet predicts and images are generated."""
    place, seen, real = {}, [], StableDiffusion.on_device.__wrapped__

    def record(family, components, device):
        before = {name: place.get(name, "device") for name in components}
        place.update(dict.fromkeys(components, "aside" if device == "cpu" else "device"))
        yield from real(family, components, device)
        place.update(before)

    def noted(what, call):
        def note(*arguments):
            aside = sorted(name for name, where in place.items() if where == "aside")
            seen.append((what, tuple(aside)))
            return call(*arguments)

        return note

    monkeypatch.setattr(StableDiffusion, "on_device", contextmanager(record))
    for owner, name, what in (
        (StableDiffusion, "predict", "step"),
        (ValidationImages, "generate", "picture"),
    ):
        monkeypatch.setattr(owner, name, noted(what, getattr(owner, name)))
    return seen


def test_what_is_encoded_once_leaves_the_device_and_comes_back_for_pictures(tmp_path, places):
    quick_train(tmp_path, max_train_steps=1, validation_prompt="a cat", num_validation_images=1)
    assert places == [("picture", ()), ("step", ("text_encoder", "vae")), ("picture", ())]


@pytest.mark.parametrize(
    ("changes", "aside"),
    [(dict(train_text_encoder=True), ("vae",)), (dict(cache_latents=False), ())],
)
def test_what_encodes_or_learns_at_each_step_stays(tmp_path, places, changes, aside):
    quick_train_dreambooth(tmp_path, max_train_steps=1, **changes)
    assert places[-1] == ("step", aside)


def test_parts_are_elsewhere_inside_the_block_and_back_after_it(pipe):
    family, where = family_of(pipe), []
    to = torch.nn.Module.to
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            torch.nn.Module,
            "to",
            lambda self, *told: where.append((type(self), *told)) or to(self, *told),
        )
        with family.on_device(["text_encoder"], "cpu"):
            where.append("inside")
    assert where == [(CLIPTextModel, "cpu"), "inside", (CLIPTextModel, torch.device("cpu"))]


def test_an_input_that_is_not_cast_gives_the_same_numbers_in_half_precision(small):
    def predicted(cast):
        casts = disable_input_dtype_casting(small.unet, active=not cast)
        with casts, torch.autocast("cpu", torch.bfloat16):
            small.unet.zero_grad()
            out = small.unet(
                torch.ones(1, 4, 16, 16).bfloat16(), 5, torch.ones(1, 8, 128).bfloat16()
            ).sample
            out.float().square().mean().backward()
        return [out, *(p.grad for name, p in small.unet.named_parameters() if "lora_" in name)]

    small.unet.to(torch.bfloat16)
    for name, parameter in small.unet.named_parameters():
        parameter.requires_grad_("lora_" in name)
        if "lora_" in name:
            parameter.data = parameter.data.float()
    assert all(
        torch.equal(one, other)
        for one, other in zip(predicted(True), predicted(False), strict=True)
    )


def test_reading_ahead_keeps_the_order_and_the_errors():
    def numbers():
        yield from range(5)
        raise ValueError("at the end")

    read = []
    with pytest.raises(ValueError, match="at the end"):
        for number in read_ahead(numbers(), torch.device("cuda")):
            read.append(number)
    assert read == [0, 1, 2, 3, 4]


def test_a_run_that_reads_ahead_makes_the_same_adapter(tmp_path, monkeypatch):
    settings = dict(random_flip=True, caption_dropout=0.3)
    plain = load_file(quick_train(tmp_path / "a", **settings).adapter)
    monkeypatch.setattr(
        "lorabook.training.dataset.read_ahead",
        lambda items, device: read_ahead(items, torch.device("cuda")),
    )
    ahead = load_file(quick_train(tmp_path / "b", **settings).adapter)
    assert all(torch.equal(plain[key], ahead[key]) for key in plain)


def test_a_compiled_run_makes_the_same_adapter_to_rounding(tmp_path, small, monkeypatch):
    shutil.copytree(DATA / "tiny-sd", tmp_path / "base")
    UNet2DConditionModel.from_config(small.unet.config).save_pretrained(tmp_path / "base/unet")
    compiled, compile_blocks = [], UNet2DConditionModel.compile_repeated_blocks
    monkeypatch.setattr(
        UNet2DConditionModel,
        "compile_repeated_blocks",
        lambda unet: compiled.append(compile_blocks(unet, backend="eager")),
    )
    told = dict(
        pretrained_model_name_or_path=str(tmp_path / "base"),
        validation_prompt="a cat",
        num_validation_images=1,
        max_train_steps=2,
        gradient_checkpointing=True,
    )
    plain, fast = (
        quick_train(tmp_path / str(flag), compile=flag, **told) for flag in (False, True)
    )
    one, other = load_file(plain.adapter), load_file(fast.adapter)
    assert len(compiled) == 1 and all(
        torch.allclose(one[key], other[key], atol=1e-5) for key in one
    )
    assert one.keys() == other.keys() and fast.losses == pytest.approx(plain.losses, rel=1e-4)


def test_a_run_leaves_the_process_as_it_was(tmp_path):
    own = Accelerator(gradient_accumulation_steps=7)
    torch.backends.cuda.matmul.allow_tf32 = False
    before = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
    quick_train(tmp_path, max_train_steps=1, allow_tf32=True, mixed_precision="bf16")
    assert own.mixed_precision == "no" and own.gradient_accumulation_steps == 7
    assert torch.equal(before[0], torch.get_rng_state()) and before[1] == random.getstate()
    assert (
        before[2] == np.random.get_state()[1].tolist() and not torch.backends.cuda.matmul.allow_tf32
    )
    AcceleratorState._reset_state(reset_partial_state=True)
