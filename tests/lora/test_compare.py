import io
import math

import pytest
import torch
from PIL import Image

from lorabook.lora.adapter import Adapter, Layer, lora
from lorabook.lora.compare import Side, compare_adapters, relative_error
from lorabook.lora.merge import merge

DOWN, MID = "down_blocks.0.attentions.0.proj_in", "mid_block.resnets.0.conv1"
TEXT = "text_model.encoder.layers.0.self_attn.q_proj"


def random_adapter(seed, *, rank=3, scaling=1.0, out=40, inside=50):
    torch.manual_seed(seed)
    make = lambda: lora(torch.randn(out, rank), torch.randn(rank, inside), scaling)  # noqa: E731
    return Adapter({"text_encoder": {TEXT: make()}, "unet": {MID: make(), DOWN: make()}})


def one_layer(up, down):
    return Adapter({"unet": {DOWN: lora(up, down)}})


def orthogonal(*, columns=True):
    """Two adapters whose ΔW have orthogonal column spaces; their row spaces too, or the same."""
    basis, rows = torch.linalg.qr(torch.randn(20, 6))[0], torch.linalg.qr(torch.randn(30, 6))[0].T
    return one_layer(basis[:, :3], rows[:3]), one_layer(
        basis[:, 3:], rows[3:] if columns else rows[:3]
    )


@pytest.mark.parametrize("factor, cosine", [(1.0, 1.0), (2.5, 1.0), (-1.0, -1.0)])
def test_an_adapter_against_itself_scaled_has_cosine_one_and_no_angles(factor, cosine):
    report = compare_adapters(random_adapter(1), random_adapter(1, scaling=factor))
    for overlap in (report.total, *report.blocks.values()):
        assert overlap.cosine == pytest.approx(cosine, abs=1e-6)
        for side in (overlap.output, overlap.input):
            assert side.angle == pytest.approx(0, abs=1e-6) and side.overlap == pytest.approx(1)


def test_orthogonal_adapters_have_cosine_zero_and_right_angles():
    total = compare_adapters(*orthogonal()).total
    assert total.cosine == pytest.approx(0, abs=1e-6)
    for side in (total.output, total.input):
        assert side.angle == pytest.approx(math.pi / 2, abs=1e-5) and side.overlap == pytest.approx(
            0, abs=1e-9
        )


def test_the_output_side_is_told_from_the_input_side():
    total = compare_adapters(*orthogonal(columns=False)).total
    assert total.cosine == pytest.approx(0, abs=1e-6)
    assert total.output.angle == pytest.approx(
        math.pi / 2, abs=1e-5
    ) and total.input.angle == pytest.approx(0, abs=1e-3)


def test_a_known_angle_is_report():
    first, second, row = torch.eye(5)[:, :1], torch.eye(5)[:, 1:2], torch.ones(1, 4)
    turned = one_layer(first * math.cos(0.3) + second * math.sin(0.3), row)
    total = compare_adapters(one_layer(first, row), turned).total
    assert total.output.angle == pytest.approx(0.3, abs=1e-6) and total.cosine == pytest.approx(
        math.cos(0.3), abs=1e-6
    )


def test_random_adapters_overlap_as_chance_has_it():
    report = [
        compare_adapters(random_adapter(2 * i, rank=4), random_adapter(2 * i + 1, rank=8)).total
        for i in range(40)
    ]
    assert report[0].output.chance == pytest.approx(8 / 40) and report[
        0
    ].input.chance == pytest.approx(8 / 50)
    for side in ("output", "input"):
        mean = sum(getattr(total, side).overlap for total in report) / len(report)
        assert mean == pytest.approx(getattr(report[0], side).chance, rel=0.1)


def test_the_cosine_is_that_of_the_whole_delta():
    a, b = random_adapter(1), random_adapter(2)
    wholes = [
        torch.cat(
            [
                layer.delta().flatten()
                for part in ("text_encoder", "unet")
                for layer in x.layers[part].values()
            ]
        )
        for x in (a, b)
    ]
    assert compare_adapters(a, b).total.cosine == pytest.approx(
        float(torch.cosine_similarity(*wholes, dim=0)), abs=1e-6
    )


def test_blocks_stand_in_the_models_order_and_text_encoders_last():
    assert list(compare_adapters(random_adapter(1), random_adapter(2)).blocks) == [
        "down.0",
        "mid",
        "text_encoder",
    ]


def test_a_layer_that_one_lacks_counts_as_zero():
    a, b = random_adapter(1), random_adapter(1)
    report = compare_adapters(a, b.only(["unet"]))
    assert report.blocks["text_encoder"].cosine == 0 and report.blocks["text_encoder"].shared == 0
    assert report.blocks["text_encoder"].output is None
    assert report.total.shared == 2 and 0.5 < report.total.cosine < 1


def test_an_adapter_of_zeros_has_cosine_zero_and_no_subspaces():
    zero = one_layer(torch.zeros(20, 2), torch.randn(2, 30))
    total = compare_adapters(zero, one_layer(torch.randn(20, 2), torch.randn(2, 30))).total
    assert total.cosine == 0 and total.shared == 1 and total.output is None


def test_columns_that_repeat_are_one_direction():
    up, down = torch.randn(20, 1), torch.randn(1, 30)
    doubled = one_layer(up.repeat(1, 2), down.repeat(2, 1))
    total = compare_adapters(doubled, one_layer(up, down)).total
    for side, width in ((total.output, 20), (total.input, 30)):
        assert side == Side(pytest.approx(0, abs=1e-6), pytest.approx(1), pytest.approx(1 / width))


def test_of_several_layers_the_smallest_angle_and_the_mean_overlap_are_told():
    def turned(*angles):
        return Adapter(
            {
                "unet": {
                    f"down_blocks.0.attentions.{i}.proj_in": lora(
                        torch.tensor([[math.cos(angle)], [math.sin(angle)], [0.0]]),
                        torch.ones(1, 4),
                    )
                    for i, angle in enumerate(angles)
                }
            }
        )

    side = compare_adapters(turned(0, 0), turned(0.3, 0.9)).blocks["down.0"].output
    assert side.angle == pytest.approx(0.3, abs=1e-6)
    assert side.overlap == pytest.approx((math.cos(0.3) ** 2 + math.cos(0.9) ** 2) / 2)


def test_full_rank_meets_everything():
    full = Adapter({"unet": {DOWN: Layer("full", {"diff": torch.randn(10, 12)})}})
    side = compare_adapters(full, one_layer(torch.randn(10, 2), torch.randn(2, 12))).total.output
    assert side.overlap == pytest.approx(1) and side.chance == 1


def test_it_shows_itself_as_a_table():
    report = compare_adapters(
        random_adapter(1), random_adapter(1, scaling=-1), names=("ink", "<b>")
    )
    assert "'ink' and '<b>'" in str(report) and "-1.000" in str(report)
    assert repr(report) == str(report)
    page = report._repr_html_()
    assert '<img alt="By block: down.0' in page and page.count("<tr>") == 5
    assert "&lt;b&gt;" in page and ">text_encoder</td>" in page
    assert [*report.table["block"]] == ["down.0", "mid", "text_encoder", "total"]
    assert report.table["cosine"].tolist() == pytest.approx([-1] * 4)


def test_it_shows_itself_as_a_figure():
    report = compare_adapters(
        random_adapter(1), random_adapter(1).only(["unet"]), names=("ink", "dots")
    )
    assert Image.open(io.BytesIO(report._repr_png_())).width > 300
    assert "text_encoder +0.00" in report.plot().alt
    assert "ink and dots in all: +0.8" in report.plot().alt
    assert "–" in str(report)


def test_shapes_that_differ_are_named():
    with pytest.raises(
        ValueError,
        match="'x' is 40 x 50 in layer down_blocks.* of unet, but adapter 'y' is 40 x 51",
    ):
        compare_adapters(random_adapter(1), random_adapter(1, inside=51), names=("x", "y"))


def test_nothing_to_compare_is_an_error():
    with pytest.raises(ValueError, match="'first' and 'second' have no layers to compare"):
        compare_adapters(Adapter({}), Adapter({"unet": {}}))


WEIGHTS = {"a": 0.5, "b": -0.7}


@pytest.fixture
def adapters():
    return {"a": random_adapter(1), "b": random_adapter(2, rank=5)}


def test_the_error_of_a_blend_is_that_of_the_matrices(adapters):
    merged = merge(adapters, WEIGHTS, method="linear")

    def flat(adapter):
        return torch.cat([adapter.layers["unet"][m].delta().flatten() for m in (DOWN, MID)])

    whole = 0.5 * flat(adapters["a"]) - 0.7 * flat(adapters["b"])
    error = relative_error(merged, adapters, WEIGHTS)
    expected = float((flat(merged) - whole).norm() / whole.norm())
    assert error["unet"] == pytest.approx(expected, rel=1e-5)


def test_the_error_is_given_in_all_by_component_and_by_block(adapters):
    error = relative_error(merge(adapters, WEIGHTS, method="linear"), adapters, WEIGHTS)
    assert sorted(error) == ["down.0", "mid", "text_encoder", "total", "unet"]
    assert min(error.values()) <= error["total"] <= max(error.values())


def test_a_layer_that_the_blend_lacks_is_an_error_of_one(adapters):
    merged = merge(adapters, WEIGHTS, method="cat")
    error = relative_error(merged.only(["unet"]), adapters, WEIGHTS)
    assert error["text_encoder"] == 1 and error["unet"] < 1e-6


def test_a_sum_that_cancels_out_gives_zero_or_infinity_but_not_nan():
    twins, weights = {"a": random_adapter(1), "b": random_adapter(1)}, {"a": 1.0, "b": -1.0}
    assert relative_error(merge(twins, weights, method="cat"), twins, weights)["total"] == 0
    assert relative_error(twins["a"], twins, weights)["total"] == math.inf
    nearly = {"a": 0.3 + 1e-7, "b": -0.3}
    assert relative_error(Adapter({}), twins, nearly)["total"] == 0
    nothing = {"a": 0.0, "b": 0.0}
    assert relative_error(merge(twins, nothing, method="linear"), twins, nothing)["total"] == 0
