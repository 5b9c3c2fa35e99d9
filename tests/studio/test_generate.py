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
from lorabook.studio.apply import BLEND
from lorabook.studio.generate import STEPS, Painter, Stopped, settings_of
from lorabook.sweeps.batched import generate_image

PROMPT = "a cartoon blue creature with wings"


@pytest.fixture
def two(pipe):
    for name in ("creatures", "ink"):
        lb.load_adapter(pipe, name)
    return pipe


@pytest.fixture
def settings(two):
    return settings_of(two, PROMPT, seeds=(0, 1), num_inference_steps=3)


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


def differences(painted, others):
    return [abs(array(mine) - other).max() for mine, other in zip(painted, others, strict=True)]


def test_it_begins_with_what_the_pipeline_has(two):
    lb.set_scales(two, {"ink": {"unet": {"down": 0.5}}})
    lb.disable_adapters(two, "creatures")
    found = settings_of(two)
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
    painted = Painter(two).paint(settings.with_adapter("ink", **change))
    assert max(differences(painted.images, ordinary(two, settings))) <= 1
    assert painted.base is None and not painted.preview


def test_the_pipeline_has_the_scales_that_the_settings_say(two, settings):
    Painter(two).paint(
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
    Painter(two).paint(settings.with_(scheduler="euler", compare=True))
    assert (
        lb.base_checksum(two) == checksum
        and two.scheduler is scheduler
        and dict(two.config) == config
    )
    assert two._progress_bar_config == {"disable": True}


def test_another_scheduler_size_and_negative_prompt_are_obeyed(two, settings):
    settings = settings.with_(scheduler="euler", width=96, negative_prompt="wings", seeds=(3,))
    painted = Painter(two).paint(settings)
    two.scheduler = lb.load_pipeline("tiny-sd", scheduler="euler").scheduler
    assert painted.images[0].size == (96, 64)
    assert (
        max(
            differences(
                painted.images,
                ordinary(two, settings, width=96, height=64, negative_prompt="wings"),
            )
        )
        <= 1
    )


def test_prompts_are_read_as_generate_reads_them(two, settings):
    prompt, negative = "a cartoon (blue:1.5) creature BREAK wings", "[dark]"
    painted = Painter(two).paint(
        settings.with_(prompt=prompt, negative_prompt=negative, seeds=(3,))
    )
    drawn = lb.generate(
        two, prompt, negative, seed=3, num_inference_steps=3, guidance_scale=settings.guidance_scale
    ).images
    assert max(differences(painted.images, drawn)) <= 1


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
    painter = Painter(two)
    with pytest.raises(ValueError, match=told):
        painter.paint(settings.with_(**said))
    assert len(painter.paint(settings).images) == 2


def test_the_base_is_drawn_without_adapters_and_once(two, settings):
    painter = Painter(two)
    first = painter.paint(settings.with_(compare=True))
    again = painter.paint(settings.with_(compare=True).with_adapter("ink", scale=0.1))
    assert again.base is first.base
    lb.disable_adapters(two)
    assert max(differences(first.base, ordinary(two, settings))) <= 1
    lb.fuse(two, {"creatures": 1})
    assert (
        painter.paint(
            settings_of(two, PROMPT, seeds=(0, 1), num_inference_steps=3, compare=True)
        ).base
        is not first.base
    )


def test_a_preview_takes_fewer_steps_and_says_so(two, settings):
    painter = Painter(two)
    preview = painter.paint(settings, preview=True)
    assert (
        preview.preview
        and max(differences(preview.images, ordinary(two, settings, num_inference_steps=2))) <= 1
    )
    assert not painter.paint(settings.with_(num_inference_steps=2), preview=True).preview


def test_a_run_is_stopped_before_its_next_step(two, settings):
    asked = []
    with pytest.raises(Stopped):
        Painter(two).paint(settings, stopped=lambda: asked.append(1) or len(asked) > 2)
    assert len(asked) == 3
    assert max(differences(Painter(two).paint(settings).images, ordinary(two, settings))) <= 1


def test_a_prompt_is_encoded_once(two, settings):
    painter, calls = Painter(two), []
    two.text_encoder.register_forward_hook(lambda *_: calls.append(1))
    painter.paint(settings, preview=True)
    count = len(calls)
    painter.paint(settings.with_adapter("ink", scale=0.2))
    assert len(calls) == count
    painter.paint(settings.with_(prompt="a red boat"), preview=True)
    assert len(calls) > count


def test_scales_of_a_text_encoder_are_obeyed(pipe):
    add_random(pipe)
    painter, settings = Painter(pipe), settings_of(pipe, PROMPT, num_inference_steps=3)
    (name,) = settings.adapters
    for scale in (1.0, -1.0, 1.0):
        painted = painter.paint(settings.with_adapter(name, blocks={"text_encoder": scale}))
        assert max(differences(painted.images, ordinary(pipe, settings))) <= 1


def test_a_rank_is_cut_and_put_back_exactly(two, settings):
    painter = Painter(two)
    weights = [layer.lora_B["ink"].weight.clone() for layer in lora_layers(two)["unet"].values()]
    painter.paint(settings.with_adapter("ink", rank=1), preview=True)
    small = np.linalg.matrix_rank(
        next(iter(lora_layers(two)["unet"].values())).lora_B["ink"].weight.detach().flatten(1)
    )
    kept = [painter.energy_kept("ink", rank) for rank in (1, 4, 8)]
    assert small == 1 and 0 < kept[0] < kept[1] < 1 and kept[2] == pytest.approx(1)
    painter.paint(settings.with_adapter("ink", rank=painter.largest_rank("ink")), preview=True)
    assert all(
        (layer.lora_B["ink"].weight == before).all()
        for layer, before in zip(lora_layers(two)["unet"].values(), weights, strict=True)
    )


def test_a_blend_stands_for_its_adapters_until_it_is_undone(two, settings):
    painter = Painter(two)
    blended = painter.paint(settings.with_(blend_method="ties").with_adapter("ink", scale=0.5))
    assert active_adapters(two) == [BLEND] and scales_of(two)[BLEND]
    assert max(differences(blended.images, ordinary(two, settings))) <= 1
    lb.remove_adapter(two, BLEND)
    lb.blend(two, {"creatures": 1, "ink": 0.5}, method="ties", new_name="mine")
    assert max(differences(blended.images, ordinary(two, settings))) <= 1
    lb.remove_adapter(two, "mine")
    painter.paint(settings.with_(blend_method="cat"), preview=True)
    assert adapter_names(two) == active_adapters(two) == ["creatures", "ink"]


def test_closing_takes_blends_and_ranks_back(two, settings):
    before, painter = lora_layers(two)["unet"], Painter(two)
    weights = {name: layer.lora_A["ink"].weight.clone() for name, layer in before.items()}
    painter.paint(settings.with_(blend_method="svd").with_adapter("ink", rank=1), preview=True)
    painter.close()
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
    painter = Painter(two)
    with pytest.raises(ValueError, match=says):
        painter.paint(change(settings))
    assert max(differences(painter.paint(settings).images, ordinary(two, settings))) <= 1


def test_a_pipeline_without_adapters_is_drawn_too(pipe):
    settings = settings_of(pipe, PROMPT, num_inference_steps=2)
    assert (
        settings.adapters == {}
        and max(differences(Painter(pipe).paint(settings).images, ordinary(pipe, settings))) <= 1
    )


def test_sdxl_is_drawn_too(tmp_path):
    pipe = lb.load_pipeline(tiny_sdxl(tmp_path), device="cpu")
    settings = settings_of(
        pipe, PROMPT, num_inference_steps=2, seeds=(0, 1), negative_prompt="a boat"
    )
    painted = Painter(pipe).paint(settings)
    assert max(differences(painted.images, ordinary(pipe, settings, negative_prompt="a boat"))) <= 1


def refusing(pipe, monkeypatch, error, fits):
    """Let the UNet run out of memory where what it is asked does not fit."""
    forward, asked = pipe.unet.forward, []

    def run(sample, *args, **named):
        folds = any("forward" in layer.__dict__ for layer in lora_layers(pipe)["unet"].values())
        asked.append((folds, len(sample)))
        if not fits(folds, len(sample)):
            raise error
        return forward(sample, *args, **named)

    monkeypatch.setattr(pipe.unet, "forward", run)
    return asked


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory"),
        RuntimeError("MPS backend out of memory"),
        MemoryError(),
        RuntimeError(
            "[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"
        ),
    ],
)
def test_where_the_memory_runs_out_while_folded_it_draws_on_unfolded(
    two, settings, monkeypatch, error
):
    painter, right = Painter(two), Painter(two).paint(settings).images
    asked = refusing(two, monkeypatch, error, lambda folds, _: not folds)
    painted = painter.paint(settings)
    assert (
        max(differences(painted.images, map(array, right))) <= 1
        and asked[0] == (True, 4)
        and asked[-1] == (False, 4)
    )
    assert not painter._room and lb.scales_of(two)["ink"]


def test_only_what_does_not_fit_unfolded_either_is_told(two, settings, monkeypatch):
    asked = refusing(
        two,
        monkeypatch,
        torch.OutOfMemoryError("CUDA out of memory"),
        lambda folds, pictures: pictures < 4,
    )
    assert len(Painter(two).paint(settings).images) == 2 and (False, 2) in asked
    refusing(two, monkeypatch, MemoryError(), lambda *_: False)
    with pytest.raises(ValueError, match="does not fit into the memory; choose a smaller size"):
        Painter(two).paint(settings)
    refusing(two, monkeypatch, RuntimeError("mat1 and mat2"), lambda *_: False)
    with pytest.raises(RuntimeError, match="mat1"):
        Painter(two).paint(settings)


def test_nothing_of_the_base_is_held_twice_once_a_picture_is_there(two, settings):
    shapes = {layer.get_base_layer().weight.shape for layer in lora_layers(two)["unet"].values()}

    def held():
        gc.collect()
        return {
            value.data_ptr(): value.nbytes
            for value in gc.get_objects()
            if issubclass(type(value), torch.Tensor) and value.shape in shapes
        }

    before, painter = held(), Painter(two)
    painter.paint(settings.with_adapter("ink", rank=2))
    after = held()
    more = sum(after[place] for place in after.keys() - before)
    assert not painter._room and more < 0.01 * sum(value.nbytes for value in two.unet.parameters())


def test_ranks_are_known_without_waiting_after_the_first_time(two, settings):
    painter = Painter(two)
    first = painter.largest_rank("ink"), painter.energy_kept("ink", 2)
    painter.paint(settings.with_adapter("ink", rank=2), preview=True)
    found = []
    with lock_of(two):
        other = threading.Thread(
            target=lambda: found.append(
                (painter.largest_rank("ink"), painter.energy_kept("ink", 2))
            )
        )
        other.start()
        other.join(10)
    assert found == [first]
