import shutil
from types import SimpleNamespace

import pytest
import torch

import lorabook as lb
from conftest import tiny_sdxl
from lorabook.live.generate import (
    check_prompt,
    chunks_of,
    generate,
    is_guided,
    is_plain,
    prompt_arguments,
    step_count,
    words_of,
)
from lorabook.live.layers import active_adapters, adapter_names, lora_layers
from lorabook.live.scales import scales_of
from lorabook.schedulers import scheduler_like

CALL = dict(num_inference_steps=3, output_type="pt")
PROMPT = "a cartoon blue creature with wings"


def noise(seed=0):
    return torch.Generator().manual_seed(seed)


def picture(pipe, prompt=PROMPT, negative=None, **more):
    """With the syntax."""
    return generate(pipe, prompt, negative, **CALL | dict(seed=0) | more).images


def plain(pipe, prompt=PROMPT, negative=None, **more):
    """The pipeline by itself."""
    return pipe(prompt, negative_prompt=negative, generator=noise(), **CALL | more).images


@pytest.fixture
def with_adapters():
    """The picture that a fresh pipeline draws with adapters at these scales."""

    def draw(scales, **more):
        pipe = lb.load_pipeline("tiny-sd", device="cpu")
        pipe.set_progress_bar_config(disable=True)
        for name in scales:
            lb.load_adapter(pipe, name)
        lb.set_scales(pipe, scales)
        return plain(pipe, **more)

    return draw


def test_a_plain_prompt_gives_the_pipelines_own_picture(pipe, tmp_path):
    assert torch.equal(picture(pipe), plain(pipe))
    assert torch.equal(picture(pipe, negative="dark"), plain(pipe, negative="dark"))
    sdxl = lb.load_pipeline(tiny_sdxl(tmp_path), device="cpu")
    sdxl.set_progress_bar_config(disable=True)
    assert torch.equal(picture(sdxl, width=32, height=32), plain(sdxl, width=32, height=32))


def test_a_named_adapter_acts_and_is_gone_afterwards(pipe, with_adapters):
    base = plain(pipe)
    assert torch.equal(picture(pipe, f"{PROMPT}<lora:ink:0.8>"), with_adapters({"ink": 0.8}))
    assert adapter_names(pipe) == [] and not any(lora_layers(pipe).values())
    assert torch.equal(plain(pipe), base)


def test_several_adapters_act_from_either_prompt(pipe, with_adapters):
    ours = picture(pipe, f"<lora:ink:0.5>{PROMPT}<lora:mosaic:-0.3>", "dark<lora:creatures:0.4>")
    theirs = with_adapters({"ink": 0.5, "mosaic": -0.3, "creatures": 0.4}, negative="dark")
    assert torch.equal(ours, theirs)


def test_text_encoder_and_unet_have_their_own_weights(pipe, with_adapters):
    ours = picture(pipe, f"{PROMPT}<lora:patch_cat:0.2:0.9>")
    assert torch.equal(ours, with_adapters({"patch_cat": {"text_encoder": 0.2, "unet": 0.9}}))
    assert not torch.equal(ours, with_adapters({"patch_cat": 0.9}))


def test_block_weights_act(pipe, with_adapters):
    numbers = [1.0] + [n / 16 for n in range(16)]
    ours = picture(pipe, f"{PROMPT}<lora:ink:0.5:lbw={','.join(map(str, numbers))}>")
    assert torch.equal(ours, with_adapters({"ink": [n / 2 for n in numbers]}))
    assert torch.equal(
        picture(pipe, f"{PROMPT}<lora:ink:1:lbw=OUTALL>"), with_adapters({"ink": "OUTALL"})
    )


@pytest.mark.parametrize(
    "phrase, acts",
    [
        ("stop=2", [1, 1, 0, 0, 0]),
        ("start=2", [0, 0, 1, 1, 1]),
        ("step=1-3", [0, 1, 1, 0, 0]),
        ("lbw=ALL:stop=0.4", [1, 1, 0, 0, 0]),
        ("stop=9", [1] * 5),
    ],
)
@pytest.mark.parametrize("scheduler", [None, "plms"])
def test_an_adapter_acts_in_the_steps_that_the_prompt_says(pipe, phrase, acts, scheduler):
    lb.load_adapter(pipe, "ink")
    pipe.scheduler = (
        scheduler_like(pipe.scheduler.config, scheduler) if scheduler else pipe.scheduler
    )
    seen = []
    layer = next(iter(lora_layers(pipe)["unet"].values()))
    pipe.unet.down_blocks[0].register_forward_pre_hook(
        lambda *_: seen.append(layer.scaling["ink"] > 0)
    )
    generate(
        pipe, f"{PROMPT}<lora:ink:1:{phrase}>", num_inference_steps=5, output_type="latent", seed=0
    )
    assert seen[-5:] == [
        bool(act) for act in acts
    ]  # PLMS asks the model once more at the beginning
    assert not scales_of(pipe).steps


def test_an_adapter_on_the_pipeline_is_used_and_its_scale_put_back(pipe, with_adapters):
    lb.load_adapter(pipe, "ink", "mine")
    lb.set_scales(pipe, {"mine": 0.1})
    before = plain(pipe)
    assert torch.equal(picture(pipe, f"{PROMPT}<lora:mine:0.8>"), with_adapters({"ink": 0.8}))
    assert torch.equal(plain(pipe), before) and set(scales_of(pipe)["mine"]["unet"].values()) == {
        0.1
    }


def test_an_adapter_that_is_not_named_keeps_taking_part(pipe, with_adapters):
    lb.load_adapter(pipe, "mosaic")
    lb.set_scales(pipe, {"mosaic": 0.5})
    torch.testing.assert_close(
        picture(pipe, f"{PROMPT}<lora:ink>"), with_adapters({"mosaic": 0.5, "ink": 1})
    )
    assert adapter_names(pipe) == active_adapters(pipe) == ["mosaic"]


def test_an_adapter_that_was_off_is_off_again(pipe):
    lb.load_adapter(pipe, "ink")
    lb.set_scales(pipe, {"ink": 0})
    picture(pipe, f"{PROMPT}<lora:ink:1>")
    assert active_adapters(pipe) == []


def test_emphasis_changes_the_picture(pipe):
    assert not torch.equal(picture(pipe, "a cartoon (blue:1.5) creature with wings"), plain(pipe))


def test_a_seed_is_the_cpus_noise(pipe):
    assert torch.equal(picture(pipe, seed=7), pipe(PROMPT, generator=noise(7), **CALL).images)
    assert not torch.equal(picture(pipe, seed=7), picture(pipe, seed=8))
    assert torch.equal(
        generate(pipe, PROMPT, generator=noise(7), **CALL).images, picture(pipe, seed=7)
    )


def test_the_calls_own_arguments_pass_through(pipe):
    told = dict(guidance_scale=2.0, num_images_per_prompt=2)
    assert torch.equal(picture(pipe, **told), plain(pipe, **told))
    lb.load_adapter(pipe, "patch_cat")
    told = dict(cross_attention_kwargs={"scale": 0.3})
    assert torch.equal(picture(pipe, **told), plain(pipe, **told))
    assert not torch.equal(picture(pipe, clip_skip=1), picture(pipe))


def test_a_folder_of_ones_own_is_searched(pipe, tmp_path, with_adapters):
    source = lb.bundled("adapters/ink") / "pytorch_lora_weights.safetensors"
    shutil.copy(source, tmp_path / "pen v1.2.safetensors")
    ours = picture(pipe, f"{PROMPT}< lora : pen v1.2 : 0.8 >", adapters_folder=tmp_path)
    assert torch.equal(ours, with_adapters({"ink": 0.8})) and adapter_names(pipe) == []


def test_after_an_error_the_pipeline_is_as_before(pipe, tmp_path):
    lb.load_adapter(pipe, "mosaic")
    lb.set_scales(pipe, {"mosaic": 0.5})
    before = plain(pipe)

    def fail(*args):
        raise KeyError("while drawing")

    with pytest.raises(KeyError, match="while drawing"):
        generate(pipe, f"{PROMPT}<lora:ink:1><lora:mosaic:2>", callback_on_step_end=fail)
    shutil.copy(
        lb.bundled("adapters/ink") / "pytorch_lora_weights.safetensors",
        tmp_path / "ink.safetensors",
    )
    (tmp_path / "zebra.safetensors").write_bytes(b"cut short")
    with pytest.raises(ValueError, match="zebra"):
        generate(pipe, f"{PROMPT}<lora:ink:1><lora:zebra:1>", adapters_folder=tmp_path)
    assert adapter_names(pipe) == ["mosaic"] and torch.equal(plain(pipe), before)


@pytest.mark.parametrize(
    "prompt, error, message",
    [
        (
            "a cat <lora:inks:1>",
            FileNotFoundError,
            "adapter 'inks', which is neither on the pipeline .*the nearest are: ink",
        ),
        ("a cat <lora:qqqq:1>", FileNotFoundError, "'qqqq'.*there are: creatures"),
        ("a cat <lora:ink:x>", ValueError, "'<lora:ink:x>' cannot be used"),
        (["a cat"], ValueError, "one prompt, a text, not"),
        ("a [cat:dog:0.5]<lora:ink>", ValueError, "prompt editing"),
        ("a cat AND a dog<lora:ink>", ValueError, "composed"),
        ("a cat <lora:ink:1:step=3-2>", ValueError, "it would end, at 2, before it begins"),
    ],
)
def test_what_is_wrong_with_a_prompt_is_said_and_nothing_left(pipe, prompt, error, message):
    with pytest.raises(error, match=message):
        generate(pipe, prompt, **CALL)
    assert adapter_names(pipe) == []


@pytest.mark.parametrize(
    "name, message",
    [
        (
            "num_inference_step",
            "no 'num_inference_step' to StableDiffusionPipeline; the nearest are: num_inference_steps",
        ),
        ("prompt_embeds", "no 'prompt_embeds'"),
    ],
)
def test_an_argument_that_the_pipeline_would_pass_over_is_an_error(pipe, name, message):
    with pytest.raises(ValueError, match=message):
        generate(pipe, PROMPT, **{name: 3})


def test_a_seed_and_a_generator_are_one_too_many(pipe):
    with pytest.raises(ValueError, match="both seed and generator"):
        generate(pipe, PROMPT, seed=1, generator=noise())


# what a pipeline's call is given


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
