import numpy as np
import pytest

import lorabook as lb
from lorabook.live.layers import active_adapters, adapter_names


@pytest.fixture
def loaded(pipe):
    lb.load_adapter(pipe, "creatures")
    lb.load_adapter(pipe, "ink")
    lb.set_scales(pipe, {"creatures": 0.3, "ink": 0})
    return pipe


def test_methods_are_compared_in_numbers_and_pictures_and_nothing_stays(loaded):
    table = str(lb.scales_of(loaded))
    found = lb.compare_blends(
        loaded,
        {"creatures": 0.5, "ink": 0.5},
        ["a cat", "a boat"],
        methods=["cat", "linear", "svd"],
        num_inference_steps=1,
    )
    assert (
        list(found.reports) == ["cat", "linear", "svd"]
        and found.reports["cat"].error["total"] < 1e-6
    )
    assert (
        len(found.grid.images) == 2
        and len(found.grid.images[0]) == 3
        and "linear" in found._repr_html_()
    )
    assert found.grid.images[0][0] != found.grid.images[0][1]
    assert adapter_names(loaded) == ["creatures", "ink"] and active_adapters(loaded) == [
        "creatures"
    ]
    assert str(lb.scales_of(loaded)) == table


def test_only_what_is_compared_is_drawn(loaded):
    lb.load_adapter(loaded, "mosaic")
    table, active = str(lb.scales_of(loaded)), active_adapters(loaded)
    weights = {"creatures": 0.5, "ink": 0.5}
    compared = lb.compare_blends(
        loaded, weights, ["a cat", "a (boat:1.3)"], methods=["cat"], num_inference_steps=2
    )
    assert (
        active_adapters(loaded) == active == ["creatures", "mosaic"]
        and str(lb.scales_of(loaded)) == table
    )
    lb.set_scales(loaded, weights, only=True)
    together = lb.sweep(
        loaded, columns={"prompt": ["a cat", "a (boat:1.3)"]}, num_inference_steps=2
    ).images[0]
    for blended, both in zip(compared.grid.images, together, strict=True):
        assert np.abs(np.asarray(blended[0], int) - np.asarray(both, int)).max() <= 1


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_what_ends_a_comparison_puts_the_others_back(loaded, error):
    lb.load_adapter(loaded, "mosaic")
    table = str(lb.scales_of(loaded))

    def fail(*args):
        raise error

    hook = loaded.unet.register_forward_pre_hook(fail)
    with pytest.raises(error):
        lb.compare_blends(loaded, {"creatures": 0.5, "ink": 0.5}, "a cat", num_inference_steps=1)
    hook.remove()
    assert (
        adapter_names(loaded) == ["creatures", "ink", "mosaic"]
        and str(lb.scales_of(loaded)) == table
    )
    assert active_adapters(loaded) == ["creatures", "mosaic"]


def test_an_error_in_the_middle_leaves_the_pipeline_as_it_was(loaded):
    with pytest.raises(ValueError, match="unknown method 'mean'"):
        lb.compare_blends(
            loaded,
            {"creatures": 0.5, "ink": 0.5},
            "a cat",
            methods=["cat", "mean"],
            num_inference_steps=1,
        )
    assert adapter_names(loaded) == ["creatures", "ink"] and active_adapters(loaded) == [
        "creatures"
    ]


def test_block_effects_measure_each_block_by_weights_and_by_pictures(pipe):
    lb.load_adapter(pipe, "patch_cat")  # it has a text encoder's part
    before = str(lb.list_adapters(pipe))
    effects = lb.block_effects(
        pipe, "patch_cat", "a drawing of sks cat", seeds=(0,), num_inference_steps=3
    )
    view = lb.inspect_adapter("patch_cat")
    assert list(effects.blocks) == list(view.norms) and "text_encoder" in effects.blocks
    assert {block: effect.norm for block, effect in effects.blocks.items()} == pytest.approx(
        view.norms, rel=1e-4
    )
    assert sum(effect.spectrum for effect in effects.blocks.values()) == pytest.approx(1)
    assert all(0 < effect.pixels < 1 for effect in effects.blocks.values())
    assert (
        len(effects.grid.columns) == len(effects.blocks) + 2
        and str(lb.list_adapters(pipe)) == before
    )


def test_the_picture_of_a_block_is_that_of_its_scale_alone(pipe):
    lb.load_adapter(pipe, "creatures")
    effects = lb.block_effects(pipe, "creatures", "a red cat", seeds=(3,), num_inference_steps=2)
    column = list(effects.grid.columns).index("up.1 alone")
    others = {f"block_{number}": 0.0 for number in (0, 2, 3)}
    lb.set_scales(pipe, {"creatures": {"unet": {"down": 0.0, "mid": 0.0, "up": others}}})
    alone = lb.sweep(pipe, "a red cat", columns={"seed": [3]}, num_inference_steps=2).images[0][0]
    assert (
        np.abs(np.asarray(alone, int) - np.asarray(effects.grid.images[0][column], int)).max() <= 1
    )


def test_the_ranks_agree_as_spearman_says(pipe):
    lb.load_adapter(pipe, "ink")
    effects = lb.block_effects(pipe, "ink", "a red cat", seeds=(0,), num_inference_steps=2)
    ranks = effects.ranks
    for measure in ("norm", "spectrum", "pixels"):
        assert sorted(ranks[measure]) == list(range(1, len(effects.blocks) + 1))
    gaps, n = ranks["norm"] - ranks["pixels"], len(ranks)
    assert effects.agreement["norm and pixels"] == pytest.approx(
        1 - 6 * sum(gap**2 for gap in gaps) / (n * (n**2 - 1))
    )
    assert (
        "agreement of the places" in effects._repr_html_()
        and "up.1" in str(effects)
        and effects.plot()._repr_png_()
    )


def test_block_effects_of_an_unknown_adapter_name_those_there(pipe):
    lb.load_adapter(pipe, "ink")
    with pytest.raises(ValueError, match="has no adapter 'nik'; it has: ink"):
        lb.block_effects(pipe, "nik", "a red cat")
