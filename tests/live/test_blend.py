import pytest
import torch

import lorabook as lb
from lorabook.live.layers import active_adapters, layers_of
from lorabook.lora.merge import METHODS


def draw(pipe):
    return pipe(
        "a red cat",
        num_inference_steps=3,
        output_type="pt",
        generator=torch.Generator().manual_seed(0),
    ).images


@pytest.fixture
def loaded(pipe):
    lb.load_adapter(pipe, "creatures")  # rank 16
    lb.load_adapter(pipe, "patch_cat")  # rank 8, text encoder too
    return pipe


def test_cat_is_what_both_at_these_scales_draw(loaded):
    lb.set_scales(loaded, {"creatures": 0.6, "patch_cat": -0.4})
    expected = draw(loaded)
    report = lb.blend(loaded, {"creatures": 0.6, "patch_cat": -0.4}, new_name="mix")
    assert active_adapters(loaded) == ["mix"] and report.error["total"] < 1e-6 and report.rank == 24
    assert (draw(loaded) - expected).abs().max().item() < 1e-4


def test_weights_may_be_by_block(loaded):
    scales = {
        "creatures": {"unet": {"down": 0, "mid": 0.5}},
        "patch_cat": {"unet": {"up": 0}, "text_encoder": 0.5},
    }
    lb.set_scales(loaded, scales)
    expected = draw(loaded)
    lb.blend(loaded, scales, new_name="mix")
    assert (draw(loaded) - expected).abs().max().item() < 1e-4


@pytest.mark.parametrize("method", METHODS)
def test_every_method_takes_adapters_of_different_rank(loaded, method):
    report = lb.blend(
        loaded, {"creatures": 0.5, "patch_cat": 0.5}, method=method, new_name="mix", seed=1
    )
    assert report.method == method and draw(loaded).isfinite().all()
    assert {layer.r["mix"] for layer in layers_of(loaded, "mix")["unet"].values()} <= {8, 16, 24}
    assert (report.error["total"] < 1e-6) == (method == "cat")


def test_dare_is_seeded_and_leaves_the_global_generator_alone(loaded):
    before = torch.get_rng_state()
    errors = []
    for number, seed in enumerate((0, 0, 1)):
        errors.append(
            lb.blend(
                loaded, {"creatures": 1}, method="dare_linear", new_name=f"mix{number}", seed=seed
            ).error
        )
    assert errors[0] == errors[1] != errors[2] and torch.equal(before, torch.get_rng_state())


def test_adapters_that_are_not_blended_keep_their_state(loaded):
    lb.load_adapter(loaded, "ink")
    lb.blend(loaded, {"creatures": 0.5, "patch_cat": 0.5}, new_name="mix")
    assert active_adapters(loaded) == ["ink", "mix"]


def test_a_blend_is_saved_scaled_and_fused_like_any_other(loaded, tmp_path):
    lb.blend(loaded, {"creatures": 0.5, "patch_cat": 0.5}, method="svd", rank=6, new_name="mix")
    expected = draw(loaded)
    lb.save_adapter(loaded, tmp_path / "mix.safetensors", name="mix")
    lb.fuse(loaded, {"mix": 1})
    assert (draw(loaded) - expected).abs().max().item() < 1e-4
    lb.unfuse(loaded)
    lb.unload_adapters(loaded)
    assert lb.load_adapter(loaded, tmp_path / "mix.safetensors").rank == 6
    assert (draw(loaded) - expected).abs().max().item() < 1e-5


def test_the_report_shows_itself(loaded):
    weights = {"creatures": 0.5, "patch_cat": {"unet": {"mid": 0.5}}}
    report = lb.blend(loaded, weights, new_name="mix")
    assert report.ranks == {"creatures": 16, "patch_cat": 8} and report.rank == 24
    assert "blend 'mix' by cat, rank 24, of 'creatures' (weight 0.5, rank 16)" in str(report)
    assert "'patch_cat' (weight by layer, rank 8)" in str(report) and "down.0" in str(report)
    assert ">down.0</td>" in report._repr_html_()
    assert dict(report.table.values) == report.error


def test_interference_takes_files_or_names_on_a_pipeline(loaded):
    of_files = lb.interference("creatures", "patch_cat")
    on_pipe = lb.interference("creatures", "patch_cat", pipe=loaded)
    assert of_files.total.cosine == pytest.approx(on_pipe.total.cosine, abs=1e-6)
    assert lb.interference("ink", "ink").total.cosine == pytest.approx(1)
