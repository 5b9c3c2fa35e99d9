import io
import threading

import ipywidgets
import numpy as np
import pytest
import torch
from diffusers import LTXPipeline
from PIL import Image
from safetensors.torch import load_file

import lorabook as lb
from adapter_files import ATTENTION, add_random
from lorabook.lora.source import read_source
from lorabook.studio.adapters import touched_blocks
from lorabook.studio.settings import StudioSettings
from lorabook.studio.shelf import adapter_files, thumbnail
from lorabook.studio.studio import ScaleStudio
from lorabook.training.run import TrainingRun

PROMPT = "a red cat"


@pytest.fixture(scope="module")
def own_pipe():
    """The bundled pipeline, for all of these tests."""
    pipe = lb.load_pipeline("tiny-sd", device="cpu")
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture
def studio(own_pipe):
    """A studio with two adapters, drawing in three steps."""
    lb.unload_adapters(own_pipe)
    lb.load_adapter(own_pipe, "ink")
    lb.load_adapter(own_pipe, "mosaic")
    made = ScaleStudio(own_pipe, prompt=PROMPT, num_inference_steps=3)
    yield made
    made.close()


@pytest.fixture
def view(studio):
    return studio.widget


def ordinary(studio, seed=0):
    """What the pipeline draws by itself, as it is now."""
    settings = studio.settings
    return studio.pipe(
        settings.prompt,
        num_inference_steps=settings.num_inference_steps,
        guidance_scale=settings.guidance_scale,
        generator=torch.Generator("cpu").manual_seed(seed),
    ).images[0]


def apart(one, other):
    """The largest difference of two pictures, in steps of 255."""
    return int(np.abs(np.asarray(one, dtype=int) - np.asarray(other, dtype=int)).max())


def slider(view, block, adapter="ink"):
    view.adapter.choose(adapter)
    return view.adapter.blocks[adapter][block].slider


def inside(widget):
    yield widget
    for child in getattr(widget, "children", ()):
        yield from inside(child)


def test_the_picture_is_that_of_an_ordinary_call(studio):
    assert apart(studio.picture, ordinary(studio)) <= 2


def test_there_is_a_slider_for_each_block_that_the_adapter_touches(studio, view):
    assert list(view.adapter.blocks["ink"]) == touched_blocks(studio.pipe, "ink")
    assert {"down.0", "mid", "up.3"} <= set(view.adapter.blocks["ink"])


def test_a_block_that_is_not_touched_has_none(pipe):
    add_random(pipe, ATTENTION)
    studio = ScaleStudio(pipe, num_inference_steps=1)
    sliders = studio.widget.adapter.blocks["random"]
    assert {"down.0", "text_encoder"} <= set(sliders) and not {"down.3", "up.0"} & set(sliders)
    studio.close()


def test_a_moved_slider_is_on_the_pipeline_and_in_the_picture(studio, view):
    before = studio.picture
    slider(view, "up.1").value = -0.5
    assert studio.settings.adapters["ink"].blocks == {"up.1": -0.5}
    assert apart(studio.picture, before) > 20 and apart(studio.picture, ordinary(studio)) <= 2
    assert lb.scales_of(studio.pipe)["ink"]["unet"]["up_blocks.1.resnets.0.conv1"] == pytest.approx(
        -0.5
    )


def test_the_image_widget_holds_the_picture(studio, view, tmp_path):
    slider(view, "mid").value = 0.2
    studio.wait()
    (tmp_path / "shown.png").write_bytes(view.stage.now[0].value)
    assert apart(Image.open(tmp_path / "shown.png"), studio.picture) == 0


def test_settings_move_the_sliders_without_an_echo(studio, view):
    studio.settings = studio.settings.with_adapter("ink", scale=0.5, blocks={"up.1": 0.3}).with_(
        seeds=(3, 4)
    )
    assert (
        slider(view, "up.1").value,
        view.adapter.scale.slider.value,
        view.prompts.controls["seeds"].value,
    ) == (0.3, 0.5, "3, 4")
    assert len(studio.grid.images[0]) == 2
    studio.undo()
    assert studio.settings.seeds == (0,) and slider(view, "up.1").value == 1 and view.undo.disabled


def test_undo_and_redo_go_back_and_forth(studio, view):
    slider(view, "up.1").value = 0.5
    slider(view, "mid").value = 0.25
    view.undo.click()
    assert (
        studio.settings.adapters["ink"].blocks == {"up.1": 0.5} and slider(view, "mid").value == 1
    )
    view.redo.click()
    assert (
        studio.settings.adapters["ink"].blocks == {"up.1": 0.5, "mid": 0.25} and view.redo.disabled
    )


def test_buttons_bring_sliders_back(studio, view):
    slider(view, "up.1").value, slider(view, "mid").value = 0.5, 0.5
    view.adapter.blocks["ink"]["mid"].back.click()
    assert studio.settings.adapters["ink"].blocks == {"up.1": 0.5}
    view.adapter.level.click()
    assert studio.settings.adapters["ink"].blocks == {} and slider(view, "up.1").value == 1


def test_a_preset_moves_the_sliders_and_is_left_with_the_next_movement(studio, view):
    view.adapter.presets.value = "style blocks"
    assert slider(view, "down.0").value == 0 and slider(view, "up.3").value == 1
    slider(view, "down.0").value = 0.5
    assert view.adapter.presets.value == "as the sliders are"


def test_single_layers_have_sliders_too(studio, view):
    view.adapter.fine.value = True
    parts = view.adapter.parts["ink"]
    assert {"cross-attention", "up.1.attentions_0", "up.1.sampler", "mid.resnets_1"} <= set(parts)
    parts["up.1.attentions_0"].slider.value = 0
    assert studio.settings.adapters["ink"].parts == {"up.1.attentions_0": 0}
    assert apart(studio.picture, ordinary(studio)) <= 2


def test_a_smaller_rank_tells_what_is_kept(studio, view):
    before = studio.picture
    assert view.adapter.rank.max == 8 and "as trained" in view.adapter.energy.value
    view.adapter.rank.value = 1
    assert studio.settings.adapters["ink"].rank == 1 and "%" in view.adapter.energy.value
    assert apart(studio.picture, before) > 5 and apart(studio.picture, ordinary(studio)) <= 2
    view.adapter.rank.value = 8
    assert studio.settings.adapters["ink"].rank is None and apart(studio.picture, before) <= 2


def test_a_crossfade_sets_both_scales(studio, view):
    view.mixer.fade.value = 0.25
    adapters = studio.settings.adapters
    assert (adapters["ink"].scale, adapters["mosaic"].scale) == (0.75, 0.25)
    view.mixer.scales["ink"].slider.value = 0.5
    assert studio.settings.adapters["ink"].scale == 0.5
    assert studio.wait(60) and apart(studio.picture, ordinary(studio)) <= 2


def test_a_blend_method_is_really_on_the_pipeline(studio, view):
    before = studio.picture
    view.mixer.method.value = "ties"
    assert apart(studio.picture, before) > 5 and apart(studio.picture, ordinary(studio)) <= 2
    view.mixer.method.value = view.mixer.method.options[0][1]
    assert apart(studio.picture, before) <= 2 and set(studio.settings.adapters) == {"ink", "mosaic"}


def test_an_adapter_switched_off_takes_no_part(studio, view):
    view.adapter.on.value = False
    assert (
        studio.wait(60)
        and lb.scales_of(studio.pipe)["ink"]["unet"]["mid_block.resnets.0.conv1"] == 0
    )


def test_a_mistake_is_told_in_one_sentence_and_the_next_movement_works(studio, view):
    view.prompts.controls["seeds"].value = "one, two"
    assert (
        "seeds are whole numbers" in view.status.value
        and "lorabook-wrong" in view.status._dom_classes
    )
    assert studio.settings.seeds == (0,)
    view.prompts.controls["seeds"].value = "7"
    assert (
        studio.wait(60)
        and studio.settings.seeds == (7,)
        and "lorabook-wrong" not in view.status._dom_classes
    )


def test_settings_that_cannot_be_drawn_are_told_and_the_next_ones_are_drawn(studio, view):
    studio.settings = studio.settings.with_(scheduler="nonsense")
    with pytest.raises(ValueError, match="unknown scheduler 'nonsense'"):
        studio.picture  # noqa: B018
    assert "unknown scheduler" in view.status.value
    studio.settings = studio.settings.with_(scheduler="ddim")
    assert studio.picture.size == (64, 64) and "unknown" not in view.status.value


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        (StudioSettings(adapters={"nobody": {}}), "has no adapter 'nobody'"),
        ({"prompt": "a cat"}, "must be StudioSettings"),
    ],
)
def test_settings_that_do_not_fit_are_refused(studio, settings, sentence):
    before = studio.settings
    with pytest.raises(ValueError, match=sentence):
        studio.settings = settings
    assert studio.settings == before


def test_comparing_shows_base_now_and_difference(studio, view):
    view.compare.value = True
    grid = studio.grid
    assert (
        list(grid.columns) == ["base", "now", "difference"]
        and len(view.stage.children[0].children) == 3
    )
    lb.disable_adapters(studio.pipe)
    assert apart(grid.images[0][0], ordinary(studio)) <= 2


def test_what_is_kept_can_be_gone_back_to(studio, view):
    slider(view, "up.1").value = 0.3
    view.keep.click()
    slider(view, "up.1").value = 2.0
    (kept,) = studio.gallery
    card = view.gallery._wall.children[0]
    back, drop = [widget for widget in inside(card) if isinstance(widget, ipywidgets.Button)]
    back.click()
    assert studio.settings == kept.settings and apart(studio.picture, kept.picture) <= 2
    drop.click()
    assert studio.gallery == []


def test_a_saved_picture_brings_its_settings(studio, tmp_path):
    studio.settings = studio.settings.with_adapter("ink", blocks={"mid": 0.25})
    path = studio.save_picture(tmp_path / "cat.png")
    assert (
        ScaleStudio.settings_in(path) == studio.settings
        and apart(Image.open(path), studio.picture) == 0
    )


def test_a_picture_without_settings_is_told(tmp_path):
    Image.new("RGB", (8, 8)).save(tmp_path / "plain.png")
    with pytest.raises(ValueError, match="plain.png holds no settings"):
        ScaleStudio.settings_in(tmp_path / "plain.png")
    with pytest.raises(FileNotFoundError, match="no picture .*gone.png"):
        ScaleStudio.settings_in(tmp_path / "gone.png")


def test_the_saved_adapter_draws_the_same_alone(studio, view, tmp_path):
    slider(view, "up.1").value = 0.3
    slider(view, "mid", "mosaic").value = -1.0
    drawn, report = studio.picture, studio.save_adapter(tmp_path / "sum")
    lb.unload_adapters(studio.pipe)
    lb.load_adapter(studio.pipe, report)
    assert apart(drawn, ordinary(studio)) <= 2


def test_nothing_to_save_is_told(studio):
    for name in studio.settings.adapters:
        studio.settings = studio.settings.with_adapter(name, on=False)
    with pytest.raises(ValueError, match="no adapter takes part"):
        studio.save_adapter("nowhere")


def test_a_click_on_the_shelf_loads_and_another_turns_to_it(studio, view):
    view.shelf.cards["creatures"].click()
    assert "creatures" in studio.settings.adapters and view.adapter.name == "creatures"
    assert view.shelf.cards["creatures"].description == "✓ creatures"
    view.shelf.cards["ink"].click()
    assert view.adapter.name == "ink" and set(studio.settings.adapters) == {
        "ink",
        "mosaic",
        "creatures",
    }


def test_an_adapter_that_cannot_be_loaded_is_told(studio, view):
    view.shelf.other.value = "no_such_file.safetensors"
    assert "no_such_file" in view.status.value and "lorabook-wrong" in view.status._dom_classes
    assert studio.picture.size == (64, 64)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (lambda file: TrainingRun(file, [], ""), "{file!r}"),
        (lambda file: file, "{file!r}"),
        (str, "{file!r}"),
        (load_file, "'adapter.safetensors'"),
        (lambda file: read_source(file).adapter, "'adapter.safetensors'"),
    ],
)
def test_all_that_can_be_loaded_gets_sliders_and_stands_in_the_code(
    studio, view, tmp_path, given, said
):
    file = tmp_path / "mine.safetensors"
    lb.save_adapter("creatures", file)
    report = studio.load(given(file))
    assert report.name in studio.settings.adapters and "up.1" in view.adapter.blocks[report.name]
    code = studio.code()
    assert f"lb.load_adapter(pipe, {said.format(file=str(file))}, {report.name!r})" in code
    assert ("# adapter is in memory only" in code) == (report.name == "adapter")
    assert apart(studio.picture, ordinary(studio)) <= 2


@pytest.mark.parametrize("step", ["choose", "show"])
def test_what_fails_after_loading_leaves_no_adapter_behind(studio, view, monkeypatch, step):
    before, drawn = studio.settings, studio.picture
    with monkeypatch.context() as broken:
        broken.setattr(view.adapter, step, lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError, match="division"):
            studio.load("creatures")
    assert studio.settings == before and set(lb.scales_of(studio.pipe)) == {"ink", "mosaic"}
    assert apart(studio.picture, drawn) <= 2
    studio.undo()
    assert studio.settings == before and studio.load("creatures").name == "creatures"


def test_the_code_follows_the_settings(studio, view):
    view.tabs.selected_index = 4
    slider(view, "up.1").value = 0.3
    assert "0.3" in view.take.code.value and "ink" in view.take.code.value
    view.take.dialect.value = "a1111"
    assert "<lora:ink" in view.take.code.value


def test_a_pipeline_without_adapters_can_begin_with_the_shelf(pipe):
    studio = ScaleStudio(pipe, num_inference_steps=2)
    assert studio.picture.size == (64, 64) and studio.settings.adapters == {}
    studio.widget.shelf.cards["ink"].click()
    assert studio.widget.adapter.name == "ink" and apart(studio.picture, ordinary(studio)) <= 2
    studio.close()


def test_a_notebook_gets_the_widget_and_a_picture_in_its_stead(studio):
    shown, metadata = studio._repr_mimebundle_()
    assert shown["application/vnd.jupyter.widget-view+json"]["model_id"] == studio.widget.model_id
    assert shown["image/png"].startswith("iVBOR") and len(shown["image/png"]) < 300_000
    assert PROMPT in metadata["image/png"]["alt"]
    assert PROMPT in shown["text/plain"] and studio.static().width > 600


def test_every_control_has_a_name(view):
    view.adapter.fine.value = True
    controls = [
        widget
        for widget in inside(view)
        if isinstance(widget, (ipywidgets.DOMWidget))
        and hasattr(widget, "description")
        and not isinstance(widget, ipywidgets.HTML)
    ]
    assert len(controls) > 80
    assert all(widget.description or getattr(widget, "tooltip", None) for widget in controls)


def test_closed_it_leaves_the_pipeline_as_it_stands_and_no_thread(studio):
    studio.settings = studio.settings.with_adapter("ink", scale=0.5)
    drawn, before = studio.picture, threading.active_count()
    studio.close()
    assert apart(drawn, ordinary(studio)) <= 2 and threading.active_count() <= before


def test_what_it_cannot_draw_with_is_refused_in_one_sentence(pipe):
    whole = dict(pipe.components)
    pipe.register_modules(text_encoder=None, tokenizer=None)
    with pytest.raises(ValueError, match="has no text encoder, so the studio cannot read a prompt"):
        ScaleStudio(pipe)
    pipe.register_modules(text_encoder=whole["text_encoder"], tokenizer=whole["tokenizer"])
    pipe.unet.encoder_hid_proj = torch.nn.Identity()
    pipe.unet.register_to_config(encoder_hid_dim_type="ip_image_proj")
    with pytest.raises(ValueError, match="has an IP-Adapter.*unload_ip_adapter"):
        ScaleStudio(pipe)
    video = object.__new__(LTXPipeline)
    video.transformer = torch.nn.Linear(1, 1)
    with pytest.raises(
        ValueError, match="LTXPipeline is none of them; move its scales with lb.set_scales"
    ):
        ScaleStudio(video)


def test_a_cell_and_the_studio_take_turns(studio):
    pipe, settings = studio.pipe, studio.settings
    checksum, done, wrong = lb.base_checksum(pipe), threading.Event(), []
    right = {}
    for scale in (0.0, 0.5, 1.0):
        studio.settings = settings.with_adapter("ink", scale=scale)
        right[scale] = studio.picture

    def move():
        number = 0
        while not done.is_set():
            number += 1
            studio.settings = settings.with_adapter("ink", scale=(0.0, 0.5, 1.0)[number % 3])
            if number % 4 == 0 and studio.wait(60) and not studio._error:
                images = studio._images
                wrong.append(apart(images.images[0], right[images.settings.adapters["ink"].scale]))
            done.wait(0.05)

    hand = threading.Thread(target=move)
    hand.start()
    call = {"num_inference_steps": 3, "guidance_scale": settings.guidance_scale, "seed": 0}
    for _ in range(2):
        for scale, image in zip(
            (0.0, 1.0),
            lb.sweep(
                pipe, PROMPT, columns={"ink": [0.0, 1.0]}, scales={"ink": 1, "mosaic": 1}, **call
            ).images[0],
            strict=True,
        ):
            wrong.append(apart(image, right[scale]))
        with lb.fused(pipe, {"ink": 0.5, "mosaic": 1.0}):
            wrong.append(apart(lb.generate(pipe, PROMPT, **call).images[0], right[0.5]))
            assert not studio.wait(10) or studio._images
        lb.set_scales(pipe, {"ink": -1})
    done.set()
    hand.join(120)
    assert not hand.is_alive() and studio.wait(60) and max(wrong) <= 2 and len(wrong) > 6
    assert lb.base_checksum(pipe) == checksum


def test_within_a_block_that_has_the_pipeline_nothing_is_waited_for(studio):
    studio.wait()
    with lb.fused(studio.pipe, {"ink": 1}):
        studio.settings = studio.settings.with_(seeds=(5,))
        assert not studio.wait()
        with pytest.raises(ValueError, match="draws when the block or the call"):
            studio.picture  # noqa: B018
    assert studio.wait(60) and apart(studio.picture, ordinary(studio, 5)) <= 2


def test_the_shelf_finds_files_and_their_pictures(tmp_path):
    for name in (
        "first.safetensors",
        "second.safetensors",
        "inner/pytorch_lora_weights.safetensors",
    ):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"x" * 10)
    Image.new("RGB", (40, 20), "red").save(tmp_path / "first.preview.png")
    Image.new("RGB", (20, 20), "blue").save(tmp_path / "inner" / "image_0.png")
    (tmp_path / "second.png").write_bytes(b"no picture")
    files = adapter_files(tmp_path)
    assert list(files) == ["first", "inner", "second"]
    shown = [Image.open(io.BytesIO(thumbnail(*file))).getpixel((0, 0)) for file in files.items()]
    assert shown[:2] == [(255, 0, 0), (0, 0, 255)] and min(shown[2]) > 150
    with pytest.raises(FileNotFoundError, match="no folder .*gone"):
        adapter_files(tmp_path / "gone")
