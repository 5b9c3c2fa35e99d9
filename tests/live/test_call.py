from types import SimpleNamespace

import pytest

from lorabook.live.generate import (
    check_prompt,
    chunks_of,
    is_guided,
    is_plain,
    prompt_arguments,
    step_count,
    words_of,
)


def test_a_plain_prompt_is_one_that_the_pipeline_encodes_alike(pipe):
    assert is_plain(pipe, "a red cat, on sand") and is_plain(pipe, "")
    for prompt in ("a (red) cat", r"a \(red\) cat", "a cat BREAK sand", "red " * 80):
        assert not is_plain(pipe, prompt)


def test_words_are_left_without_the_syntax():
    assert words_of(r"a (red:1.4), [cat] BREAK \(sand\)") == "a red, cat (sand)"


def test_the_negative_prompt_is_encoded_where_the_call_is_guided(pipe):
    assert set(prompt_arguments(pipe, "a cat", None, {"guidance_scale": 1})) == {"prompt_embeds"}
    assert set(prompt_arguments(pipe, "a cat", None, {"guidance_scale": 2})) == {
        "prompt_embeds",
        "negative_prompt_embeds",
    }
    assert is_guided(pipe, {}) and not is_guided(pipe, {"guidance_scale": 1.0})
    long = "red " * 80
    assert (
        chunks_of(pipe, "a cat", long, {"guidance_scale": 1}) == 1
        and chunks_of(pipe, "a cat", long, {}) == 2
    )


def test_steps_are_those_of_the_call_or_the_pipelines_own(pipe):
    assert step_count(pipe, {}) == 50 and step_count(pipe, {"num_inference_steps": 7}) == 7
    assert step_count(pipe, {"timesteps": [900, 500, 100]}) == 3


def test_a_pipeline_of_another_kind_gets_the_text_or_a_refusal():
    class OtherPipeline:
        def __call__(self, prompt=None, guidance_scale=3.5):
            pass

    assert prompt_arguments(OtherPipeline(), r"a cat \(red\)", None, {})["prompt"] == "a cat (red)"
    for prompt in ("a (red:1.2) cat", "a cat BREAK sand"):
        with pytest.raises(ValueError, match="OtherPipeline weighs no words and knows no BREAK"):
            prompt_arguments(OtherPipeline(), prompt, None, {})


def test_texts_for_one_encoder_of_several_stand_beside_a_text(pipe):
    told = prompt_arguments(pipe, "a cat", "dark", {"prompt_2": r"\(red\)"})
    assert told == {"prompt": "a cat", "negative_prompt": "dark", "prompt_2": "(red)"}


@pytest.mark.parametrize(
    "prompt, message",
    [
        (
            "a cat <lora:ink:0.8>",
            "'<lora:ink:0.8>' is not read here: take it out and set ink to 0.8",
        ),
        ("a cat <lyco:ink>", "set ink to 1"),
        ("<lora:ink:x>", "no finite number"),
        ("<hypernet:a:1>", "begins with one of"),
        ("a cat AND a dog", "composed prompt"),
        ("[a:b:0.5]", "prompt editing"),
        (SimpleNamespace(), "a prompt is a text"),
    ],
)
def test_where_scales_are_set_otherwise_a_prompt_names_no_adapter(prompt, message):
    with pytest.raises(ValueError, match=message) as error:
        check_prompt(prompt, "prompt", "set {name} to {weight}")
    assert len(str(error.value)) <= 400 and "\n" not in str(error.value)
