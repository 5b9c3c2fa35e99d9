import pytest
import torch

from lorabook.lora.adapter import Adapter, Layer, lora
from lorabook.lora.shapes import as_lora, shapes_of

PROJ = "down_blocks.0.attentions.0.proj_in"
TO_K = "down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k"


def zeros(**shapes) -> dict:
    return {role: torch.zeros(shape) for role, shape in shapes.items()}


@pytest.mark.parametrize(
    ("layer", "module", "shape"),
    [
        (lora(torch.zeros(6, 2), torch.zeros(2, 4)), "", (6, 4)),
        (lora(torch.zeros(6, 2, 1, 1), torch.zeros(2, 4, 3, 3)), "", (6, 4, 3, 3)),
        (
            Layer("lora", zeros(up=(6, 2, 1, 1), down=(2, 4, 1, 1), mid=(2, 2, 3, 3))),
            "",
            (6, 4, 3, 3),
        ),
        (Layer("full", zeros(diff=(6, 4, 1, 1))), "", (6, 4, 1, 1)),
        (Layer("loha", zeros(w1_a=(2, 6), w1_b=(2, 4), t1=(2, 2, 3, 3))), "", (6, 4, 3, 3)),
        (
            Layer("loha", zeros(w1_a=(6, 2), w1_b=(2, 36))),
            "mid_block.resnets.0.conv1",
            (6, 4, 3, 3),
        ),
        (
            Layer("loha", zeros(w1_a=(6, 2), w1_b=(2, 36))),
            "down_blocks.0.downsamplers.0.conv",
            (6, 4, 3, 3),
        ),
        (
            Layer("loha", zeros(w1_a=(6, 2), w1_b=(2, 4))),
            "up_blocks.0.resnets.0.conv_shortcut",
            (6, 4, 1, 1),
        ),
        (Layer("loha", zeros(w1_a=(6, 2), w1_b=(2, 4))), TO_K, (6, 4)),
        (Layer("loha", zeros(w1_a=(6, 2), w1_b=(2, 4))), PROJ, (6, 4, 1, 1)),
        (Layer("lokr", zeros(w1=(2, 2), w2=(3, 2, 3, 3))), "", (6, 4, 3, 3)),
        (Layer("lokr", zeros(w1=(2, 2), w2_a=(3, 1), w2_b=(1, 2))), TO_K, (6, 4)),
        (
            Layer("lokr", zeros(w1=(2, 2), w2_a=(1, 3), w2_b=(1, 2), t2=(1, 1, 3, 3))),
            "",
            (6, 4, 3, 3),
        ),
        (Layer("lokr", zeros(w1_a=(2, 1), w1_b=(1, 2), w2=(3, 2))), "", (6, 4)),
    ],
)
def test_tensors_and_name_tell_the_shape_of_the_weight(layer, module, shape):
    assert shapes_of(Adapter({"unet": {module: layer}})) == {"unet": {module: shape}}


def loha_adapter(cross_width: int) -> Adapter:
    return Adapter(
        {
            "unet": {
                PROJ: Layer("loha", zeros(w1_a=(6, 2), w1_b=(2, 4))),
                TO_K: Layer("loha", zeros(w1_a=(6, 2), w1_b=(2, cross_width))),
            }
        }
    )


@pytest.mark.parametrize(("width", "shape"), [(768, (6, 4, 1, 1)), (1024, (6, 4))])
def test_projections_without_a_kernel_are_told_by_the_model_they_are_for(width, shape):
    assert shapes_of(loha_adapter(width))["unet"][PROJ] == shape


def test_the_projections_of_sdxl_are_matrices():
    adapter = loha_adapter(2048)
    adapter.layers["unet"][TO_K.replace("blocks.0.attn2", "blocks.1.attn2")] = adapter.layers[
        "unet"
    ][TO_K]
    assert shapes_of(adapter)["unet"][PROJ] == (6, 4)


def test_the_models_own_weights_say_it_surest():
    bases = {"unet": {PROJ: torch.zeros(6, 4)}}
    assert shapes_of(loha_adapter(768), bases)["unet"][PROJ] == (6, 4)


def test_factors_of_a_convolution_become_convolutions():
    up, down = torch.randn(6, 2), torch.randn(2, 36)
    layer = as_lora(up, down, (6, 4, 3, 3))
    assert layer.tensors["up"].shape == (6, 2, 1, 1) and layer.tensors["down"].shape == (2, 4, 3, 3)
    assert layer.is_plain and (layer.rank, layer.scaling) == (2, 1.0)
    assert torch.equal(layer.delta(), up @ down)


def test_factors_that_do_not_fit_the_weight_are_an_error():
    with pytest.raises(
        ValueError, match=r"\(6, 2\) and \(2, 5\) do not make up a weight of shape \(6, 4\)"
    ):
        as_lora(torch.zeros(6, 2), torch.zeros(2, 5), (6, 4))
