from dataclasses import replace

import pytest
import torch

from lorabook.lora.adapter import Adapter, Layer, lora
from lorabook.lora.resize import difference, resize

ATTENTION = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
CONV = "up_blocks.1.resnets.0.conv1"
TEXT = "text_model.encoder.layers.0.self_attn.q_proj"


def rand(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


def loha(out: int = 24, rest: int = 20, rank: int = 2) -> Layer:
    return Layer(
        "loha",
        {
            "w1_a": rand(out, rank),
            "w1_b": rand(rank, rest),
            "w2_a": rand(out, rank).flip(0),
            "w2_b": rand(rank, rest).flip(1),
        },
        0.5,
        rank,
    )


def adapter(**changes) -> Adapter:
    return Adapter(
        {
            "unet": {
                ATTENTION: lora(rand(24, 8), rand(8, 20), 0.5),
                CONV: lora(rand(12, 8, 1, 1), rand(8, 5, 3, 3), 2.0),
            },
            "text_encoder": {TEXT: lora(rand(16, 3), rand(3, 16))},
        },
        trigger_words=("sks",),
        **changes,
    )


def off(made: Layer, before: Layer) -> float:
    return float((made.delta() - before.delta()).norm() / before.delta().norm())


def test_each_layer_becomes_the_best_of_its_rank():
    before, (made, report) = adapter(), resize(adapter(), rank=4)
    for part, module in (("unet", ATTENTION), ("unet", CONV)):
        layer, values = (
            made.layers[part][module],
            torch.linalg.svdvals(before.layers[part][module].delta()),
        )
        assert (layer.rank, layer.alpha) == (4, 4)
        assert off(layer, before.layers[part][module]) == pytest.approx(
            float(values[4:].norm() / values.norm()), rel=1e-4
        )
        assert report.layers[part][module].error == pytest.approx(
            off(layer, before.layers[part][module]), rel=1e-4
        )


def test_all_but_the_layers_stays():
    made, _ = resize(adapter(), rank=1)
    assert made.trigger_words == ("sks",) and {
        part: [*layers] for part, layers in made.layers.items()
    } == {"unet": [ATTENTION, CONV], "text_encoder": [TEXT]}


def test_plain_layers_that_are_small_enough_stay_bit_for_bit():
    before = adapter()
    made, report = resize(before, rank=3)
    assert made.layers["text_encoder"][TEXT] is before.layers["text_encoder"][TEXT]
    assert report.layers["text_encoder"][TEXT].kept == 1.0


def test_convolutions_keep_their_kernel():
    layer = resize(adapter(), rank=2)[0].layers["unet"][CONV]
    assert layer.tensors["down"].shape == (2, 5, 3, 3) and layer.tensors["up"].shape == (
        12,
        2,
        1,
        1,
    )


@pytest.mark.parametrize(
    "layer",
    [
        loha(),
        Layer("lokr", {"w1": rand(4, 4), "w2": rand(6, 5)}, 1.0, 1),
        Layer("full", {"diff": rand(24, 20)}),
        Layer(
            "lora",
            {"up": rand(24, 4, 1, 1), "down": rand(4, 20, 1, 1), "mid": rand(4, 4, 3, 3)},
            2.0,
            4,
        ),
    ],
)
def test_full_rank_changes_no_kind_of_layer(layer):
    made, report = resize(Adapter({"unet": {ATTENTION: layer}}), rank=1000)
    assert off(made.layers["unet"][ATTENTION], layer) < 1e-6
    assert made.layers["unet"][ATTENTION].is_plain and report.total.error < 1e-6


@pytest.mark.parametrize("share", [0.3, 0.9, 0.999])
def test_the_smallest_rank_that_keeps_the_share_is_taken(share):
    before = adapter()
    made, _ = resize(before, energy=share)
    for part, module in (("unet", ATTENTION), ("unet", CONV), ("text_encoder", TEXT)):
        energy = (
            torch.linalg.svdvals(before.layers[part][module].delta()).double().square().cumsum(0)
        )
        rank = made.layers[part][module].rank
        assert energy[rank - 1] >= share * energy[-1] * (1 - 1e-6)
        assert rank == 1 or energy[rank - 2] < share * energy[-1]


def test_all_energy_keeps_all_but_directions_of_nothing():
    layer = lora(torch.cat([rand(24, 3), torch.zeros(24, 5)], 1), rand(8, 20))
    made, _ = resize(Adapter({"unet": {ATTENTION: layer}}), energy=1)
    assert (
        made.layers["unet"][ATTENTION].rank == 3
        and off(made.layers["unet"][ATTENTION], layer) < 1e-6
    )


def test_the_total_is_the_error_of_all_layers_together():
    before, (made, report) = adapter(), resize(adapter(), rank=2)
    pairs = [
        (made.layers[part][module], layer)
        for part, old in before.layers.items()
        for module, layer in old.items()
    ]
    lost = sum(float((new.delta() - old.delta()).norm()) ** 2 for new, old in pairs)
    whole = sum(float(old.delta().norm()) ** 2 for _, old in pairs)
    assert report.total.kept == pytest.approx(1 - lost / whole, rel=1e-5)
    assert sum(row.lost for row in report.by_block().values()) == pytest.approx(report.total.lost)


def test_the_number_format_of_the_file_is_kept():
    half = Adapter({"unet": {ATTENTION: lora(rand(24, 8).half(), rand(8, 20).half())}})
    made = resize(half, rank=2)[0].layers["unet"][ATTENTION]
    assert {value.dtype for value in made.tensors.values()} == {torch.float16}


def test_a_layer_of_zeros_stays_one_of_zeros():
    made, report = resize(
        Adapter({"unet": {ATTENTION: lora(torch.zeros(24, 8), rand(8, 20))}}), rank=2
    )
    assert not made.layers["unet"][ATTENTION].delta().any() and report.total.kept == 1.0


def test_a_dora_needs_its_base():
    dora = Adapter(
        {"unet": {ATTENTION: replace(lora(rand(24, 2), rand(2, 20)), magnitude=rand(24, 1).abs())}}
    )
    with pytest.raises(ValueError, match="depends on the base model's weights"):
        resize(dora, rank=1)
    base = rand(24, 20)
    made, _ = resize(dora, rank=20, bases={"unet": {ATTENTION: base}})
    delta = dora.layers["unet"][ATTENTION].delta(base)
    assert torch.allclose(made.layers["unet"][ATTENTION].delta(), delta, atol=1e-5)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({}, "give one of rank"),
        ({"rank": 2, "energy": 0.5}, "give one of rank"),
        ({"rank": 0}, "rank must be .* not 0"),
        ({"rank": 1.5}, "rank must be .* not 1.5"),
        ({"rank": True}, "rank must be .* not True"),
        ({"energy": 0}, "energy must be .* not 0"),
        ({"energy": 1.01}, "energy must be .* not 1.01"),
        ({"energy": "x"}, "energy must be .* not 'x'"),
        ({"energy": float("nan")}, "energy must be .* not nan"),
    ],
)
def test_what_is_no_rank_and_no_share_is_an_error(given, said):
    with pytest.raises(ValueError, match=said):
        resize(adapter(), **given)


def test_a_layer_that_is_not_finite_is_named():
    broken = Adapter({"unet": {ATTENTION: lora(torch.full((24, 2), float("nan")), rand(2, 20))}})
    with pytest.raises(ValueError, match=f"unet.{ATTENTION} has weights that are not finite"):
        resize(broken, rank=1)


def test_the_report_shows_a_line_for_each_block():
    _, report = resize(adapter(), rank=2)
    lines = str(report).splitlines()
    assert [line.split()[0] for line in lines] == ["block", "down.0", "up.1", "text_encoder", "all"]
    assert lines[1].split()[1:3] == ["8", "2"] and f"{report.total.kept:.4%}" in lines[-1]
    assert report.table["rank_after"].tolist() == [2, 2, 2, 2]
    assert report._repr_html_().count("<tr>") == 5


def weights(**more) -> dict:
    return {"a.to_q": rand(24, 20), "b.conv": rand(12, 5, 3, 3)} | more


def test_the_difference_of_two_models_gives_back_what_was_added():
    known = {
        "a.to_q": lora(rand(24, 3), rand(3, 20)),
        "b.conv": lora(rand(12, 2, 1, 1), rand(2, 5, 3, 3)),
    }
    base = weights(same=rand(8, 8))
    tuned = base | {
        module: base[module] + layer.delta().view_as(base[module])
        for module, layer in known.items()
    }
    layers = difference(tuned, base, 3)
    assert [*layers] == ["a.to_q", "b.conv"]
    assert layers["b.conv"].tensors["down"].shape == (3, 5, 3, 3)
    assert all(off(layers[module], layer) < 1e-5 for module, layer in known.items())


def test_a_lower_rank_keeps_the_best_of_the_difference():
    tuned, base = {"x": rand(30, 40)}, {"x": torch.zeros(30, 40)}
    squares = torch.linalg.svdvals(tuned["x"]).square()
    error = (difference(tuned, base, 5)["x"].delta() - tuned["x"]).square().sum()
    assert float(error) == pytest.approx(float(squares[5:].sum()), rel=1e-4)


def test_a_difference_of_half_precision_is_taken_in_float32():
    base = {"x": rand(8, 8).half()}
    layers = difference({"x": base["x"] + 1}, base, 8)
    assert (
        layers["x"].tensors["up"].dtype == torch.float32
        and layers["x"].tensors["up"].isfinite().all()
    )


def test_models_that_are_alike_have_no_difference():
    assert difference(weights(), weights(), 4) == {}


@pytest.mark.parametrize(
    ("tuned", "rank", "said"),
    [
        (
            weights(c=rand(2, 2)),
            4,
            r"layer c is \(2, 2\) in the tuned model and absent in the base",
        ),
        ({"a.to_q": rand(24, 20)}, 4, "layer b.conv is absent in the tuned model"),
        (
            weights(**{"a.to_q": rand(20, 24)}),
            4,
            r"a.to_q is \(20, 24\) in the tuned model and \(24, 20\) in the base",
        ),
        (weights(**{"a.to_q": rand(24, 20) / 0}), 4, "a.to_q has weights that are not finite"),
        (weights(), 0, "rank must be"),
    ],
)
def test_models_that_have_no_difference_to_take_are_an_error(tuned, rank, said):
    with pytest.raises(ValueError, match=said):
        difference(tuned, weights(), rank)
