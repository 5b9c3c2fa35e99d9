"""What live/upstream.py and convert_doras are for; the canaries say when they are not needed."""

import copy
import warnings

import pytest
import torch
from diffusers.utils.peft_utils import scale_lora_layers, unscale_lora_layers
from peft import LoraConfig, inject_adapter_in_model
from safetensors.torch import load_file
from torch import nn

import lorabook as lb
from lorabook.live.layers import layers_of

SCALES = (0.1, 0.2)  # 0.7 times and divided by these is not 0.7


@pytest.fixture
def adapted():
    """A linear layer with PEFT's LoRA "style" at scale 0.7, and one with a DoRA."""
    torch.manual_seed(0)
    models = []
    for use_dora in (False, True):
        config = LoraConfig(
            r=2, lora_alpha=2, target_modules=["0"], init_lora_weights=False, use_dora=use_dora
        )
        model = inject_adapter_in_model(config, nn.Sequential(nn.Linear(4, 4)), "style")
        model[0].set_scale("style", 0.7)
        models.append(model)
    return models


def test_canary_a_calls_own_scale_still_leaves_other_scales_behind(adapted):
    model, left = adapted[0], {}
    for scale in (*SCALES, 0):
        model[0].set_scale("style", 0.7)
        before = model[0].scaling["style"]
        scale_lora_layers(model, scale)
        unscale_lora_layers(model, scale)
        left[scale] = model[0].scaling["style"] != before
    assert all(left.values()), (
        "diffusers puts the scales back: take hook_calls and what it needs out of live/upstream.py"
    )


def test_canary_a_dora_at_scale_0_is_still_not_the_base_model(adapted):
    model, x = adapted[1], torch.ones(1, 4)
    model[0].set_scale("style", 0)
    assert not torch.allclose(model(x), model[0].get_base_layer()(x)), (
        "PEFT's DoRA is the base at scale 0: take convert_doras out of live/inject.py"
    )


def test_canary_an_adapted_model_still_saves_what_cannot_be_loaded(small, tmp_path):
    for model in (small.unet, small.text_encoder):
        if not hasattr(model, "peft_config"):
            model.add_adapter(LoraConfig(r=2, target_modules=["q_proj"]), "style")
        type(model).save_pretrained(model, tmp_path / type(model).__name__)
    weights = load_file(next((tmp_path / "UNet2DConditionModel").glob("*.safetensors")))
    files = [path.name for path in (tmp_path / type(small.text_encoder).__name__).iterdir()]
    assert any(".base_layer." in key for key in weights) or "model.safetensors" not in files, (
        "adapted models save their own weights: take mark_adapted out of live/upstream.py"
    )


def test_canary_group_offloading_still_misses_layers_that_come_later(small):
    lb.unload_adapters(small)
    small.unet.enable_group_offload("cpu", offload_type="leaf_level")
    inject_adapter_in_model(LoraConfig(r=2, target_modules=["to_q"]), small.unet, "style")
    halves = [module for name, module in small.unet.named_modules() if "lora_A.style" in name]
    assert halves and not any(hasattr(half, "_diffusers_hook") for half in halves), (
        "diffusers' group offloading sees new layers: take renew_group_offloading out of "
        "live/upstream.py"
    )


# what holds with them


def draw(pipe, scale=None):
    """An image, and the warnings about its scale."""
    call = {} if scale is None else {"cross_attention_kwargs": {"scale": scale}}
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        generator = torch.Generator().manual_seed(0)
        image = pipe(
            "a red cat", num_inference_steps=2, output_type="pt", generator=generator, **call
        ).images
    return image, [str(one.message) for one in caught if "fused" in str(one.message)]


def test_no_method_of_a_layer_is_replaced(small):
    lb.set_scales(small, {"random": 0.5})
    draw(small, 0.3)
    for layer in layers_of(small, "random")["unet"].values():
        assert not any(callable(getattr(type(layer), name, None)) for name in vars(layer))


def test_the_last_adapter_takes_all_along_but_the_one_attribute(small):
    lb.unload_adapters(small)
    before = set(vars(type(small.unet).from_config(small.unet.config)))
    left = set(vars(small.unet)) - before
    assert left <= {"lorabook", "_hf_peft_config_loaded"}
    assert not small.unet._forward_hooks and not small.unet._forward_pre_hooks


def test_a_text_encoders_scale_is_exact_after_a_call_with_its_own(pipe):
    lb.load_adapter(pipe, "patch_cat")
    lb.set_scales(pipe, {"patch_cat": {"text_encoder": 0.7}})
    for scale in (*SCALES, 0):
        draw(pipe, scale)
        layers = layers_of(pipe, "patch_cat")["text_encoder"].values()
        assert {layer.scaling["patch_cat"] for layer in layers} == {0.7}


# a call's own scale on what is fused
def test_a_fused_pipeline_says_once_that_a_calls_scale_does_nothing(small):
    lb.fuse(small)
    fused = draw(small)[0]
    picture, messages = draw(small, 0.3)
    assert torch.equal(picture, fused) and len(messages) == 1 and len(messages[0]) <= 400
    assert (
        "cross_attention_kwargs={'scale': 0.3} does nothing to what is fused (random)"
        in messages[0]
    )
    assert "unfuse(pipe), then fuse(pipe, {'random': 0.3})" in messages[0]
    assert draw(small, 0.3)[1] == []


@pytest.mark.parametrize("scale", [1.0, 1, None])
def test_the_scale_that_changes_nothing_is_passed_over(small, scale):
    lb.fuse(small)
    assert draw(small, scale)[1] == [] and len(draw(small, 0.0)[1]) == 1


def test_what_is_not_fused_says_nothing_and_the_last_adapter_takes_the_hooks_along(small):
    before = draw(small, 0.3)
    lb.fuse(small)
    copy.deepcopy(small.unet)
    lb.unfuse(small)
    assert before[1] == [] and draw(small, 0.3)[1] == []
    assert torch.equal(draw(small, 0.3)[0], before[0])
    lb.unload_adapters(small)
    assert not small.unet._forward_pre_hooks and not small.unet._forward_hooks


def test_what_is_fused_for_good_is_messages_of_with_its_own_remedy(small):
    lb.fuse(small)
    lb.unload_adapters(small)
    assert "load the model anew, then fuse(pipe, {'random': 0.3})" in draw(small, 0.3)[1][0]


def test_a_text_encoder_that_is_fused_alone_is_messages_of_too(pipe):
    lb.load_adapter(pipe, "patch_cat")
    lb.fuse(pipe, components=["text_encoder"])
    assert len(draw(pipe, 0.5)[1]) == 1


def test_a_fused_model_compiles_in_one_graph(small):
    lb.fuse(small)
    expected = draw(small)[0]
    small.unet = torch.compile(small.unet, backend="eager", fullgraph=True)
    assert torch.allclose(draw(small)[0], expected, atol=1e-5)
