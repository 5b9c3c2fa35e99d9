import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from diffusers import DPMSolverMultistepScheduler, EulerAncestralDiscreteScheduler
from peft import LoraConfig

import lorabook as lb
from adapter_files import ALL, WRITERS, add_random, plain
from conftest import quick_config, tiny_sdxl
from lorabook.sweeps.axes import KINDS, GuidanceAxis

QUICK = dict(num_inference_steps=2)


def plainly(pipe, prompt, seed, **call):
    """An ordinary call."""
    call = {"num_inference_steps": 2, "guidance_scale": 4.0} | call
    pipe.set_progress_bar_config(disable=True)
    return pipe(prompt, generator=torch.Generator("cpu").manual_seed(seed), **call).images[0]


def apart(one, other) -> int:
    """The largest difference of two pictures, of 255."""
    return int(np.abs(np.asarray(one, int) - np.asarray(other, int)).max())


def count_passes(pipe, stop_after=None) -> list[int]:
    """The batch of each call of the UNet from now on; optionally an interrupt behind so many."""
    seen = []

    def look(module, args, kwargs=None):
        if stop_after is not None and len(seen) >= stop_after:
            raise KeyboardInterrupt
        seen.append(len(args[0]))

    pipe.unet.register_forward_pre_hook(look)
    return seen


def test_one_column_a_scale_and_one_row_a_seed(pipe, quick_run):
    lb.load_adapter(pipe, quick_run, "quick")
    grid = lb.sweep(
        pipe, "a red cat", columns={"quick": [0, 0.5, 1]}, rows={"seed": [3, 4]}, **QUICK
    )
    assert [len(row) for row in grid.images] == [3, 3]
    assert list(grid.columns) == ["quick 0", "quick 0.5", "quick 1"] and list(grid.rows) == [
        "seed 3",
        "seed 4",
    ]


def test_a_cell_is_the_ordinary_call_with_the_seed_as_its_generator(pipe):
    grid = lb.sweep(pipe, "a red cat", columns={"seed": [5]}, guidance_scale=3.0, **QUICK)
    plain = pipe(
        "a red cat", guidance_scale=3.0, generator=torch.Generator("cpu").manual_seed(5), **QUICK
    ).images[0]
    assert np.array_equal(grid.images[0][0], plain)


def test_scales_are_put_back(pipe, quick_run):
    lb.load_adapter(pipe, quick_run, "quick")
    lb.set_scales(pipe, {"quick": 0.3})
    before = pipe("a red cat", generator=torch.Generator().manual_seed(0), **QUICK).images[0]
    lb.sweep(pipe, "a red cat", columns={"quick": [0, 2]}, **QUICK)
    assert np.array_equal(
        before, pipe("a red cat", generator=torch.Generator().manual_seed(0), **QUICK).images[0]
    )


def test_prompts_guidance_and_steps_can_vary(pipe):
    grid = lb.sweep(
        pipe,
        columns={"prompt": ["a red cat", "a blue boat"]},
        rows={"guidance_scale": [1.5, 4.0]},
        **QUICK,
    )
    assert list(grid.columns) == ["a red cat", "a blue boat"] and list(grid.rows) == [
        "guidance 1.5",
        "guidance 4",
    ]
    steps = lb.sweep(pipe, "a red cat", columns={"num_inference_steps": [1, 3]})
    assert not np.array_equal(*steps.images[0])


def test_an_argument_of_the_call_varies_by_an_entry_in_kinds(pipe, monkeypatch):
    monkeypatch.setitem(KINDS, "guidance_rescale", GuidanceAxis)
    seen, values = count_passes(pipe), [0.0, 0.7]
    grid = lb.sweep(
        pipe,
        "a red cat",
        columns={"guidance_rescale": values},
        rows={"seed": [1, 2]},
        guidance_scale=4.0,
        **QUICK,
    )
    assert seen == [4] * 4  # two seeds, with and without the prompt, in two passes of two steps
    for seed, row in zip((1, 2), grid.images, strict=True):
        for value, image in zip(values, row, strict=True):
            assert apart(image, plainly(pipe, "a red cat", seed, guidance_rescale=value)) <= 1


def test_six_scales_are_drawn_in_one_pass_and_equal_six_calls(pipe):
    lb.load_adapter(pipe, "patch_cat")  # its text encoder is trained too
    scales, passes = [-0.5, 0, 0.3, 0.7, 1, 1.5], count_passes(pipe)
    grid = lb.sweep(
        pipe, "a drawing of sks cat", columns={"patch_cat": scales}, rows={"seed": [0, 7]}, **QUICK
    )
    assert passes == [24, 24]  # twelve samples with and without the prompt, two steps
    for scale, *images in zip(scales, *grid.images, strict=True):
        lb.set_scales(pipe, {"patch_cat": scale})
        for seed, image in zip((0, 7), images, strict=True):
            assert apart(image, plainly(pipe, "a drawing of sks cat", seed)) <= 1


def test_the_same_holds_for_sdxl_with_its_two_text_encoders(tmp_path):
    pipe = lb.load_pipeline(tiny_sdxl(tmp_path), device="cpu")
    add_random(pipe, ALL)  # resnets and samplers too
    grid = lb.sweep(
        pipe,
        "a red cat",
        columns={"random": [0, 0.5, 1]},
        num_inference_steps=2,
        height=64,
        width=64,
    )
    lb.set_scales(pipe, {"random": 0.5})
    assert apart(grid.images[0][1], plainly(pipe, "a red cat", 0, height=64, width=64)) <= 1


def test_every_kind_of_adapter_is_swept_in_one_pass(pipe, tmp_path):
    kinds = {
        name: WRITERS[name]
        for name in WRITERS
        if "LoHa" in name or "LoKr" in name or "DoRA" in name
    }
    assert len(kinds) >= 3
    for number, write in enumerate(kinds.values()):
        fresh = lb.load_pipeline("tiny-sd", device="cpu")
        (tmp_path / str(number)).mkdir()
        lb.load_adapter(
            fresh, write(plain(str(lb.bundled("tiny-sd"))), tmp_path / str(number)), "it"
        )
        passes = count_passes(fresh)
        grid = lb.sweep(fresh, "a red cat", columns={"it": [0, 0.6]}, **QUICK)
        assert passes == [4, 4]
        lb.set_scales(fresh, {"it": 0.6})
        assert apart(grid.images[0][1], plainly(fresh, "a red cat", 0)) <= 1


def test_a_dora_that_other_code_put_on_is_the_base_at_scale_0(pipe):
    base = plainly(pipe, "a red cat", 0)
    pipe.unet.add_adapter(
        LoraConfig(r=2, target_modules=["to_q", "to_v"], use_dora=True), "foreign"
    )
    for name, weight in pipe.unet.named_parameters():
        if "lora_magnitude" in name:
            weight.data *= 1.5
    grid = lb.sweep(pipe, "a red cat", columns={"foreign": [0, 1]}, **QUICK)
    assert apart(grid.images[0][0], base) <= 1 and apart(*grid.images[0]) > 2


def test_a_path_moves_its_layers_only(pipe):
    lb.load_adapter(pipe, "creatures")
    lb.set_scales(pipe, {"creatures": 0.8})
    grid = lb.sweep(pipe, "a red cat", columns={"creatures.unet.up.block_1": [0.8, 0.1]}, **QUICK)
    assert list(grid.columns) == ["creatures up.1 0.8", "creatures up.1 0.1"]
    assert apart(grid.images[0][0], plainly(pipe, "a red cat", 0)) <= 1
    lb.set_scales(pipe, {"creatures": {"unet": {"*": 0.8, "up": {"block_1": 0.125}}}})
    assert apart(grid.images[0][1], plainly(pipe, "a red cat", 0)) <= 1


@pytest.mark.parametrize(
    ("path", "scales"),
    [
        ("unet", {"unet": 0.2}),
        ("unet.mid", {"unet": {"mid": 0.2}}),
        ("unet.down", {"unet": {"down": 0.2}}),
        ("unet.cross-attention", {"unet": {"cross-attention": 0.2}}),
        ("unet.up.block_2.attentions_1", {"unet": {"up": {"block_2": {"attentions_1": 0.2}}}}),
        ("unet.*.attn2.to_k", {"unet": {"*.attn2.to_k": 0.2}}),
    ],
)
def test_a_path_is_what_the_scales_dictionary_says(pipe, path, scales):
    lb.load_adapter(pipe, "creatures")
    grid = lb.sweep(pipe, "a red cat", columns={f"creatures.{path}": [0.2]}, **QUICK)
    lb.set_scales(pipe, {"creatures": scales})
    assert apart(grid.images[0][0], plainly(pipe, "a red cat", 0)) <= 1


def test_two_axes_that_speak_of_one_layer_multiply(pipe):
    lb.load_adapter(pipe, "creatures")
    grid = lb.sweep(
        pipe, "a red cat", columns={"creatures": [0.5]}, rows={"creatures.unet.up": [0.4]}, **QUICK
    )
    lb.set_scales(pipe, {"creatures": {"unet": {"*": 0.5, "up": 0.4}}})
    assert apart(grid.images[0][0], plainly(pipe, "a red cat", 0)) <= 1


def test_shares_of_the_denoising(pipe):
    lb.load_adapter(pipe, "creatures")
    grid = lb.sweep(
        pipe,
        "a red cat",
        columns={"creatures.steps": [(0, 0.5), (0.5, 1), (0, 1)]},
        num_inference_steps=4,
    )
    assert list(grid.columns) == [
        "creatures 0% to 50%",
        "creatures 50% to 100%",
        "creatures 0% to 100%",
    ]
    assert apart(grid.images[0][2], plainly(pipe, "a red cat", 0, num_inference_steps=4)) <= 1
    lb.set_scales(pipe, {"creatures": {"steps": [[0, 0.5, 1.0], [0.5, 1, 0.0]]}})
    assert apart(grid.images[0][0], plainly(pipe, "a red cat", 0, num_inference_steps=4)) <= 1


def test_adapters_one_at_a_time_on_the_pipeline_and_from_files(pipe):
    lb.load_adapter(pipe, "ink")
    lb.set_scales(pipe, {"ink": 0.5})
    grid = lb.sweep(
        pipe,
        "a red cat",
        columns={"adapter": [None, "ink", "mosaic"]},
        rows={"scale": [1, 2]},
        **QUICK,
    )
    assert list(grid.columns) == ["base", "ink", "mosaic"] and lb.list_adapters(pipe)["ink"].active
    lb.set_scales(pipe, {"ink": 1.0})
    assert apart(grid.images[1][1], plainly(pipe, "a red cat", 0)) <= 1
    lb.unload_adapters(pipe)
    assert apart(grid.images[0][0], plainly(pipe, "a red cat", 0)) <= 1
    lb.load_adapter(pipe, "mosaic")
    assert apart(grid.images[0][2], plainly(pipe, "a red cat", 0)) <= 1


def test_adapters_from_files_each_have_their_own_text_encoder(pipe):
    names = ["patch_cat", "patch_cat_no_prior"]
    grid = lb.sweep(pipe, "a drawing of sks cat", columns={"adapter": names}, **QUICK)
    for name, image in zip(names, grid.images[0], strict=True):
        lb.load_adapter(pipe, name)
        assert apart(image, plainly(pipe, "a drawing of sks cat", 0)) <= 1
        lb.unload_adapters(pipe)


def test_the_checkpoints_of_a_run(pipe, tmp_path):
    run = lb.train_text_to_image(
        quick_config(output_dir=str(tmp_path / "run"), checkpointing_steps=2)
    )
    grid = lb.sweep(pipe, "a red cat", columns={"checkpoint": run}, **QUICK)
    assert list(grid.columns) == ["checkpoint-2", "checkpoint-3"] and not lb.list_adapters(pipe)
    lb.load_adapter(pipe, run)
    assert apart(grid.images[0][1], plainly(pipe, "a red cat", 0)) <= 1


def test_the_ratio_of_two_adapters_and_the_methods_of_blending(pipe):
    for name in ("ink", "creatures"):
        lb.load_adapter(pipe, name)
    ratio = lb.sweep(pipe, "a red cat", columns={"ink:creatures": [0, 0.25]}, **QUICK)
    lb.set_scales(pipe, {"ink": 0.75, "creatures": 0.25})
    assert apart(ratio.images[0][1], plainly(pipe, "a red cat", 0)) <= 1
    grid = lb.sweep(
        pipe,
        "a red cat",
        columns={"method": ["cat", "ties"]},
        rows={"ink:creatures": [0.25]},
        **QUICK,
    )
    assert apart(grid.images[0][0], ratio.images[0][1]) <= 2 and apart(*grid.images[0]) > 2
    plainly_blended = lb.sweep(pipe, "a red cat", columns={"method": ["cat"]}, **QUICK)
    assert apart(plainly_blended.images[0][0], ratio.images[0][1]) <= 2
    assert {row.name for row in lb.list_adapters(pipe)} == {"ink", "creatures"}


def test_schedulers_vary_and_the_pipelines_own_is_put_back(pipe):
    before = pipe.scheduler
    grid = lb.sweep(
        pipe, "a red cat", columns={"scheduler": ["euler a", "ddim"]}, num_inference_steps=4
    )
    assert pipe.scheduler is before and apart(*grid.images[0]) > 2
    pipe.scheduler = EulerAncestralDiscreteScheduler.from_config(before.config)
    assert apart(grid.images[0][0], plainly(pipe, "a red cat", 0, num_inference_steps=4)) <= 1


def test_schedulers_vary_by_a1111s_names(pipe):
    pipe.scheduler = DPMSolverMultistepScheduler.from_config(
        pipe.scheduler.config, use_karras_sigmas=True
    )
    grid = lb.sweep(
        pipe,
        "a red cat",
        columns={"scheduler": ["DPM++ 2M Karras", "dpm++ 2m"]},
        num_inference_steps=4,
    )
    assert apart(grid.images[0][0], plainly(pipe, "a red cat", 0, num_inference_steps=4)) <= 1
    pipe.scheduler = DPMSolverMultistepScheduler.from_config(
        pipe.scheduler.config, use_karras_sigmas=False
    )
    assert apart(grid.images[0][1], plainly(pipe, "a red cat", 0, num_inference_steps=4)) <= 1
    assert apart(*grid.images[0]) > 2


SYNTAX = [
    "a (red:1.6) cat",
    r"a [red] cat \(small\)",
    "a red cat BREAK on sand",
    "red " * 80 + "cat",
]


@pytest.mark.parametrize("alone", [False, True])
def test_prompts_are_read_as_generate_reads_them(pipe, alone):
    call = QUICK | ({"callback_on_step_end": lambda *_: {}} if alone else {})
    passes = count_passes(pipe)
    grid = lb.sweep(
        pipe, columns={"prompt": SYNTAX}, rows={"negative_prompt": ["(dark:1.4)"]}, **call
    )
    assert len(passes) == (
        8 if alone else 4
    )  # those of one chunk in a pass, those of two in another
    for image, prompt in zip(grid.images[0], SYNTAX, strict=True):
        drawn = lb.generate(pipe, prompt, "(dark:1.4)", seed=0, guidance_scale=4.0, **QUICK).images[
            0
        ]
        assert apart(image, drawn) <= 1 and apart(image, plainly(pipe, prompt, 0)) > 2


def test_sdxl_reads_them_too(tmp_path):
    pipe = lb.load_pipeline(tiny_sdxl(tmp_path), device="cpu")
    told = QUICK | {"guidance_scale": 4.0, "width": 32, "height": 32}
    grid = lb.sweep(
        pipe, "a (red:1.6) cat", columns={"negative_prompt": ["[dark]", "dark"]}, **told
    )
    assert (
        apart(
            grid.images[0][0],
            lb.generate(pipe, "a (red:1.6) cat", "[dark]", seed=0, **told).images[0],
        )
        <= 1
    )


@pytest.mark.parametrize(
    ("prompt", "negative", "told"),
    [
        (
            "a cat <lora:ink:0.8>",
            None,
            r"'<lora:ink:0.8>' is not read here.*columns=\{\"ink\": \[0.8\]\} or scales=.*generate",
        ),
        ("a cat", "dark <lora:ink>", "'<lora:ink>' is not read here"),
        ("a cat AND a dog", None, "composed prompt"),
        ("a cat", "black AND white", "write «and»"),
        ("a [cat:dog:0.5]", None, "prompt editing"),
        ("a cat <hypernet:x:1>", None, "begins with one of: lora, lyco"),
        (["a cat", "a dog"], None, "a prompt is a text"),
    ],
)
def test_a_prompt_that_cannot_be_read_is_refused(pipe, prompt, negative, told):
    calls = count_passes(pipe)
    with pytest.raises(ValueError, match=told) as caught:
        lb.sweep(pipe, prompt, negative_prompt=negative, columns={"seed": [0]}, **QUICK)
    assert len(str(caught.value)) <= 400 and "\n" not in str(caught.value) and not calls


@pytest.mark.parametrize("what", ["prompt", "negative_prompt"])
def test_an_axis_of_prompts_is_read_before_anything_is_drawn(pipe, what):
    calls = count_passes(pipe)
    with pytest.raises(ValueError, match="'<lora:ink>' is not read here"):
        lb.sweep(pipe, "a cat", columns={what: ["a cat", "a dog <lora:ink>"]}, **QUICK)
    assert not calls


@pytest.mark.parametrize(
    ("call", "told"),
    [
        (
            {"num_images_per_prompt": 4},
            r"no num_images_per_prompt=4: rows=\{\"seed\": \[0, 1, 2, 3\]\}",
        ),
        ({"generator": torch.Generator()}, "no generator=.*seed"),
        ({"output_type": "latent"}, "grid holds PIL images"),
        ({"return_dict": False}, "returns an ImageGrid"),
        ({"latents": torch.zeros(1, 4, 8, 8)}, "which the axis 'seed' varies"),
        ({"prompt_embeds": torch.zeros(1, 77, 128)}, "hands on no 'prompt_embeds'"),
        (
            {"guidance": 3},
            "hands on no 'guidance' to StableDiffusionPipeline; the nearest are: guidance_scale",
        ),
    ],
)
def test_an_argument_that_a_grid_cannot_show_is_refused(pipe, call, told):
    with pytest.raises(ValueError, match=told):
        lb.sweep(pipe, "a cat", columns={"seed": [0, 1]}, **call, **QUICK)


def test_arguments_at_their_usual_values_say_nothing(pipe):
    usual = dict(num_images_per_prompt=1, output_type="pil", return_dict=True, generator=None)
    grids = [
        lb.sweep(pipe, "a cat", columns={"seed": [0]}, **told, **QUICK) for told in ({}, usual)
    ]
    assert (
        apart(grids[0].images[0][0], grids[1].images[0][0]) == 0
        and grids[0].settings == grids[1].settings
    )


def test_a_pass_that_does_not_fit_is_halved_and_tried_again(pipe, monkeypatch):
    lb.load_adapter(pipe, "ink")
    plain_grid = lb.sweep(pipe, "a red cat", columns={"ink": [0, 1, 2]}, **QUICK)
    forward, tried = pipe.unet.forward, []

    def small(sample, *args, **kwargs):
        tried.append(len(sample))
        if len(sample) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return forward(sample, *args, **kwargs)

    monkeypatch.setattr(pipe.unet, "forward", small)
    grid = lb.sweep(pipe, "a red cat", columns={"ink": [0, 1, 2]}, **QUICK)
    assert tried == [6, 2, 2, 2, 2, 2, 2]
    assert all(apart(a, b) <= 1 for a, b in zip(grid.images[0], plain_grid.images[0], strict=True))


def test_an_interrupt_keeps_what_is_drawn(pipe, monkeypatch, capsys):
    monkeypatch.setattr("lorabook.sweeps.batched.AT_ONCE", 2 * 16 * 16)
    calls = count_passes(pipe, stop_after=3)
    grid = lb.sweep(pipe, "a red cat", columns={"seed": [0, 1, 2, 3]}, **QUICK)
    assert len(calls) == 3 and [image is None for image in grid.images[0]] == [
        False,
        False,
        True,
        True,
    ]
    assert not grid.is_whole and "kept" in capsys.readouterr().out and grid._repr_png_()


def test_a_compiled_unet_is_drawn_one_by_one(small):
    expected = lb.sweep(small, "a red cat", columns={"random": [0, 1]}, **QUICK)
    passes = count_passes(small)
    small.unet = torch.compile(small.unet, backend="eager")
    grid = lb.sweep(small, "a red cat", columns={"random": [0, 1]}, **QUICK)
    assert passes == [2, 2, 2, 2] and apart(grid.images[0][1], expected.images[0][1]) <= 1
    assert apart(grid.images[0][0], grid.images[0][1]) > 10


def test_nothing_stays_on_the_pipeline(pipe):
    for name in ("ink", "creatures"):
        lb.load_adapter(pipe, name)
    lb.set_scales(pipe, {"ink": {"unet": {"up": 0.3}, "steps": [[0, 0.5, 0.2]]}, "creatures": 0.0})
    before, image = str(lb.list_adapters(pipe)), plainly(pipe, "a red cat", 0)
    for what, value in (
        ("ink", 0.5),
        ("creatures.unet.mid", 2),
        ("adapter", None),
        ("ink:creatures", 0.5),
        ("scale", 2),
    ):
        lb.sweep(pipe, "a red cat", columns={what: [value]}, **QUICK)
        assert str(lb.list_adapters(pipe)) == before
    assert apart(plainly(pipe, "a red cat", 0), image) == 0


def test_a_saved_grid_repeats_itself(pipe, tmp_path):
    lb.load_adapter(pipe, "ink")
    lb.set_scales(pipe, {"ink": {"unet": {"up": 0.3}}})
    grid = lb.sweep(
        pipe,
        "a red cat",
        columns={"seed": [0, 1]},
        rows={"ink.unet.mid": [0, 2]},
        negative_prompt="blue",
        **QUICK,
    )
    saved = lb.ImageGrid.load(grid.save(tmp_path / "grid.png"))
    assert list(saved.columns) == list(grid.columns) and list(saved.rows) == list(grid.rows)
    lb.set_scales(pipe, {"ink": 1.0})
    again = lb.sweep(pipe, **saved.settings)
    for old, kept, new in zip(
        sum(grid.images, []), sum(saved.images, []), sum(again.images, []), strict=True
    ):
        assert apart(old, kept) == 0 and apart(old, new) <= 1


@pytest.mark.parametrize(
    ("columns", "told"),
    [
        ({"sead": [1]}, "'sead' cannot vary, since the pipeline has no adapter.*load_adapter"),
        ({"ink": [1]}, "'ink' cannot vary, since the pipeline has no adapter"),
        ({"scale": [1]}, "'scale' cannot vary, since the pipeline has no adapter"),
        ({"seed": []}, "'seed' has no values"),
        ({"seed": [0.5]}, "a seed must be a whole number from 0, not 0.5"),
        ({"seed": [True]}, "whole number"),
        ({"seed": [-1]}, "whole number"),
        ({"seed": 3}, "must be a list, not 3"),
        ({"prompt": "a cat"}, "must be a list"),
        ({"prompt": [3]}, "are texts, not 3"),
        ({"num_inference_steps": [0]}, "whole numbers from 1"),
        ({"guidance_scale": [float("nan")]}, "numbers, not nan"),
        ({"scheduler": ["dpm"]}, "unknown scheduler 'dpm'"),
        ({"checkpoint": [None]}, "folders or files of checkpoints"),
        ({"seed": list(range(151))}, "would draw 151 pictures.*confirm=True"),
    ],
)
def test_an_axis_that_cannot_be_is_one_sentence(pipe, columns, told):
    with pytest.raises(ValueError, match=told) as caught:
        lb.sweep(pipe, "a red cat", columns=columns)
    assert len(str(caught.value)) <= 400 and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("columns", "rows", "told"),
    [
        ({"sead": [1]}, None, "'sead' cannot vary; what can is prompt.*ink"),
        ({"ink.unet.up.block_9": [1]}, None, "the model has no 'block_9'; it has: block_0"),
        ({"ink.text": [1]}, None, "'text' is no component"),
        ({"ink": ["loud"]}, None, "unknown preset 'loud'"),
        ({"ink:inkk": [1]}, None, "'inkk' cannot vary"),
        ({"ink:ink": [1]}, None, "no ratio of two adapters"),
        ({"ink.steps": [(0.5, 0.2)]}, None, "is no share of the run"),
        ({"method": ["tiez"]}, None, "'method' are cat"),
        ({"method": ["cat"]}, None, "blends at least two adapters; ink takes part"),
        ({"adapter": ["ink"]}, {"ink": [1]}, "cannot be combined.*'scale'"),
        ({"adapter": ["ink"]}, {"checkpoint": ["x"]}, "cannot be combined"),
        ({"seed": [1]}, {"seed": [2]}, "both vary 'seed'"),
        ({"adapter": ["nowhere"]}, None, "nowhere"),
    ],
)
def test_an_axis_that_does_not_fit_the_adapters_is_one_sentence(pipe, columns, rows, told):
    lb.load_adapter(pipe, "ink")
    with pytest.raises((ValueError, FileNotFoundError), match=told) as caught:
        lb.sweep(pipe, "a red cat", columns=columns, rows=rows)
    assert len(str(caught.value)) <= 400 and "\n" not in str(caught.value)


@pytest.mark.parametrize("columns", [{}, {"seed": [1], "prompt": ["x"]}, [1, 2], {3: [1]}])
def test_an_axis_is_a_dictionary_with_one_entry(pipe, columns):
    with pytest.raises(ValueError, match="one entry|no name"):
        lb.sweep(pipe, "a red cat", columns=columns)


def test_what_an_axis_varies_is_not_given_beside_it(pipe, monkeypatch):
    monkeypatch.setitem(KINDS, "guidance_rescale", GuidanceAxis)
    with pytest.raises(ValueError, match="^guidance_rescale=0.9 is what an axis varies; leave"):
        lb.sweep(pipe, "a cat", columns={"guidance_rescale": [0, 0.7]}, guidance_rescale=0.9)


def test_a_prompt_is_needed(pipe):
    with pytest.raises(ValueError, match="needs a prompt"):
        lb.sweep(pipe, columns={"seed": [1]})


def test_several_processes_share_the_pictures_out(tmp_path):
    script = tmp_path / "sweep.py"
    script.write_text(f"""
import os
import numpy
import lorabook as lb
pipe = lb.load_pipeline("tiny-sd", device="cpu")
grid = lb.sweep(pipe, "a red cat", columns={{"seed": [0, 1, 2]}}, num_inference_steps=2)
images = [numpy.asarray(image) for image in grid.images[0]]
numpy.save(f"{tmp_path}/{{os.environ['RANK']}}.npy", images)
""")
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc_per_node",
        "2",
        str(script),
    ]
    run = subprocess.run(
        command,
        capture_output=True,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"},
    )
    assert run.returncode == 0, run.stderr[-2000:]
    first, second = (np.load(tmp_path / f"{rank}.npy") for rank in (0, 1))
    assert (
        first.shape[0] == 3
        and np.array_equal(first, second)
        and not np.array_equal(first[0], first[1])
    )
