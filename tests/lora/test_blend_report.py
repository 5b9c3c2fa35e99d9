import math

import pytest
import torch

from lorabook.lora.adapter import Adapter, lora
from lorabook.lora.blend_report import blend_report, relative_error
from lorabook.lora.merge import merge

DOWN, MID = "down_blocks.0.attentions.0.proj_in", "mid_block.resnets.0.conv1"
TEXT = "text_model.encoder.layers.0.self_attn.q_proj"
WEIGHTS = {"a": 0.5, "b": -0.7}


def random_adapter(seed, rank=3):
    torch.manual_seed(seed)
    make = lambda: lora(torch.randn(20, rank), torch.randn(rank, 30))  # noqa: E731
    return Adapter({"unet": {MID: make(), DOWN: make()}, "text_encoder": {TEXT: make()}})


@pytest.fixture
def adapters():
    return {"a": random_adapter(1), "b": random_adapter(2, rank=5)}


def test_the_error_is_that_of_the_matrices(adapters):
    merged = merge(adapters, WEIGHTS, method="linear")
    deltas = [
        [
            layer.delta().flatten()
            for part in x.layers
            for _, layer in sorted(x.layers[part].items())
        ]
        for x in (merged.only(["unet"]), adapters["a"].only(["unet"]), adapters["b"].only(["unet"]))
    ]
    got, a, b = (torch.cat(rows) for rows in deltas)
    whole = 0.5 * a - 0.7 * b
    error = relative_error(merged, adapters, WEIGHTS)
    assert error["unet"] == pytest.approx(float((got - whole).norm() / whole.norm()), rel=1e-5)


def test_the_error_is_given_in_all_by_component_and_by_block(adapters):
    error = relative_error(merge(adapters, WEIGHTS, method="linear"), adapters, WEIGHTS)
    assert list(error) == ["total", "unet", "text_encoder", "down.0", "mid"]
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


def test_the_report_shows_itself(adapters):
    weights = WEIGHTS | {"b": {"unet": {DOWN: 0.5}}}
    report = blend_report("<mix>", "cat", merge(adapters, weights, method="cat"), adapters, weights)
    assert report.ranks == {"a": 3, "b": 5} and report.rank == 8
    assert (
        "blend '<mix>' by cat, rank 8, of 'a' (weight 0.5, rank 3), 'b' (weight by layer, rank 5)"
        in str(report)
    )
    assert "&lt;mix&gt;" in report._repr_html_() and "<td>down.0</td>" in report._repr_html_()
