import gc
import threading

import numpy as np
import pytest
import torch

import lorabook as lb
from adapter_files import add_random
from conftest import tiny_sdxl
from lorabook.live.layers import active_adapters, adapter_names, lora_layers
from lorabook.live.scales import scales_of
from lorabook.live.state import lock_of
from lorabook.studio.adapters import BLEND
from lorabook.studio.generate import STEPS, Stopped, StudioGenerator, first_settings
from lorabook.sweeps.batched import generate_image

PROMPT = "a cartoon blue creature with wings"


@pytest.fixture
def two(pipe):
    for name in ("creatures", "ink"):
        lb.load_adapter(pipe, name)
    return pipe


@pytest.fixture
def settings(two):
    return first_settings(two, PROMPT, seeds=(0, 1), num_inference_steps=3)


def array(image):
    return np.asarray(image, int)


def ordinary(pipe, settings, **told):
    """What ordinary calls draw."""
    told = {
        "prompt": settings.prompt,
        "num_inference_steps": settings.num_inference_steps,
        "guidance_scale": settings.guidance_scale,
    } | told
    return [array(generate_image(pipe, seed=seed, **told)) for seed in settings.seeds]


def differences(result, others):
    return [abs(array(mine) - other).max() for mine, other in zip(result, others, strict=True)]


def test_it_begins_with_what_the_pipeline_has(two):
    lb.set_scales(two, {"ink": {"unet": {"down": 0.5}}})
    lb.disable_adapters(two, "creatures")
    found = first_settings(two)
    assert found.num_inference_steps == STEPS and found.adapters["ink"].blocks["down.1"] == 0.5
    assert (
        found.adapters["ink"].on
        and not found.adapters["creatures"].on
        and found.adapters["creatures"].scale == 1
    )


@pytest.mark.parametrize(
    "change",
    [
        {"scale": -0.5},
        {"blocks": {"up.1": 0.2, "down.0": 2}},
        {"parts": {"cross-attention": 0, "up.1.resnets_0": 0}},
        {"on": False},
        {"rank": 2},
    ],
)
def test_pictures_are_those_of_ordinary_calls_afterwards(two, settings, change):
    result = StudioGenerator(two).generate(settings.with_adapter("ink", **change))
    assert max(differences(result.images, ordinary(two, settings))) <= 1
    assert result.base is None and not result.preview


def test_the_pipeline_has_the_scales_that_the_settings_say(two, settings):
    StudioGenerator(two).generate(
        settings.with_adapter("ink", blocks={"up.1": 0.25}).with_adapter("creatures", on=False),
        preview=True,
    )
    factors = scales_of(two)["ink"]["unet"]
    assert {value for module, value in factors.items() if module.startswith("up_blocks.1.")} == {
        0.25
    }
    assert active_adapters(two) == ["ink"]


def test_all_else_of_the_pipeline_is_as_before(two, settings):
    checksum, scheduler, config = lb.base_checksum(two), two.scheduler, dict(two.config)
    StudioGenerator(two).generate(settings.with_(scheduler="euler", compare=True))
    assert (
        lb.base_checksum(two) == checksum
        and two.scheduler is scheduler
        and dict(two.config) == config
    )
    assert two._progress_bar_config == {"disable": True}


def test_another_scheduler_size_and_negative_prompt_are_obeyed(two, settings):
    settings = settings.with_(scheduler="euler", width=96, negative_prompt="wings", seeds=(3,))
    result = StudioGenerator(two).generate(settings)
    two.scheduler = lb.load_pipeline("tiny-sd", scheduler="euler").scheduler
    assert result.images[0].size == (96, 64)
    assert (
        max(
            differences(
                result.images,
                ordinary(two, settings, width=96, height=64, negative_prompt="wings"),
            )
        )
        <= 1
    )


def test_prompts_are_read_as_generate_reads_them(two, settings):
    prompt, negative = "a cartoon (blue:1.5) creature BREAK wings", "[dark]"
    result = StudioGenerator(two).generate(
        settings.with_(prompt=prompt, negative_prompt=negative, seeds=(3,))
    )
    drawn = lb.generate(
        two, prompt, negative, seed=3, num_inference_steps=3, guidance_scale=settings.guidance_scale
    ).images
    assert max(differences(result.images, drawn)) <= 1


@pytest.mark.parametrize(
    ("said", "told"),
    [
        (
            {"prompt": "a cat <lora:ink:0.4>"},
            "'<lora:ink:0.4>' is not read here.*load 'ink' from the shelf.*slider to 0.4",
        ),
        ({"negative_prompt": "<lora:ink>"}, "'<lora:ink>' is not read here"),
        ({"prompt": "a cat AND a dog"}, "composed prompt"),
        ({"prompt": "a [cat|dog]"}, "prompt editing"),
    ],
)
def test_a_prompt_that_cannot_be_read_is_refused_and_the_next_settings_work(
    two, settings, said, told
):
    generator = StudioGenerator(two)
    with pytest.raises(ValueError, match=told):
        generator.generate(settings.with_(**said))
    assert len(generator.generate(settings).images) == 2


def test_the_base_is_drawn_without_adapters_and_once(two, settings):
    generator = StudioGenerator(two)
    first = generator.generate(settings.with_(compare=True))
    again = generator.generate(settings.with_(compare=True).with_adapter("ink", scale=0.1))
    assert again.base is first.base
    lb.disable_adapters(two)
    assert max(differences(first.base, ordinary(two, settings))) <= 1
    lb.fuse(two, {"creatures": 1})
    assert (
        generator.generate(
            first_settings(two, PROMPT, seeds=(0, 1), num_inference_steps=3, compare=True)
        ).base
        is not first.base
    )


def test_a_preview_takes_fewer_steps_and_says_so(two, settings):
    generator = StudioGenerator(two)
    preview = generator.generate(settings, preview=True)
    assert (
        preview.preview
        and max(differences(preview.images, ordinary(two, settings, num_inference_steps=2))) <= 1
    )
    assert not generator.generate(settings.with_(num_inference_steps=2), preview=True).preview


def test_a_run_is_stopped_before_its_next_step(two, settings):
    asked = []
    with pytest.raises(Stopped):
        StudioGenerator(two).generate(settings, stopped=lambda: asked.append(1) or len(asked) > 2)
    assert len(asked) == 3
    assert (
        max(differences(StudioGenerator(two).generate(settings).images, ordinary(two, settings)))
        <= 1
    )


def test_a_prompt_is_encoded_once(two, settings):
    generator, calls = StudioGenerator(two), []
    two.text_encoder.register_forward_hook(lambda *_: calls.append(1))
    generator.generate(settings, preview=True)
    count = len(calls)
    generator.generate(settings.with_adapter("ink", scale=0.2))
    assert len(calls) == count
    generator.generate(settings.with_(prompt="a red boat"), preview=True)
    assert len(calls) > count


def test_scales_of_a_text_encoder_are_obeyed(pipe):
    add_random(pipe)
    generator, settings = StudioGenerator(pipe), first_settings(pipe, PROMPT, num_inference_steps=3)
    (name,) = settings.adapters
    for scale in (1.0, -1.0, 1.0):
        result = generator.generate(settings.with_adapter(name, blocks={"text_encoder": scale}))
        assert max(differences(result.images, ordinary(pipe, settings))) <= 1


def test_a_rank_is_cut_and_put_back_exactly(two, settings):
    generator = StudioGenerator(two)
    weights = [layer.lora_B["ink"].weight.clone() for layer in lora_layers(two)["unet"].values()]
    generator.generate(settings.with_adapter("ink", rank=1), preview=True)
    small = np.linalg.matrix_rank(
        next(iter(lora_layers(two)["unet"].values())).lora_B["ink"].weight.detach().flatten(1)
    )
    shares = []
    for rank in (1, 4):
        generator.apply(settings.with_adapter("ink", rank=rank))
        shares.append(generator.ranks.energy["ink"])
    assert small == 1 and 0 < shares[0] < shares[1] < 1
    generator.generate(
        settings.with_adapter("ink", rank=generator.ranks.largest("ink")), preview=True
    )
    assert all(
        (layer.lora_B["ink"].weight == before).all()
        for layer, before in zip(lora_layers(two)["unet"].values(), weights, strict=True)
    )


def test_a_blend_stands_for_its_adapters_until_it_is_undone(two, settings):
    generator = StudioGenerator(two)
    blended = generator.generate(settings.with_(blend_method="ties").with_adapter("ink", scale=0.5))
    assert active_adapters(two) == [BLEND] and scales_of(two)[BLEND]
    assert max(differences(blended.images, ordinary(two, settings))) <= 1
    lb.remove_adapter(two, BLEND)
    lb.blend(two, {"creatures": 1, "ink": 0.5}, method="ties", new_name="mine")
    assert max(differences(blended.images, ordinary(two, settings))) <= 1
    lb.remove_adapter(two, "mine")
    generator.generate(settings.with_(blend_method="cat"), preview=True)
    assert adapter_names(two) == active_adapters(two) == ["creatures", "ink"]


def test_closing_takes_blends_and_ranks_back(two, settings):
    before, generator = lora_layers(two)["unet"], StudioGenerator(two)
    weights = {name: layer.lora_A["ink"].weight.clone() for name, layer in before.items()}
    generator.generate(settings.with_(blend_method="svd").with_adapter("ink", rank=1), preview=True)
    generator.close()
    assert adapter_names(two) == ["creatures", "ink"] == active_adapters(two)
    assert all(
        (layer.lora_A["ink"].weight == weights[name]).all()
        for name, layer in lora_layers(two)["unet"].items()
    )


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda s: s.with_adapter("inc"), "no adapter 'inc'"),
        (lambda s: s.with_adapter("ink", blocks={"up.7": 0}), "no 'block_7'"),
        (lambda s: s.with_(scheduler="eula"), "unknown scheduler 'eula'"),
        (lambda s: s.with_(blend_method="tie"), "unknown method 'tie'"),
        (
            lambda s: s.with_adapter("ink", blocks={"text_encoder_2": 0}),
            "'text_encoder_2' is no component",
        ),
    ],
)
def test_what_the_pipeline_lacks_is_named_and_the_next_settings_work(two, settings, change, says):
    generator = StudioGenerator(two)
    with pytest.raises(ValueError, match=says):
        generator.generate(change(settings))
    assert max(differences(generator.generate(settings).images, ordinary(two, settings))) <= 1


def test_a_pipeline_without_adapters_is_drawn_too(pipe):
    settings = first_settings(pipe, PROMPT, num_inference_steps=2)
    assert (
        settings.adapters == {}
        and max(
            differences(StudioGenerator(pipe).generate(settings).images, ordinary(pipe, settings))
        )
        <= 1
    )


def test_sdxl_is_drawn_too(tmp_path):
    pipe = lb.load_pipeline(tiny_sdxl(tmp_path), device="cpu")
    settings = first_settings(
        pipe, PROMPT, num_inference_steps=2, seeds=(0, 1), negative_prompt="a boat"
    )
    result = StudioGenerator(pipe).generate(settings)
    assert max(differences(result.images, ordinary(pipe, settings, negative_prompt="a boat"))) <= 1


def refusing(pipe, monkeypatch, error, limit):
    """Let the UNet fail for so many samples at once; returns the sizes that it is asked for."""
    forward, sizes = pipe.unet.forward, []

    def run(sample, *args, **named):
        sizes.append(len(sample))
        if len(sample) >= limit:
            raise error
        return forward(sample, *args, **named)

    monkeypatch.setattr(pipe.unet, "forward", run)
    return sizes


@pytest.mark.parametrize(
    "error",
    [torch.OutOfMemoryError("CUDA out of memory"), MemoryError()],
)
def test_where_the_memory_runs_out_seeds_are_generated_one_after_another(
    two, settings, monkeypatch, error
):
    right = StudioGenerator(two).generate(settings).images
    sizes = refusing(two, monkeypatch, error, 4)
    result = StudioGenerator(two).generate(settings)
    assert max(differences(result.images, map(array, right))) <= 1
    assert sizes[0] == 4 and sizes[-1] == 2


def test_what_does_not_fit_alone_either_is_told(two, settings, monkeypatch):
    refusing(two, monkeypatch, MemoryError(), 0)
    with pytest.raises(ValueError, match="does not fit into the memory; choose a smaller size"):
        StudioGenerator(two).generate(settings)
    refusing(two, monkeypatch, RuntimeError("mat1 and mat2"), 0)
    with pytest.raises(RuntimeError, match="mat1"):
        StudioGenerator(two).generate(settings)


def test_nothing_of_the_base_is_held_twice_once_a_picture_is_there(two, settings):
    shapes = {layer.get_base_layer().weight.shape for layer in lora_layers(two)["unet"].values()}

    def held():
        gc.collect()
        return {
            value.data_ptr(): value.nbytes
            for value in gc.get_objects()
            if issubclass(type(value), torch.Tensor) and value.shape in shapes
        }

    before, generator = held(), StudioGenerator(two)
    generator.generate(settings.with_adapter("ink", rank=2))
    after = held()
    more = sum(after[place] for place in after.keys() - before)
    assert not generator._room and more < 0.01 * sum(
        value.nbytes for value in two.unet.parameters()
    )


def test_ranks_are_known_without_waiting_after_the_first_time(two, settings):
    generator = StudioGenerator(two)
    first = generator.ranks.largest("ink")
    generator.generate(settings.with_adapter("ink", rank=2), preview=True)
    found = []
    with lock_of(two):
        other = threading.Thread(target=lambda: found.append(generator.ranks.largest("ink")))
        other.start()
        other.join(10)
    assert found == [first]
