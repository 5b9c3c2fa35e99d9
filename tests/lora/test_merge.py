import math
from dataclasses import replace
from importlib.metadata import version as version_of

import pytest
import torch
from packaging.version import Version
from peft import LoraConfig, get_peft_model
from torch import nn

from lorabook.lora.adapter import Adapter, Layer, lora
from lorabook.lora.compare import relative_error
from lorabook.lora.merge import METHODS, merge

DARE = [method for method in METHODS if method.startswith("dare")]
BY_FACTORS = ("linear", "ties", "magnitude_prune", "dare_linear", "dare_ties")
HALVES = {"a": 0.5, "b": 0.5}


def random_adapter(seed, *, rank=4, scaling=1.0, modules=("x", "y"), out=24, inside=30):
    generator = torch.Generator().manual_seed(seed)
    return Adapter(
        {
            "unet": {
                module: lora(
                    torch.randn(out, rank, generator=generator),
                    torch.randn(rank, inside, generator=generator),
                    scaling,
                )
                for module in modules
            }
        }
    )


def two(**changes):
    return {"a": random_adapter(1, **changes), "b": random_adapter(2, **changes)}


def delta(adapter, module="x"):
    return adapter.layers["unet"][module].delta()


def weighted_sum(adapters, weights, module="x"):
    return sum(weights[name] * delta(adapter, module) for name, adapter in adapters.items())


def error(adapters, weights, **settings):
    return relative_error(merge(adapters, weights, **settings), adapters, weights)["total"]


class Toy(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear, self.conv, self.point = (
            nn.Linear(20, 16),
            nn.Conv2d(6, 12, 3),
            nn.Conv2d(9, 12, 1),
        )


@pytest.fixture
def toy():
    """A small PEFT model with two random adapters of rank 4 and alphas 4 and 8."""
    torch.manual_seed(0)
    targets = ["linear", "conv", "point"]
    model = get_peft_model(
        Toy(), LoraConfig(r=4, lora_alpha=4, target_modules=targets), adapter_name="ink"
    )
    model.add_adapter("dots", LoraConfig(r=4, lora_alpha=8, target_modules=targets))
    for name, value in model.named_parameters():
        if "lora_" in name:
            nn.init.normal_(value)
    return model


def peft_layers(model):
    return {name: getattr(model.base_model.model, name) for name in ("linear", "conv", "point")}


def scale_once(model, method):
    """PEFT before 0.21 multiplies by the scaling twice in its SVD methods; with a scaling of 1 that
    cannot be seen.

    `get_delta_weight` holds it already:
    https://github.com/huggingface/peft/blob/v0.20.0/src/peft/tuners/lora/model.py
    """
    if method.endswith("svd") and Version(version_of("peft")) < Version("0.21"):
        for layer in peft_layers(model).values():
            layer.scaling.update(dict.fromkeys(layer.scaling, 1.0))


def adapters_of(model, names=("ink", "dots")):
    return {
        name: Adapter(
            {
                "unet": {
                    module: lora(
                        layer.lora_B[name].weight.data,
                        layer.lora_A[name].weight.data,
                        layer.scaling[name],
                    )
                    for module, layer in peft_layers(model).items()
                }
            }
        )
        for name in names
    }


@pytest.mark.parametrize("weights", [{"ink": 0.5, "dots": 0.5}, {"ink": 0.7, "dots": -1.2}])
@pytest.mark.parametrize("method", [m for m in METHODS if m not in DARE])
def test_the_methods_are_those_of_peft(toy, method, weights):
    scale_once(toy, method)
    toy.base_model.add_weighted_adapter(
        list(weights), list(weights.values()), "blend", method, density=0.4
    )
    ours = merge(adapters_of(toy), weights, method=method, density=0.4).layers["unet"]
    for module, theirs in adapters_of(toy, ["blend"])["blend"].layers["unet"].items():
        assert (ours[module].delta() - theirs.delta()).norm() < 1e-5 * theirs.delta().norm()
        if method == "cat" or method in BY_FACTORS:
            assert all(
                torch.allclose(ours[module].tensors[role], theirs.tensors[role], atol=1e-5)
                for role in ("up", "down")
            )


@pytest.mark.parametrize("module", ["linear", "conv", "point"])
@pytest.mark.parametrize("method", ["dare_linear", "dare_ties"])
def test_the_dare_methods_are_those_of_peft_with_the_same_seed(toy, method, module):
    weights = {"ink": 0.7, "dots": -1.2}
    torch.manual_seed(3)
    down, up = toy.base_model._generalized_task_arithmetic_weighted_adapter(
        method, [*weights], [*weights.values()], peft_layers(toy)[module], 0.4, "total"
    )
    adapters = {
        name: Adapter({"unet": {module: adapter.layers["unet"][module]}})
        for name, adapter in adapters_of(toy).items()
    }
    merged = merge(adapters, weights, method=method, density=0.4, seed=3)
    ours = merged.layers["unet"][module].tensors
    assert torch.allclose(ours["up"], up, atol=1e-5)
    assert torch.allclose(ours["down"], down, atol=1e-5)


def test_linear_is_far_from_the_sum_and_cat_is_not():
    adapters = two(out=320, inside=320)
    assert error(adapters, HALVES, method="linear") == pytest.approx(1.0, abs=0.1)
    assert error(adapters, HALVES, method="cat") < 1e-6


def test_svd_to_half_the_rank_is_the_best_there_is():
    adapters = two()
    values = torch.linalg.svdvals(weighted_sum(adapters, HALVES))
    short = merge(adapters, HALVES, method="svd")
    assert short.layers["unet"]["x"].rank == 4
    assert (delta(short) - weighted_sum(adapters, HALVES)).norm() == pytest.approx(
        float(values[4:].norm()), rel=1e-4
    )


@pytest.mark.parametrize(
    "method", [m for m in METHODS if "ties" not in m and m.endswith(("svd", "cat"))]
)
def test_what_neither_prunes_nor_cuts_is_the_sum(method):
    assert error(two(), {"a": 0.7, "b": -1.2}, method=method, density=1, rank=8) < 1e-5


@pytest.mark.parametrize("method", ["cat", "svd"])
def test_different_ranks_and_alphas_are_blended_exactly(method):
    adapters = {
        "a": random_adapter(1, rank=2, scaling=0.25),
        "b": random_adapter(2, rank=5, scaling=3.0),
        "c": random_adapter(3, rank=1),
    }
    assert error(adapters, {"a": 1, "b": -0.3, "c": 2}, method=method, rank=8) < 1e-6


@pytest.mark.parametrize("method", BY_FACTORS)
def test_smaller_factors_are_padded_to_the_largest_rank(method):
    adapters = {"a": random_adapter(1, rank=2), "b": random_adapter(2, rank=5)}
    assert merge(adapters, HALVES, method=method).layers["unet"]["x"].rank == 5


def test_linear_with_padding_has_the_cross_terms_of_the_ranks_that_meet():
    adapters = {"a": random_adapter(1, rank=2), "b": random_adapter(2, rank=5)}
    (up_a, down_a), (up_b, down_b) = (
        adapter.layers["unet"]["x"].factors() for adapter in adapters.values()
    )
    expected = weighted_sum(adapters, HALVES) + 0.5 * (up_a @ down_b[:2] + up_b[:, :2] @ down_a)
    assert torch.allclose(delta(merge(adapters, HALVES, method="linear")), expected, atol=1e-5)


def test_padding_is_no_part_of_what_pruning_counts():
    adapters = {"a": random_adapter(1, rank=2), "b": random_adapter(2, rank=8)}
    up = (
        merge(adapters, {"a": 1.0, "b": 0.0}, method="magnitude_prune")
        .layers["unet"]["x"]
        .tensors["up"]
    )
    assert int((up != 0).sum()) == 24  # half of 24 x 2


@pytest.mark.parametrize("method", METHODS)
def test_an_adapter_without_the_layer_does_not_take_part(method):
    adapters = {"a": random_adapter(1), "b": random_adapter(2, modules=("x",))}
    alone = merge({"a": adapters["a"].only(["unet"])}, {"a": 0.5}, method=method, density=1)
    together = merge(adapters, HALVES, method=method, density=1)
    assert torch.allclose(delta(together, "y"), delta(alone, "y"), atol=1e-5)


@pytest.mark.parametrize("method", METHODS)
def test_convolutions_come_back_in_their_shapes(method):
    conv = {
        name: Adapter({"unet": {"c": lora(torch.randn(8, 3, 1, 1), torch.randn(3, 5, 3, 3))}})
        for name in "ab"
    }
    tensors = merge(conv, HALVES, method=method, rank=4).layers["unet"]["c"].tensors
    rank = tensors["down"].shape[0]
    assert tensors["down"].shape == (rank, 5, 3, 3) and tensors["up"].shape == (8, rank, 1, 1)


@pytest.mark.parametrize("method", DARE)
def test_chance_is_seeded_and_the_global_generator_untouched(method):
    torch.manual_seed(5)
    before = torch.get_rng_state()
    first, again, other = (
        delta(merge(two(), HALVES, method=method, seed=seed)) for seed in (0, 0, 1)
    )
    assert torch.equal(first, again) and not torch.equal(first, other)
    assert torch.equal(torch.get_rng_state(), before)


def test_chance_does_not_depend_on_the_order_of_the_layers():
    adapters = two()
    turned = {
        name: replace(adapter, layers={"unet": dict(reversed(adapter.layers["unet"].items()))})
        for name, adapter in adapters.items()
    }
    first, other = (
        merge(some, HALVES, method="dare_linear", seed=1) for some in (adapters, turned)
    )
    assert torch.equal(delta(first), delta(other))


def test_dare_keeps_the_mean():
    adapters = two(modules=("x",))
    results = [
        delta(merge(adapters, HALVES, method="dare_linear_svd", seed=s, rank=24))
        for s in range(200)
    ]
    whole = weighted_sum(adapters, HALVES)
    assert (torch.stack(results).mean(0) - whole).norm() / whole.norm() < 0.1
    assert (results[0] - whole).norm() / whole.norm() > 0.5


@pytest.mark.parametrize("method", [m for m in METHODS if m not in ("cat", "linear", "svd")])
def test_density_zero_leaves_nothing_and_no_nan(method):
    assert delta(merge(two(), HALVES, method=method, density=0)).abs().max() == 0


def test_the_density_is_a_half_where_nothing_is_said():
    said = merge(two(), HALVES, method="ties", density=0.5)
    assert torch.equal(delta(merge(two(), HALVES, method="ties")), delta(said))


def test_weights_may_differ_by_layer():
    adapters = two()
    weights = {"a": {"unet": {"x": 2.0, "y": 0.0}}, "b": {"unet": {"x": -1.0}}}
    merged = merge(adapters, weights, method="cat")
    assert torch.allclose(delta(merged), 2 * delta(adapters["a"]) - delta(adapters["b"]), atol=1e-5)
    assert torch.allclose(delta(merged, "y"), delta(adapters["b"], "y"), atol=1e-5)
    assert relative_error(merged, adapters, weights)["total"] < 1e-6


def other_kinds():
    """A LoHa and a LoKr for a layer of 24 by 30, the latter with an outright matrix."""
    torch.manual_seed(1)
    loha = Layer(
        "loha",
        {
            "w1_a": torch.randn(24, 2),
            "w1_b": torch.randn(2, 30),
            "w2_a": torch.randn(24, 2),
            "w2_b": torch.randn(2, 30),
        },
        0.5,
        2,
    )
    lokr = Layer(
        "lokr",
        {"w1": torch.randn(4, 5), "w2_a": torch.randn(6, 2), "w2_b": torch.randn(2, 6)},
        1.0,
        2,
    )
    return {
        "a": Adapter({"unet": {"x": loha}}),
        "b": Adapter({"unet": {"x": lokr}}),
        "c": random_adapter(1, modules=("x",)),
    }


@pytest.mark.parametrize("method", ["cat", "svd", "magnitude_prune_svd"])
def test_other_kinds_than_lora_go_by_their_delta(method):
    assert (
        error(other_kinds(), {"a": 0.5, "b": -0.4, "c": 1.0}, method=method, density=1, rank=24)
        < 1e-5
    )


def test_linear_of_one_adapter_is_that_adapter_whatever_its_kind():
    for name in "ab":
        one = {name: other_kinds()[name]}
        assert error(one, {name: -0.7}, method="linear") < 1e-5


def test_factors_that_other_kinds_lack_share_the_singular_values_evenly():
    whole = Adapter({"unet": {"x": Layer("full", {"diff": 100 * torch.randn(24, 30)})}})
    tensors = merge({"a": whole}, {"a": 1.0}, method="linear").layers["unet"]["x"].tensors
    assert torch.allclose(tensors["up"].norm(dim=0), tensors["down"].norm(dim=1), rtol=1e-3)


def dora():
    """A DoRA and the weight it is for."""
    base = torch.randn(24, 30, generator=torch.Generator().manual_seed(9))
    plain = random_adapter(1, modules=("x",)).layers["unet"]["x"]
    return Adapter({"unet": {"x": replace(plain, magnitude=base.norm(dim=1) * 1.1)}}), {
        "unet": {"x": base}
    }


@pytest.mark.parametrize("method", ["cat", "svd"])
def test_a_dora_is_blended_with_its_base_at_hand(method):
    adapter, bases = dora()
    adapters = {"a": adapter, "b": random_adapter(2, modules=("x",))}
    merged = merge(adapters, HALVES, method=method, rank=24, bases=bases)
    assert relative_error(merged, adapters, HALVES, bases=bases)["total"] < 1e-5
    assert merged.layers["unet"]["x"].is_plain


def test_a_dora_without_its_base_is_refused():
    with pytest.raises(ValueError, match="depends on the base model's weights"):
        merge({"a": dora()[0]}, {"a": 1.0}, method="cat")


def test_a_kernel_that_a_file_does_not_tell_is_taken_from_the_base():
    flat = {
        name: Adapter({"unet": {"x": lora(torch.randn(24, 2), torch.randn(2, 45))}})
        for name in "ab"
    }
    merged = merge(flat, HALVES, method="cat", bases={"unet": {"x": torch.zeros(24, 5, 3, 3)}})
    assert merged.layers["unet"]["x"].tensors["down"].shape == (4, 5, 3, 3)


def test_the_rank_is_the_largest_of_the_adapters_where_nothing_is_said():
    adapters = {"a": random_adapter(1, rank=3), "b": random_adapter(2, rank=6)}
    assert {
        layer.rank for layer in merge(adapters, HALVES, method="ties_svd").layers["unet"].values()
    } == {6}


def test_base_model_and_trigger_words_are_handed_on():
    a, b = (
        replace(adapter, base_model="tiny-sd", trigger_words=words)
        for adapter, words in zip(two().values(), (("ink", "sks"), ("sks",)), strict=True)
    )
    merged = merge({"a": a, "b": b}, HALVES, method="cat")
    assert merged.base_model == "tiny-sd" and merged.trigger_words == ("ink", "sks")
    assert (
        merge({"a": a, "b": replace(b, base_model="sdxl")}, HALVES, method="cat").base_model is None
    )


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"method": "sum"}, "unknown method 'sum'; the methods are: cat"),
        ({"method": "ties", "density": 1.5}, "density must be a number from 0 to 1"),
        ({"method": "ties", "density": math.nan}, "density must be a number from 0 to 1"),
        ({"method": "svd", "rank": 0}, "rank must be a whole number of at least 1"),
        ({"method": "svd", "rank": 2.0}, "rank must be a whole number of at least 1"),
    ],
)
def test_bad_settings_are_named(settings, message):
    with pytest.raises(ValueError, match=message):
        merge(two(), HALVES, **settings)


@pytest.mark.parametrize(
    "weights, message",
    [
        ({"a": 1.0}, "give each adapter one weight"),
        ({"a": 1.0, "b": 1.0, "c": 1.0}, "give each adapter one weight"),
        ({"a": 1.0, "b": "much"}, "weight of 'b' must be a finite number, not 'much'"),
        (
            {"a": 1.0, "b": {"unet": {"x": math.inf}}},
            "weight of 'b' must be a finite number, not inf",
        ),
        ({"a": True, "b": 1.0}, "weight of 'a' must be a finite number, not True"),
    ],
)
def test_bad_weights_are_named(weights, message):
    with pytest.raises(ValueError, match=message):
        merge(two(), weights, method="cat")


def test_nothing_to_blend_is_an_error():
    with pytest.raises(ValueError, match="no adapters were given"):
        merge({}, {}, method="cat")


def test_adapters_for_different_models_are_told_apart_by_a_layer_and_both_shapes():
    adapters = {"a": random_adapter(1), "b": random_adapter(2, out=48)}
    with pytest.raises(
        ValueError, match="adapter 'a' is 24 x 30 in layer x of unet, but adapter 'b' is 48 x 30"
    ):
        merge(adapters, HALVES, method="cat")


def test_an_adapter_for_another_model_than_the_base_is_told_apart():
    with pytest.raises(
        ValueError, match="adapter 'a' is 24 x 30 in layer x of unet, but the model is 24 x 31"
    ):
        merge(two(), HALVES, method="cat", bases={"unet": {"x": torch.zeros(24, 31)}})
