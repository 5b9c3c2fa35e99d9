"""ΔW of each kind, against the lycoris-lora package's own forward."""

import pytest
import torch
from torch import nn

from lorabook.lora.adapter import Layer, lora
from lorabook.lora.formats.read import parse


def modules():
    torch.manual_seed(0)
    return {
        "linear": nn.Linear(24, 36),
        "convolution": nn.Conv2d(12, 20, 3, padding=1),
        "pointwise": nn.Conv2d(12, 20, 1),
    }


def randomised(module):
    with torch.no_grad():
        for name, value in module.named_parameters():
            value.mul_(1.3) if name == "dora_scale" else value.normal_(std=0.3)
    return module


def forward_delta(module, base):
    """ΔW as the module's forward uses it, for an input at a time."""
    weight = base.weight
    diff = (
        module.get_weight(None)
        if hasattr(module, "get_weight")
        else module.make_weight() * module.scale
    )
    changed = weight + diff.reshape(weight.shape)
    new = module.apply_weight_decompose(changed, 1) if module.wd else changed
    return (new - weight).detach().flatten(1)


KINDS = {
    "locon": {},
    "loha": {},
    "lokr": {"factor": 4},
    "lokr low": {"decompose_both": True, "factor": -1},
    "lokr full": {"full_matrix": True},
    "locon tucker": {"use_tucker": True},
    "loha tucker": {"use_tucker": True},
    "lokr tucker": {"use_tucker": True, "factor": 2},
    "locon dora": {"weight_decompose": True},
    "loha dora by input": {"weight_decompose": True, "wd_on_out": False},
    "lokr dora": {"weight_decompose": True},
}


@pytest.mark.parametrize("place", ["linear", "convolution", "pointwise"])
@pytest.mark.parametrize("kind", KINDS)
def test_delta_is_that_of_lycoris_forward(kind, place):
    from lycoris.modules import locon, loha, lokr

    sort = {"locon": locon.LoConModule, "loha": loha.LohaModule, "lokr": lokr.LokrModule}[
        kind.split()[0]
    ]
    base = modules()[place]
    module = randomised(sort("x", base, lora_dim=2, alpha=1.0, **KINDS[kind]))
    weights = {
        f"lora_unet_conv_in.{key}": value for key, value in module.custom_state_dict().items()
    }
    layer = parse(weights).layers["unet"]["conv_in"]
    expected = forward_delta(module, base)
    assert (layer.delta(base.weight.detach()) - expected).norm() <= 1e-5 * expected.norm()


def test_factors_multiply_to_delta_with_the_scaling_once():
    layer = lora(torch.ones(3, 2), torch.ones(2, 5), 0.5)
    up, down = layer.factors()
    assert torch.equal(up @ down, torch.full((3, 5), 1.0)) and layer.alpha == 1.0


def test_what_needs_more_than_full_rank_is_held_at_full_rank():
    up, down = lora(torch.randn(3, 8), torch.randn(8, 5)).factors()
    assert up.shape == (3, 3) and down.shape == (3, 5)


def test_a_dora_without_its_base_says_what_it_needs():
    layer = Layer(
        "lora", {"up": torch.ones(3, 1), "down": torch.ones(1, 2)}, 1.0, 1, magnitude=torch.ones(3)
    )
    with pytest.raises(ValueError, match="DoRA's ΔW depends on the base"):
        layer.factors()
