import numpy as np
import pytest

import lorabook as lb
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
        lambda s: s.with_adapter("ink", scale=-0.5, blocks={"up.1": 0.3}).with_(
            negative_prompt='it\'s "big"'
        ),
        lambda s: s.with_adapter("creatures", on=False).with_(
            scheduler="euler", width=96, guidance_scale=2.5
        ),
        lambda s: s.with_adapter("ink", layers={"unet": {"resnet": 0.0}}, scale=0.5),
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
        {"scale": 0.5, "layers": {"unet": {"resnet": 0, "up": {"block_1": {"sampler": 2}}}}},
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


@pytest.mark.parametrize("dialect", ["lorabook", "diffusers"])
def test_where_nothing_is_drawn_the_code_says_why(two, dialect):
    code = as_code(first_settings(two, "a cat <lora:ink:0.4>"), dialect, pipe=two)
    assert (
        code.startswith("# the prompt's '<lora:ink:0.4>' is not read here")
        and code.count("\n") == 1
    )


def test_another_dialect_is_refused(two):
    with pytest.raises(
        ValueError, match="no code for 'fortran'; there is for: lorabook, diffusers"
    ):
        as_code(first_settings(two), "fortran", pipe=two)
