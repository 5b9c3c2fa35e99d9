import re
from dataclasses import replace

import pytest
import torch

from lorabook.lora.adapter import Adapter, Layer, lora
from lorabook.lora.layer_stats import doubts_about, norm_of, views_of

BLOCK = "down_blocks.0.attentions.1.transformer_blocks.0.attn1."


def rand(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


def views(**layers: Layer):
    return views_of(Adapter({"unet": {BLOCK + module: layer for module, layer in layers.items()}}))


def doubt(layer: Layer) -> str:
    sound = {f"to_{i}": lora(rand(24, 8), rand(8, 20)) for i in range(5)}
    return doubts_about(views(**sound, odd=layer)).get(f"unet.{BLOCK}odd", "")


@pytest.mark.parametrize(
    "layer",
    [
        lora(rand(24, 4), rand(4, 20), 0.5),
        lora(rand(24, 30), rand(30, 20)),
        lora(rand(12, 4, 1, 1), rand(4, 5, 3, 3), -2.0),
        Layer(
            "loha",
            {"w1_a": rand(24, 2), "w1_b": rand(2, 20), "w2_a": rand(24, 2), "w2_b": rand(2, 20)},
            0.5,
            2,
        ),
        Layer("lokr", {"w1": rand(4, 5), "w2": rand(6, 4, 3, 3)}, -0.5, 1),
        Layer("lokr", {"w1": rand(4, 5), "w2_a": rand(6, 2), "w2_b": rand(2, 4)}, 0.5, 2),
        Layer("full", {"diff": rand(24, 20)}),
    ],
)
def test_spectra_are_the_singular_values_of_the_dense_delta(layer):
    (view,) = views(x=layer)
    values = torch.linalg.svdvals(layer.delta().double()).float()
    assert torch.allclose(view.spectrum, values[: len(view.spectrum)], atol=1e-5 * float(values[0]))
    assert view.norm == pytest.approx(float(layer.delta().norm()), rel=1e-5)


def test_effective_rank_counts_directions_that_are_used():
    up, down = torch.eye(24, 8), torch.eye(8, 20)
    assert views(x=lora(up, down))[0].effective_rank == pytest.approx(8)
    down[2:] = 0
    assert views(x=lora(up, down))[0].effective_rank == pytest.approx(2)


def test_a_doras_magnitude_is_counted_but_not_measured():
    plain = lora(rand(24, 2), rand(2, 20))
    (view,) = views(x=replace(plain, magnitude=rand(24)))
    assert view.numbers == 24 * 2 + 2 * 20 + 24 and view.norm == pytest.approx(
        float(plain.delta().norm()), rel=1e-5
    )


@pytest.mark.parametrize(
    ("component", "module", "block", "place"),
    [
        ("unet", BLOCK + "to_q", "down.0", "down.0.attentions_1"),
        ("unet", "mid_block.resnets.1.conv1", "mid", "mid.resnets_1"),
        ("unet", "up_blocks.2.upsamplers.0.conv", "up.2", "up.2.sampler"),
        ("unet", "conv_in", "outside", "outside"),
        (
            "text_encoder",
            "text_model.encoder.layers.0.self_attn.q_proj",
            "text_encoder",
            "text_encoder",
        ),
    ],
)
def test_a_layer_knows_where_it_is(component, module, block, place):
    (view,) = views_of(Adapter({component: {module: lora(rand(4, 1), rand(1, 4))}}))
    assert (view.block, view.place) == (block, place)


def test_a_sound_layer_is_not_suspicious():
    assert doubt(lora(rand(24, 8), rand(8, 20), 2.0)) == ""


@pytest.mark.parametrize(
    ("layer", "said"),
    [
        (lora(torch.full((24, 8), float("nan")), rand(8, 20)), "not finite"),
        (lora(torch.full((24, 8), float("inf")), rand(8, 20)), "not finite"),
        (lora(torch.zeros(24, 8), rand(8, 20)), "all zeros"),
        (lora(rand(24, 8) * 20, rand(8, 20)), "20 times the median of unet's attention layers"),
        (lora(rand(24, 8), rand(8, 20), 128.0), "alpha / rank is 128"),
        (lora(rand(24, 8), rand(8, 20), 0.0), "alpha / rank is 0;"),
        (
            lora(torch.cat([rand(24, 1), rand(24, 15) * 1e-3], 1), rand(16, 20)),
            r"effective rank is 1\.\d, far below its rank of 16",
        ),
    ],
)
def test_what_is_wrong_with_a_layer_is_said(layer, said):
    assert re.search(said, doubt(layer))


def test_layers_that_are_not_finite_are_left_out_of_sums():
    sound = lora(rand(24, 8), rand(8, 20))
    assert norm_of(
        views(a=sound, b=lora(torch.full((24, 8), float("nan")), rand(8, 20)))
    ) == norm_of(views(a=sound))
