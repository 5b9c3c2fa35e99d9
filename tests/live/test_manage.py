import gc
import weakref

import pytest
import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors.torch import load_file, save_file

import lorabook as lb
from adapter_files import ATTENTION, add_random, plain
from lorabook.live import layers, manage
from lorabook.live.layers import active_adapters, layers_of, models_of
from lorabook.lora.source import read_source


def draw(pipe):
    return pipe(
        "a red cat",
        num_inference_steps=3,
        output_type="pt",
        generator=torch.Generator().manual_seed(0),
    ).images


@pytest.fixture
def loaded(pipe):
    lb.load_adapter(pipe, "creatures")
    lb.load_adapter(pipe, "patch_cat")
    return pipe


def test_the_table_tells_what_is_there(loaded):
    lb.set_scales(loaded, {"creatures": {"unet": {"down": 0.5}}})
    lb.fuse(loaded, {"patch_cat": 0.7})
    first, second = lb.list_adapters(loaded)
    assert (first.name, first.format, first.ranks, first.active, first.scales, first.fused) == (
        "creatures",
        "diffusers",
        (16,),
        True,
        (0.5, 1.0),
        False,
    )
    assert (second.name, second.fused, second.scales) == ("patch_cat", True, (0.7,))
    assert second.components == ("unet", "text_encoder")
    assert first.megabytes == pytest.approx(6.18, abs=0.02) and first.device == "cpu"
    for shown in (str(lb.list_adapters(loaded)), lb.list_adapters(loaded)._repr_html_()):
        assert "creatures" in shown and "0.5 to 1" in shown and "fused" in shown


def test_a_pipeline_without_adapters_has_an_empty_table(pipe):
    assert len(lb.list_adapters(pipe)) == 0 and str(lb.list_adapters(pipe)) == "no adapters"


def test_switched_off_and_on_it_draws_the_same(loaded):
    before = draw(loaded)
    lb.disable_adapters(loaded, "creatures")
    assert active_adapters(loaded) == ["patch_cat"] and not torch.equal(draw(loaded), before)
    lb.disable_adapters(loaded)
    assert active_adapters(loaded) == []
    lb.enable_adapters(loaded)
    assert torch.equal(draw(loaded), before)


def test_removed_the_pipeline_is_plain_again(pipe):
    base = draw(pipe)
    lb.load_adapter(pipe, "creatures")
    lb.set_scales(pipe, {"creatures": {"steps": [[0, 0.5, 0]]}})
    lb.remove_adapter(pipe, "creatures")
    assert torch.equal(draw(pipe), base) and not any(
        isinstance(m, BaseTunerLayer) for m in pipe.unet.modules()
    )
    assert lb.load_adapter(pipe, "ink").name == "ink" and lb.scales_of(pipe).steps == {}


def test_removing_one_leaves_the_other_as_it_was(loaded):
    lb.set_scales(loaded, {"creatures": 0, "patch_cat": 0.4})
    before = draw(loaded)
    lb.remove_adapter(loaded, "creatures")
    assert torch.equal(draw(loaded), before)


def test_unloading_takes_all_off(loaded):
    base = lb.base_checksum(loaded)
    lb.fuse(loaded, {"creatures": 1})
    lb.unfuse(loaded)
    lb.unload_adapters(loaded)
    assert len(lb.list_adapters(loaded)) == 0 and lb.base_checksum(loaded) == base


def test_unloaded_after_fusing_what_is_fused_stays_and_is_saved(loaded, tmp_path):
    lb.fuse(loaded, {"creatures": 0.7, "patch_cat": 1})
    lb.load_adapter(loaded, "ink")
    lb.remove_adapter(loaded, "ink")
    expected, fused = draw(loaded), lb.base_checksum(loaded)
    lb.unload_adapters(loaded)
    assert len(lb.list_adapters(loaded)) == 0 and lb.base_checksum(loaded) == fused
    loaded.save_pretrained(tmp_path)
    assert torch.equal(draw(plain(str(tmp_path))), expected)


def test_unloaded_after_fusing_the_memory_of_the_originals_is_free(loaded):
    lb.fuse(loaded)
    originals = [
        weakref.ref(weight)
        for model in models_of(loaded).values()
        for weight in model.lorabook.base_weights.values()
    ]
    halves = [
        weakref.ref(layer.up)
        for model in models_of(loaded).values()
        for share in model.lorabook.fused.values()
        for layer in share.layers.values()
    ]
    assert len(originals) > 279 and len(halves) > len(originals)
    lb.unload_adapters(loaded)
    gc.collect()
    assert not any(one() is not None for one in (*originals, *halves))


def test_unloaded_after_fusing_in_part_the_rest_is_taken_off(loaded):
    lb.fuse(loaded, {"patch_cat": 1}, components=["unet"])
    lb.unload_adapters(loaded)
    assert len(lb.list_adapters(loaded)) == 0
    assert not any(isinstance(module, BaseTunerLayer) for module in loaded.text_encoder.modules())


def test_what_is_fused_for_good_cannot_be_unfused_and_others_can(loaded):
    lb.fuse(loaded, {"creatures": 1})
    lb.unload_adapters(loaded)
    for names in (None, "creatures", ["creatures"]):
        with pytest.raises(ValueError, match="'creatures' is fused for good.*load the model anew"):
            lb.unfuse(loaded, names)
    kept = lb.base_checksum(loaded)
    lb.load_adapter(loaded, "creatures")
    lb.fuse(loaded)
    lb.unfuse(loaded)
    assert lb.base_checksum(loaded) == kept and lb.list_adapters(loaded)["creatures"].active


def test_an_adapter_that_diffusers_loaded_is_listed_and_removed(pipe):
    base = draw(pipe)
    add_random(pipe, ATTENTION)
    assert lb.list_adapters(pipe)["random"].ranks == (4,)
    lb.remove_adapter(pipe, "random")
    assert torch.equal(draw(pipe), base)


def test_what_diffusers_does_itself_goes_on_working(loaded):
    lb.set_scales(loaded, {"patch_cat": 0})
    alone = draw(loaded)
    loaded.set_adapters(["creatures"], [1.0])
    assert torch.equal(draw(loaded), alone) and loaded.get_list_adapters()["unet"] == [
        "creatures",
        "patch_cat",
    ]
    loaded.delete_adapters("patch_cat")
    assert [row.name for row in lb.list_adapters(loaded)] == ["creatures"]
    loaded.unload_lora_weights()
    assert len(lb.list_adapters(loaded)) == 0


def test_moving_to_where_it_is_changes_nothing_and_an_unknown_device_is_an_error(loaded):
    before = draw(loaded)
    lb.move_adapter(loaded, "creatures", "cpu")
    assert torch.equal(draw(loaded), before)
    with pytest.raises(ValueError, match="device 'moon'"):
        lb.move_adapter(loaded, "creatures", "moon")


def test_moved_away_from_its_model_it_is_switched_off(loaded, monkeypatch):
    monkeypatch.setattr(
        manage, "device_of", lambda layer: torch.device("meta")
    )  # as if the model were elsewhere
    lb.move_adapter(loaded, "creatures", "cpu")
    assert active_adapters(loaded) == ["patch_cat"]


@pytest.mark.parametrize(
    "bring",
    [
        lambda pipe: lb.enable_adapters(pipe, "creatures"),
        lb.enable_adapters,
        lambda pipe: lb.set_scales(pipe, {"creatures": 0.5}),
        lambda pipe: lb.set_scales(pipe, {"creatures": {"unet": {"down": 0}}}, only=True),
    ],
)
def test_what_waits_on_another_device_comes_back_when_it_takes_part_again(
    loaded, monkeypatch, bring
):
    there, moves = torch.device("cuda:0"), []
    for module in (manage, layers):
        monkeypatch.setattr(module, "device_of", lambda layer: there)
        monkeypatch.setattr(
            module, "move_weights", lambda layer, name, device: moves.append((name, device))
        )
    lb.move_adapter(loaded, "creatures", "cpu")
    assert {device.type for name, device in moves if name == "creatures"} == {"cpu"}
    assert active_adapters(loaded) == ["patch_cat"]
    moves.clear()
    lb.set_scales(loaded, {"creatures": 0, "patch_cat": 0.5})
    lb.disable_adapters(loaded, "patch_cat")
    assert not [move for move in moves if move[0] == "creatures"]
    bring(loaded)
    assert moves.count(("creatures", there)) == len(layers_of(loaded, "creatures")["unet"])
    assert "creatures" in active_adapters(loaded)


def test_all_that_an_adapter_has_in_a_layer_moves(pipe):
    add_random(pipe, ATTENTION, text=False, use_dora=True)
    layer = next(iter(layers_of(pipe, "random")["unet"].values()))
    layers.move_weights(layer, "random", torch.device("meta"))
    own = {
        name: value for name, value in layer.named_parameters() if not name.startswith("base_layer")
    }
    assert any("lora_magnitude_vector" in name for name in own)
    assert all(value.is_meta for value in own.values())
    assert not layer.get_base_layer().weight.is_meta


def test_the_meta_device_which_holds_nothing_is_refused(loaded):
    with pytest.raises(ValueError, match="meta device holds no weights"):
        lb.move_adapter(loaded, "creatures", "meta")
    assert lb.list_adapters(loaded)["creatures"].device == "cpu"


@pytest.mark.parametrize(
    "move",
    ["remove_adapter", "enable_adapters", "disable_adapters", "swap_adapter", "move_adapter"],
)
def test_an_unknown_name_lists_those_there_are(loaded, move):
    arguments = {"swap_adapter": ("ink",), "move_adapter": ("cpu",)}.get(move, ())
    with pytest.raises(ValueError, match="no adapter 'quack'; it has: creatures, patch_cat"):
        getattr(lb, move)(loaded, "quack", *arguments)


# swapping


def alone(source, name="style", scale=1.0):
    pipe = lb.load_pipeline("tiny-sd", device="cpu")
    pipe.set_progress_bar_config(disable=True)
    lb.load_adapter(pipe, source, name)
    lb.set_scales(pipe, {name: scale})
    return draw(pipe)


@pytest.mark.parametrize("other", ["ink", "mosaic", "patch_cat", "patch_cat_no_text"])
def test_a_swapped_adapter_is_the_loaded_one_at_the_olds_scale(pipe, other):
    lb.load_adapter(pipe, "creatures", "style")
    lb.set_scales(pipe, {"style": 0.6})
    report = lb.swap_adapter(pipe, "style", other)
    assert (
        report.name == "style"
        and report.layers.keys() == lb.load_adapter(pipe, other, "again").layers.keys()
    )
    lb.remove_adapter(pipe, "again")
    assert (draw(pipe) - alone(other, scale=0.6)).abs().max().item() < 1e-5


def test_a_swap_within_the_layers_and_ranks_that_are_there_is_in_place(pipe):
    lb.load_adapter(pipe, "creatures", "style")
    layer = next(iter(layers_of(pipe, "style")["unet"].values()))
    before = layer.lora_A["style"].weight.data_ptr()
    lb.swap_adapter(pipe, "style", "ink")
    assert layer.lora_A["style"].weight.data_ptr() == before


def test_a_source_that_does_not_fit_leaves_the_old_one(pipe, tmp_path):
    lb.load_adapter(pipe, "creatures", "style")
    before = draw(pipe)
    save_file(
        {
            "unet.nowhere.lora_A.weight": torch.ones(1, 2),
            "unet.nowhere.lora_B.weight": torch.ones(2, 1),
        },
        tmp_path / "other.safetensors",
    )
    with pytest.raises(ValueError, match="does not fit"):
        lb.swap_adapter(pipe, "style", tmp_path / "other.safetensors")
    assert torch.equal(draw(pipe), before)


def test_a_compiled_model_takes_others_of_different_rank_without_compiling_anew(pipe):
    lb.load_adapter(pipe, "ink", "style", hotswap_rank=16)  # rank 8
    pipe.unet = torch.compile(pipe.unet, backend="eager")
    draw(pipe)
    with torch._dynamo.config.patch(error_on_recompile=True):
        lb.swap_adapter(pipe, "style", "creatures")  # rank 16
        swapped = draw(pipe)
        lb.set_scales(pipe, {"style": 0.5})
        half = draw(pipe)
    assert (swapped - alone("creatures")).abs().max().item() < 1e-4
    assert (half - alone("creatures", scale=0.5)).abs().max().item() < 1e-4


def test_a_swap_leaves_the_weights_that_an_adapter_came_from_alone(pipe):
    first, second = (load_file(read_source(name).path) for name in ("creatures", "ink"))
    lb.load_adapter(pipe, first, "style")
    before = draw(pipe)
    lb.swap_adapter(pipe, "style", second)
    lb.swap_adapter(pipe, "style", first)
    assert torch.equal(draw(pipe), before)


def test_what_a_swap_left_empty_is_not_saved(pipe, tmp_path):
    lb.load_adapter(pipe, "patch_cat", "style", hotswap_rank=32)
    lb.swap_adapter(pipe, "style", "ink")
    lb.save_adapter(pipe, tmp_path / "saved")
    found = read_source(tmp_path / "saved").adapter
    assert found.layers.keys() == {"unet"} and {
        layer.rank for layer in found.layers["unet"].values()
    } == {8}


@pytest.mark.parametrize("config", [{"use_dora": True}, {"use_rslora": True}])
def test_what_peft_put_on_its_own_way_is_fused_and_swapped_truly(pipe, config):
    add_random(pipe, ATTENTION, text=False, **config)
    before = draw(pipe)
    with lb.fused(pipe):
        assert (draw(pipe) - before).abs().max().item() < 1e-3
    assert (draw(pipe) - before).abs().max().item() < 1e-3
    lb.remove_adapter(pipe, "random")
    add_random(pipe, ATTENTION, text=False, **config)
    weights = {
        key: value
        for key, value in load_file(read_source("ink").path).items()
        if any(f"{end}.lora" in key for end in ATTENTION)
    }
    lb.swap_adapter(pipe, "random", weights)
    assert (draw(pipe) - alone(weights)).abs().max().item() < 1e-4


def test_an_adapter_with_more_layers_is_told_apart_on_a_compiled_model(pipe):
    add_random(pipe, ATTENTION)
    pipe.unet = torch.compile(pipe.unet, backend="eager")
    with pytest.warns(
        UserWarning, match="layers that the one in its place lacks.*compiled once more"
    ):
        lb.swap_adapter(pipe, "random", "creatures")
    assert (draw(pipe) - alone("creatures")).abs().max().item() < 1e-4


def test_a_hotswap_rank_below_the_adapters_is_an_error(pipe):
    with pytest.raises(ValueError, match="hotswap_rank must be a whole number of at least 16"):
        lb.load_adapter(pipe, "creatures", hotswap_rank=8)
    assert len(lb.list_adapters(pipe)) == 0
