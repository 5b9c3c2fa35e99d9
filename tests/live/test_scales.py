import copy
import io

import numpy as np
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    EulerDiscreteScheduler,
    HeunDiscreteScheduler,
    StableDiffusionImg2ImgPipeline,
)
from PIL import Image

import lorabook as lb
from adapter_files import ATTENTION, add_random
from lorabook.blocks import block_of
from lorabook.live.layers import active_adapters, layers_of
from lorabook.live.state import preserve_scales

CALL = dict(prompt="a red cat", num_inference_steps=3, output_type="pt")
BLOCKS = ["down", "mid", "up", "embedding"]


def draw(pipe, **changes):
    return pipe(**CALL | changes, generator=torch.Generator().manual_seed(0)).images


@pytest.fixture(scope="module")
def base():
    """The picture of tiny-sd without an adapter."""
    pipe = lb.load_pipeline("tiny-sd", device="cpu")
    pipe.set_progress_bar_config(disable=True)
    return draw(pipe)


@pytest.fixture
def loaded(pipe):
    """tiny-sd with the bundled creatures (all layers) and patch_cat (text encoder too)."""
    lb.load_adapter(pipe, "creatures")
    lb.load_adapter(pipe, "patch_cat")
    return pipe


def test_at_scale_zero_the_picture_is_the_base_models_bit_for_bit(loaded, base):
    assert not torch.equal(base, draw(loaded))
    lb.set_scales(loaded, {"creatures": 0, "patch_cat": 0})
    assert torch.equal(base, draw(loaded))


def test_all_blocks_at_zero_is_the_base_bit_for_bit(loaded, base):
    nothing = {"text_encoder": 0, "unet": dict.fromkeys(BLOCKS, 0)}
    lb.set_scales(loaded, {"creatures": nothing, "patch_cat": nothing})
    assert torch.equal(base, draw(loaded))


def test_each_block_alone_changes_the_picture(loaded, base):
    blocks = {block_of(module) for module in layers_of(loaded, "creatures")["unet"]}
    for block in sorted(blocks):
        side, _, number = block.partition(".")
        others = {other.split(".")[0]: {} for other in blocks if other != "mid"}
        for other in blocks - {block}:
            if other == "mid":
                others["mid"] = 0
            else:
                others[other.split(".")[0]][f"block_{other.split('.')[1]}"] = 0
        lb.set_scales(loaded, {"creatures": {"unet": others}, "patch_cat": 0})
        assert not torch.equal(base, draw(loaded)), block


def test_setting_scales_twice_is_setting_them_once(loaded):
    scales = {"creatures": {"unet": {"up": {"block_1": [0.4, 0.8, 1.0]}}}, "patch_cat": 0.3}
    lb.set_scales(loaded, scales)
    once = draw(loaded)
    lb.set_scales(loaded, scales)
    assert torch.equal(once, draw(loaded))


def test_a_scale_multiplies_alpha_over_rank_and_may_be_negative(loaded):
    lb.set_scales(loaded, {"creatures": -0.25})
    assert {
        layer.scaling["creatures"] for layer in layers_of(loaded, "creatures")["unet"].values()
    } == {-0.25}


def test_an_adapter_that_is_not_named_keeps_scale_and_state_unless_only(loaded):
    lb.set_scales(loaded, {"creatures": 0.3})
    lb.set_scales(loaded, {"patch_cat": 0.7})
    layer = next(iter(layers_of(loaded, "creatures")["unet"].values()))
    assert (
        layer.scaling == {"creatures": 0.3, "patch_cat": 0.7} and len(active_adapters(loaded)) == 2
    )
    lb.set_scales(loaded, {"patch_cat": 0.7}, only=True)
    assert active_adapters(loaded) == ["patch_cat"] and layer.scaling["creatures"] == 0.3


def test_the_table_shows_what_is_in_force(loaded):
    table = lb.set_scales(
        loaded, {"creatures": {"unet": {"down": 0.5, "up": {"block_1": [0, 0.5, 1]}}}}
    )
    rows = dict(table.cells()[["layers", "scale"]].values)
    assert rows["down.1"] == rows["up.1 attentions.1"] == "0.5"
    assert len(table.table) == sum(len(layers) for layers in table["creatures"].values())
    assert "up.1 attentions.0" in table._repr_html_()
    assert "up.1 attentions.0" in str(table)
    assert lb.scales_of(loaded)["creatures"] == table["creatures"]
    lb.disable_adapters(loaded, "creatures")
    assert set(lb.scales_of(loaded)["creatures"]["unet"].values()) == {0.0}


def test_a_preset_and_a_block_weight_vector_set_scales(loaded):
    lb.set_scales(loaded, {"creatures": "cross-attention only"})
    scales = lb.scales_of(loaded)["creatures"]["unet"]
    assert {name for name, scale in scales.items() if scale} == {
        name for name in scales if ".attn2." in name
    }
    lb.set_scales(loaded, {"patch_cat": [0.5] + [0.25] * 16})
    table = lb.scales_of(loaded)["patch_cat"]
    assert set(table["text_encoder"].values()) == {0.5}
    assert table["unet"]["down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"] == 0.25


def test_a_calls_own_scale_multiplies_and_leaves_the_scales_as_they_were(loaded, base):
    lb.set_scales(loaded, {"creatures": 0.3, "patch_cat": {"unet": 0.7, "text_encoder": 0.9}})
    before, table = draw(loaded), str(lb.scales_of(loaded))
    half = draw(loaded, cross_attention_kwargs={"scale": 0.5})
    assert torch.equal(base, draw(loaded, cross_attention_kwargs={"scale": 0}))
    assert torch.equal(before, draw(loaded)) and str(lb.scales_of(loaded)) == table
    lb.set_scales(loaded, {"creatures": 0.15, "patch_cat": {"unet": 0.35, "text_encoder": 0.45}})
    torch.testing.assert_close(half, draw(loaded))


def test_a_call_that_fails_on_its_way_leaves_the_scales_as_they_were(loaded):
    table = str(lb.scales_of(loaded))
    loaded.unet.register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        draw(loaded, cross_attention_kwargs={"scale": 0.3})
    assert str(lb.scales_of(loaded)) == table


def test_scales_are_kept_over_a_block_that_fails(loaded):
    lb.set_scales(loaded, {"creatures": {"steps": [[0, 0.5, 0]]}})
    before = draw(loaded)
    with pytest.raises(KeyError), preserve_scales(loaded):
        lb.set_scales(loaded, {"creatures": 2, "patch_cat": {"steps": [[0, 1, 0]]}})
        raise KeyError
    assert torch.equal(before, draw(loaded))


def test_an_unknown_adapter_lists_those_there_are_and_changes_nothing(loaded):
    with pytest.raises(ValueError, match="no adapter 'quack'; it has: creatures, patch_cat"):
        lb.set_scales(loaded, {"creatures": 0, "quack": 1})
    with pytest.raises(ValueError, match="no 'block_8'"):
        lb.set_scales(loaded, {"creatures": 0, "patch_cat": {"unet": {"up": {"block_8": 1}}}})
    assert next(iter(layers_of(loaded, "creatures")["unet"].values())).scaling["creatures"] == 1


@pytest.mark.parametrize("scale", [float("nan"), float("inf"), "1", None, True])
def test_a_scale_is_a_finite_number(loaded, scale):
    with pytest.raises(ValueError, match="finite number"):
        lb.set_scales(loaded, {"creatures": scale})


def test_a_dora_put_on_by_peft_scales_its_whole_delta(pipe):
    base = draw(pipe)
    add_random(pipe, ATTENTION, use_dora=True)
    trained = draw(pipe)
    lb.set_scales(pipe, {"random": 1})
    torch.testing.assert_close(trained, draw(pipe), atol=1e-4, rtol=0)
    lb.set_scales(pipe, {"random": 0})
    assert torch.equal(base, draw(pipe))


# over the denoising


def seen(pipe, scheduler, steps=10, **call):
    """The scale of a layer at each call of the UNet."""
    pipe.scheduler = scheduler.from_config(pipe.scheduler.config)
    layer, found = next(iter(layers_of(pipe, "creatures")["unet"].values())), []
    hook = layer.register_forward_pre_hook(lambda *_: found.append(layer.scaling["creatures"]))
    pipe(prompt="a cat", num_inference_steps=steps, output_type="pt", **call)
    hook.remove()
    return found


@pytest.mark.parametrize("scheduler", [DDIMScheduler, EulerDiscreteScheduler])
def test_shares_of_the_run_are_half_open(loaded, scheduler):
    lb.set_scales(loaded, {"creatures": {"unet": 0.5, "steps": [[0, 0.4, 1.0], [0.4, 1, 0.3]]}})
    assert seen(loaded, scheduler) == [0.5] * 4 + [0.15] * 6
    assert next(iter(layers_of(loaded, "creatures")["unet"].values())).scaling["creatures"] == 0.5


def test_shares_are_right_with_a_scheduler_that_calls_the_model_twice_a_step(loaded):
    lb.set_scales(loaded, {"creatures": {"steps": [[0.5, 1, 0]]}})
    found = seen(loaded, HeunDiscreteScheduler)
    assert found == sorted(found, reverse=True) and found.count(0) in (9, 10) and len(found) == 19


def test_shares_are_of_the_steps_that_are_run_in_image_to_image(loaded):
    other = StableDiffusionImg2ImgPipeline(**loaded.components, requires_safety_checker=False)
    other.set_progress_bar_config(disable=True)
    lb.set_scales(other, {"creatures": {"steps": [[0, 0.5, 0]]}})
    picture = Image.fromarray(np.zeros((64, 64, 3), np.uint8))
    assert seen(other, DDIMScheduler, 8, image=picture, strength=0.5) == [0, 0, 1, 1]


def test_a_schedule_is_for_the_pipeline_it_was_set_on_after_another_was_used(loaded):
    lb.set_scales(loaded, {"creatures": {"steps": [[0, 0.5, 0]]}})
    other = StableDiffusionImg2ImgPipeline(**loaded.components, requires_safety_checker=False)
    picture = Image.fromarray(np.zeros((64, 64, 3), np.uint8))
    lb.generate(other, "a cat", image=picture, strength=0.5, num_inference_steps=4)
    assert seen(loaded, DDIMScheduler, 4) == [0, 0, 1, 1]


def test_the_schedules_product_with_nothing_is_the_base(loaded, base):
    lb.set_scales(loaded, {"creatures": {"steps": [[0, 1, 0]]}, "patch_cat": 0})
    assert torch.equal(base, draw(loaded))
    lb.set_scales(loaded, {"creatures": 1})
    assert lb.scales_of(loaded).steps == {} and not torch.equal(base, draw(loaded))


def test_an_interrupt_in_the_middle_of_a_run_leaves_the_scales_as_they_were(loaded):
    lb.set_scales(loaded, {"creatures": {"steps": [[0, 1, 0.5]]}, "patch_cat": 0})
    before = draw(loaded)

    def stop(*_):
        raise KeyboardInterrupt

    hook = loaded.unet.conv_in.register_forward_pre_hook(stop)
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            draw(loaded)
    hook.remove()
    assert torch.equal(before, draw(loaded))


def test_a_copy_of_the_pipeline_has_a_schedule_of_its_own(loaded, base):
    lb.set_scales(loaded, {"creatures": {"steps": [[0, 1, 0]]}, "patch_cat": 0})
    other = copy.deepcopy(loaded)
    other.set_progress_bar_config(disable=True)
    lb.set_scales(loaded, {"creatures": 1})
    assert torch.equal(draw(other), base) and not torch.equal(draw(loaded), base)


def test_a_model_with_adapters_can_be_pickled(loaded):
    lb.set_scales(loaded, {"creatures": {"steps": [[0, 0.5, 0]]}})
    stored = io.BytesIO()
    torch.save(loaded.unet, stored)
    stored.seek(0)
    assert torch.load(stored, weights_only=False).config == loaded.unet.config


def test_a_schedule_needs_a_pipelines_own_call(loaded):
    lb.set_scales(loaded, {"creatures": {"steps": [[0, 0.5, 0]]}})
    with pytest.raises(ValueError, match="need a pipeline's own call"):
        loaded.unet(torch.zeros(1, 4, 16, 16), torch.tensor(1), torch.zeros(1, 77, 128))


def test_a_schedule_works_on_a_compiled_model(small):
    lb.set_scales(small, {"random": {"steps": [[0, 0.5, 0]]}})
    expected = draw(small)
    small.unet = torch.compile(small.unet, backend="eager")
    assert (draw(small) - expected).abs().max().item() < 1e-5
    lb.set_scales(small, {"random": 1.0})
    assert (draw(small) - expected).abs().max().item() > 1e-3


def test_scales_are_kept_of_an_adapter_with_room_for_swapping_too(pipe):
    lb.load_adapter(pipe, "ink", hotswap_rank=8)
    lb.set_scales(pipe, {"ink": 0.8})
    with preserve_scales(pipe):
        lb.set_scales(pipe, {"ink": 0.3})
    assert all(scale == pytest.approx(0.8) for scale in lb.scales_of(pipe)["ink"]["unet"].values())


@pytest.mark.parametrize(
    "scales",
    [
        0.5,
        None,
        "ink",
        ["ink"],
        {"creatures": {"steps": 0.5}},
        {"creatures": {"unet": {3: 1}}},
        {"creatures": 10**400},
    ],
)
def test_what_are_no_scales_is_one_sentence(loaded, scales):
    with pytest.raises(ValueError) as caught:
        lb.set_scales(loaded, scales)
    assert 20 < len(str(caught.value)) <= 400


def test_moves_are_refused_while_diffusers_own_fusing_is_on(loaded):
    loaded.fuse_lora(adapter_names=["creatures"])
    for move in (
        lambda: lb.set_scales(loaded, {"creatures": 1}),
        lambda: lb.remove_adapter(loaded, "creatures"),
        lambda: lb.swap_adapter(loaded, "creatures", "ink"),
        lambda: lb.disable_adapters(loaded, "creatures"),
    ):
        with pytest.raises(
            ValueError, match=r"fused by diffusers itself; call pipe.unfuse_lora\(\) first"
        ):
            move()
