import numpy as np
import pytest

import lorabook as lb
from adapter_files import add_random
from lorabook.blocks import target_modules
from lorabook.live.presets import NAMES
from lorabook.live.prompt_syntax import parse_prompt
from lorabook.studio.code import as_code
from lorabook.studio.generate import StudioGenerator, first_settings

SMALL = {"num_inference_steps": 2, "seeds": (0, 5)}


@pytest.fixture
def two(pipe):
    for name in ("creatures", "ink"):
        lb.load_adapter(pipe, name)
    return pipe


def drawn_by(code, monkeypatch, folder):
    """The pictures of code that is run somewhere else."""
    monkeypatch.chdir(folder)
    names = {}
    exec(code, names)
    return names["images"]


def apart(images, others):
    return max(
        abs(np.asarray(a, int) - np.asarray(b, int)).max()
        for a, b in zip(images, others, strict=True)
    )


@pytest.mark.parametrize(
    "change",
    [
        lambda s: s.with_adapter(
            "ink", scale=-0.5, blocks={"up.1": 0.3}, parts={"resnet": 0}
        ).with_(negative_prompt='it\'s "big"'),
        lambda s: s.with_adapter("creatures", on=False).with_(
            scheduler="euler", width=96, guidance_scale=2.5
        ),
        lambda s: s.with_adapter("ink", rank=2).with_(blend_method="ties"),
    ],
)
def test_the_lorabook_code_draws_the_same(two, monkeypatch, tmp_path, change):
    settings = change(first_settings(two, **SMALL))
    code = as_code(settings, "lorabook", pipe=two)
    assert (
        apart(drawn_by(code, monkeypatch, tmp_path), StudioGenerator(two).generate(settings).images)
        <= 1
    )


@pytest.mark.parametrize(
    "scales",
    [
        {"scale": 0.5},
        {"blocks": {"mid": 0}},
        {"scale": 0.5, "parts": {"resnet": 0, "up.1.sampler": 2}},
    ],
)
def test_the_diffusers_code_draws_the_same(two, monkeypatch, tmp_path, scales):
    settings = (
        first_settings(two, **SMALL).with_adapter("creatures", on=False).with_(scheduler="ddim")
    )
    settings = settings.with_adapter("ink", **scales)
    code = as_code(settings, "diffusers", pipe=two)
    assert "#" not in code and "lorabook" not in code.split("from_pretrained")[0]
    assert (
        apart(drawn_by(code, monkeypatch, tmp_path), StudioGenerator(two).generate(settings).images)
        <= 1
    )


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda s: s.with_adapter("ink", rank=2), "not cut to rank 2"),
        (lambda s: s.with_(blend_method="dare_ties"), "'dare_ties'"),
    ],
)
def test_the_diffusers_code_says_what_it_cannot_and_runs(two, monkeypatch, tmp_path, change, says):
    code = as_code(change(first_settings(two, **SMALL)), "diffusers", pipe=two)
    comments = [line for line in code.splitlines() if line.startswith("# ")]
    assert len(comments) == 1
    with pytest.raises(AssertionError, match=says):
        raise AssertionError(comments[0])
    assert len(drawn_by(code, monkeypatch, tmp_path)) == 2


def test_a_file_is_loaded_from_where_it_is(pipe, tmp_path):
    file = tmp_path / "my ink.safetensors"
    lb.save_adapter("ink", file)
    lb.load_adapter(pipe, file, "ink")
    settings = first_settings(pipe, **SMALL)
    assert f"lb.load_adapter(pipe, {str(file)!r}, 'ink')" in as_code(
        settings, "lorabook", pipe=pipe
    )
    code = as_code(settings, "diffusers", pipe=pipe)
    assert f"{str(tmp_path)!r}, weight_name='my ink.safetensors', adapter_name='ink'" in code


WEIGHED = dict(prompt=r"a (red:1.6) boat \(small\) BREAK [night]", negative_prompt="(cat:1.2)")


def test_the_lorabook_code_draws_what_a_prompt_weighs(two, monkeypatch, tmp_path):
    settings = first_settings(two, **SMALL, scheduler="DPM++ 2M SDE Karras").with_(**WEIGHED)
    code = as_code(settings, "lorabook", pipe=two)
    assert (
        apart(drawn_by(code, monkeypatch, tmp_path), StudioGenerator(two).generate(settings).images)
        <= 1
    )


def test_the_diffusers_code_says_that_it_weighs_no_words_and_runs(two, monkeypatch, tmp_path):
    code = as_code(
        first_settings(two, **SMALL, scheduler="DPM++ 2M Karras").with_(**WEIGHED),
        "diffusers",
        pipe=two,
    )
    assert (
        "# diffusers draws these words without A1111's weights" in code
        and "'a red boat (small) night'" in code
    )
    assert "from_config(pipe.scheduler.config, use_karras_sigmas=True)" in code
    assert len(drawn_by(code, monkeypatch, tmp_path)) == 2


def test_the_a1111_code_repeats_the_syntax_and_names_the_sampler(two):
    settings = first_settings(two, num_inference_steps=2, scheduler="dpm++ 2m sde karras").with_(
        **WEIGHED
    )
    lines = as_code(settings, "a1111", pipe=two).splitlines()
    assert (
        lines[0] == WEIGHED["prompt"] + " <lora:creatures:1> <lora:ink:1>"
        and "Sampler: DPM++ 2M SDE Karras," in lines[2]
    )
    assert "Sampler: Euler a," in as_code(settings.with_(scheduler="EULER A"), "a1111", pipe=two)


@pytest.mark.parametrize("dialect", ["lorabook", "diffusers", "a1111"])
def test_where_nothing_is_drawn_the_code_says_why(two, dialect):
    code = as_code(first_settings(two, "a cat <lora:ink:0.4>"), dialect, pipe=two)
    assert (
        code.startswith("# the prompt's '<lora:ink:0.4>' is not read here")
        and code.count("\n") == 1
    )


def test_the_a1111_prompt_has_each_adapter_and_the_parameters(two):
    settings = first_settings(two, "a red boat", negative_prompt="a cat", **SMALL).with_adapter(
        "creatures", on=False
    )
    text = as_code(settings.with_adapter("ink", scale=-0.5), "a1111", pipe=two)
    assert text == (
        "a red boat <lora:ink:-0.5>\nNegative prompt: a cat\n"
        "Steps: 2, Sampler: DPM++ 2M, CFG scale: 4, Seed: 0, Size: 64x64\n\n"
        "a red boat <lora:ink:-0.5>\nNegative prompt: a cat\n"
        "Steps: 2, Sampler: DPM++ 2M, CFG scale: 4, Seed: 5, Size: 64x64\n"
    )


@pytest.mark.parametrize(("targets", "numbers"), [("attention", 17), ("all", 26)])
def test_blocks_become_block_weights(pipe, targets, numbers):
    add_random(pipe, target_modules(targets))
    settings = first_settings(pipe, **SMALL).with_adapter(
        "random", scale=0.5, blocks={"mid": 0.25, "text_encoder": 0}
    )
    prompt, (mention,) = parse_prompt(as_code(settings, "a1111", pipe=pipe).split("\n")[0])
    assert prompt.strip() == settings.prompt and mention.unet == mention.text_encoder == 0.5
    middle = NAMES[numbers].index("MID")
    assert mention.blocks == (0, *[1] * (middle - 1), 0.25, *[1] * (numbers - middle - 1))


def test_what_block_weights_cannot_say_stands_below(two):
    settings = first_settings(two, **SMALL).with_adapter(
        "ink", parts={"cross-attention": 0}, rank=2
    )
    text = as_code(settings, "a1111", pipe=two)
    assert (
        "# ink: block weights have one number for" in text
        and "# ink is cut to rank 2" in text
        and "lbw" not in text
    )


def test_another_dialect_is_refused(two):
    with pytest.raises(
        ValueError, match="no code for 'fortran'; there is for: lorabook, diffusers, a1111"
    ):
        as_code(first_settings(two), "fortran", pipe=two)
