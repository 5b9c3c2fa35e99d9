import pytest
import torch

import lorabook as lb
from lorabook.adapters.layers import active_adapters, layers_of
from lorabook.adapters.scales import kept_scales

CALL = dict(prompt="a red cat", num_inference_steps=3, output_type="pt")


def draw(pipe):
    return pipe(**CALL, generator=torch.Generator().manual_seed(0)).images


def test_at_scale_zero_the_picture_is_the_base_models_bit_for_bit(pipe, quick_run):
    base = draw(pipe)
    lb.load_adapter(pipe, quick_run, "quick")
    assert not torch.equal(base, draw(pipe))
    lb.set_scales(pipe, {"quick": 0})
    assert torch.equal(base, draw(pipe))


def test_setting_a_scale_twice_is_setting_it_once(pipe, quick_run):
    lb.load_adapter(pipe, quick_run, "quick")
    lb.set_scales(pipe, {"quick": 0.5})
    once = draw(pipe)
    lb.set_scales(pipe, {"quick": 0.5})
    assert torch.equal(once, draw(pipe))


def test_a_scale_multiplies_alpha_over_rank(pipe, quick_run):
    lb.load_adapter(pipe, quick_run, "quick")
    lb.set_scales(pipe, {"quick": -0.25})
    assert {layer.scaling["quick"] for layer in layers_of(pipe, "quick")["unet"].values()} == {-0.25}


def test_an_adapter_that_is_not_named_keeps_scale_and_state(pipe, quick_run):
    lb.load_adapter(pipe, quick_run, "one")
    lb.load_adapter(pipe, quick_run, "two")
    lb.set_scales(pipe, {"one": 0.3})
    lb.set_scales(pipe, {"two": 0.7})
    layer = next(iter(layers_of(pipe, "one")["unet"].values()))
    assert layer.scaling == {"one": 0.3, "two": 0.7} and active_adapters(pipe) == ["one", "two"]


def test_scales_are_kept_over_a_block_that_fails(pipe, quick_run):
    lb.load_adapter(pipe, quick_run, "quick")
    lb.set_scales(pipe, {"quick": 0.4})
    before = draw(pipe)
    with pytest.raises(KeyError), kept_scales(pipe):
        lb.set_scales(pipe, {"quick": 2})
        raise KeyError
    assert torch.equal(before, draw(pipe))


def test_an_unknown_adapter_lists_those_there_are(pipe, quick_run):
    lb.load_adapter(pipe, quick_run, "quick")
    with pytest.raises(ValueError, match="no adapter 'quack'; it has: quick"):
        lb.set_scales(pipe, {"quick": 0, "quack": 1})
    assert next(iter(layers_of(pipe, "quick")["unet"].values())).scaling["quick"] == 1


@pytest.mark.parametrize("scale", [float("nan"), float("inf"), "1", None, True])
def test_a_scale_is_a_finite_number(pipe, quick_run, scale):
    lb.load_adapter(pipe, quick_run, "quick")
    with pytest.raises(ValueError, match="finite number"):
        lb.set_scales(pipe, {"quick": scale})
