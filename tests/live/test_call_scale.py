import copy
import warnings

import pytest
import torch

import lorabook as lb


def draw(pipe, scale=None):
    """A picture, and the warnings about its scale."""
    told = {} if scale is None else {"cross_attention_kwargs": {"scale": scale}}
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        picture = pipe(
            "a red cat",
            num_inference_steps=3,
            output_type="pt",
            generator=torch.Generator().manual_seed(0),
            **told,
        ).images
    return picture, [str(one.message) for one in caught if "fused" in str(one.message)]


def test_a_fused_pipeline_says_once_that_a_calls_scale_does_nothing(small):
    lb.fuse(small)
    fused = draw(small)[0]
    picture, told = draw(small, 0.3)
    assert torch.equal(picture, fused) and len(told) == 1 and len(told[0]) <= 400
    assert "cross_attention_kwargs={'scale': 0.3} does nothing to what is fused (random)" in told[0]
    assert "unfuse(pipe), then fuse(pipe, {'random': 0.3})" in told[0]
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


def test_what_is_fused_for_good_is_told_of_with_its_own_remedy(small):
    lb.fuse(small)
    lb.unload_adapters(small)
    assert "load the model anew, then fuse(pipe, {'random': 0.3})" in draw(small, 0.3)[1][0]


def test_a_text_encoder_that_is_fused_alone_is_told_of_too(pipe):
    lb.load_adapter(pipe, "patch_cat")
    lb.fuse(pipe, components=["text_encoder"])
    assert len(draw(pipe, 0.5)[1]) == 1


def test_a_fused_model_compiles_in_one_graph(small):
    lb.fuse(small)
    expected = draw(small)[0]
    small.unet = torch.compile(small.unet, backend="eager", fullgraph=True)
    assert torch.allclose(draw(small)[0], expected, atol=1e-5)
