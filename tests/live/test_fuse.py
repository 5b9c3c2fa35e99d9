import random

import pytest
import torch
from diffusers import StableDiffusionPipeline

import lorabook as lb
from adapter_files import plain
from conftest import tiny_sdxl
from lorabook.live.layers import layers_of

SCALES = {
    "creatures": {"unet": {"down": 0.5, "up": {"block_1": [0.4, 0.8, 1.0]}}},
    "patch_cat": 0.6,
}


def draw(pipe):
    return pipe(
        "a red cat",
        num_inference_steps=3,
        output_type="pt",
        generator=torch.Generator().manual_seed(0),
    ).images


def close(a, b) -> bool:
    return (a - b).abs().max().item() < 1e-4


@pytest.fixture
def loaded(pipe):
    lb.load_adapter(pipe, "creatures")
    lb.load_adapter(pipe, "patch_cat")
    lb.set_scales(pipe, SCALES)
    return pipe


def test_fused_it_draws_the_same_picture_and_unfused_everything_is_as_before(loaded):
    before, checksum = draw(loaded), lb.base_checksum(loaded)
    report = lb.fuse(loaded)
    assert report.fused == ("creatures", "patch_cat") and lb.base_checksum(loaded) != checksum
    assert close(draw(loaded), before)
    lb.unfuse(loaded)
    assert lb.base_checksum(loaded) == checksum and torch.equal(draw(loaded), before)


def test_the_dictionary_replaces_the_present_scales_and_unfusing_brings_them_back(loaded):
    lb.set_scales(loaded, {"creatures": 0.9, "patch_cat": 0})
    expected = draw(loaded)
    lb.set_scales(loaded, SCALES)
    table = str(lb.scales_of(loaded))
    lb.disable_adapters(loaded, "patch_cat")
    lb.fuse(loaded, {"creatures": 0.9})
    assert close(draw(loaded), expected)
    lb.unfuse(loaded, "creatures")
    lb.enable_adapters(loaded, "patch_cat")
    assert str(lb.scales_of(loaded)) == table


@pytest.mark.parametrize("order", [("creatures", "patch_cat"), ("patch_cat", "creatures")])
def test_one_after_another_is_as_together_and_undone_in_any_order(loaded, order):
    checksum = lb.base_checksum(loaded)
    lb.fuse(loaded, {"creatures": 0.5, "patch_cat": 1})
    together = lb.base_checksum(loaded)
    lb.unfuse(loaded)
    for name, scale in {"creatures": 0.5, "patch_cat": 1}.items():
        lb.fuse(loaded, {name: scale})
    assert lb.base_checksum(loaded) == together
    for name in order:
        lb.unfuse(loaded, name)
    assert lb.base_checksum(loaded) == checksum


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_ten_rounds_leave_the_base_bit_for_bit(dtype):
    pipe = lb.load_pipeline("tiny-sd", device="cpu", dtype=dtype)
    checksum = lb.base_checksum(pipe)
    lb.load_adapter(pipe, "creatures")
    for round_ in range(10):
        lb.fuse(pipe, {"creatures": 0.7 + 0.1 * round_})
        lb.unfuse(pipe)
    assert lb.base_checksum(pipe) == checksum


def test_others_are_free_to_load_scale_and_remove_meanwhile(loaded):
    checksum = lb.base_checksum(loaded)
    lb.fuse(loaded, {"creatures": 1})
    fused = draw(loaded)
    lb.load_adapter(loaded, "ink")
    lb.set_scales(loaded, {"ink": 0.5, "patch_cat": 0.1})
    assert not close(draw(loaded), fused)
    lb.remove_adapter(loaded, "ink")
    lb.set_scales(loaded, {"patch_cat": 0.6})
    assert torch.equal(draw(loaded), fused)
    lb.unfuse(loaded)
    assert lb.base_checksum(loaded) == checksum


@pytest.mark.parametrize(
    "move",
    [
        "set_scales",
        "remove_adapter",
        "swap_adapter",
        "disable_adapters",
        "move_adapter",
        "blend",
        "fuse",
    ],
)
def test_what_would_move_a_fused_adapter_is_refused_with_the_remedy(loaded, move):
    lb.fuse(loaded)
    checksum = lb.base_checksum(loaded)
    named = dict.fromkeys(["set_scales", "blend", "fuse"], ({"creatures": 0.1},))
    named |= {"swap_adapter": ("creatures", "ink"), "move_adapter": ("creatures", "cpu")}
    arguments = named.get(move, ("creatures",))
    with pytest.raises(
        ValueError, match=r"'creatures' is fused.*call unfuse\(pipe, 'creatures'\) first"
    ):
        getattr(lb, move)(loaded, *arguments, **{"new_name": "x"} if move == "blend" else {})
    assert lb.base_checksum(loaded) == checksum


def test_components_that_are_not_fused_stay_on(loaded):
    before = draw(loaded)
    lb.fuse(loaded, components="unet")
    assert layers_of(loaded, "patch_cat").keys() == {"text_encoder"} and close(draw(loaded), before)
    lb.unfuse(loaded)
    assert layers_of(loaded, "patch_cat").keys() == {"unet", "text_encoder"} and torch.equal(
        draw(loaded), before
    )


def test_partly_fused_adapters_are_named_and_undone_in_their_order(loaded, tmp_path):
    before = draw(loaded)
    lb.fuse(loaded, {"patch_cat": 0.6}, components=["unet"])
    lb.fuse(loaded)  # what is not fused yet: creatures
    assert [row.fused for row in lb.list_adapters(loaded)] == [True, True] and close(
        draw(loaded), before
    )
    with pytest.raises(ValueError, match="'patch_cat' is fused"):
        lb.save_adapter(loaded, tmp_path / "x", name="patch_cat")
    lb.disable_adapters(loaded)  # there is none that is free
    lb.unfuse(loaded)
    assert torch.equal(draw(loaded), before)


def test_a_component_that_the_adapter_lacks_is_an_error(loaded):
    with pytest.raises(ValueError, match="'creatures' has nothing in text_encoder; it is for unet"):
        lb.fuse(loaded, {"creatures": 1}, components=["text_encoder"])


def test_a_fused_pipeline_takes_save_pretraineds_own_arguments(loaded, tmp_path):
    lb.fuse(loaded)
    loaded.save_pretrained(tmp_path, variant="fp16")
    assert (tmp_path / "unet/diffusion_pytorch_model.fp16.safetensors").is_file()
    assert (tmp_path / "text_encoder/model.fp16.safetensors").is_file()


@pytest.mark.parametrize(
    "call",
    [lambda p: lb.fuse(p, ["creatures"]), lambda p: lb.fuse(p, 0.5), lambda p: lb.unfuse(p, 3)],
)
def test_what_are_no_names_and_scales_is_one_sentence(loaded, call):
    with pytest.raises(ValueError, match="must be a|must be an"):
        call(loaded)


def test_the_block_restores_on_the_way_out_of_an_error(loaded):
    before, checksum = draw(loaded), lb.base_checksum(loaded)
    with pytest.raises(KeyError), lb.fused(loaded, {"creatures": 2}):
        assert lb.list_adapters(loaded)["creatures"].fused
        raise KeyError
    assert lb.base_checksum(loaded) == checksum and torch.equal(draw(loaded), before)


def test_the_block_undoes_only_what_it_fused(loaded):
    lb.fuse(loaded, {"patch_cat": 1})
    with lb.fused(loaded, {"creatures": 1}) as report:
        assert report.fused == ("patch_cat", "creatures")
    assert [row.name for row in lb.list_adapters(loaded) if row.fused] == ["patch_cat"]


def test_a_fused_pipeline_is_saved_and_loads_without_lorabook(loaded, tmp_path):
    lb.fuse(loaded)
    expected = draw(loaded)
    lb.load_adapter(loaded, "ink")  # what is not fused is not saved, and does no harm
    loaded.save_pretrained(tmp_path)
    assert torch.equal(draw(plain(str(tmp_path))), expected)
    assert lb.list_adapters(loaded)["ink"].active


def test_a_pipeline_with_adapters_that_are_not_fused_saves_its_base(loaded, tmp_path):
    loaded.save_pretrained(tmp_path)
    again = StableDiffusionPipeline.from_pretrained(tmp_path)
    assert lb.base_checksum(again) == lb.base_checksum(loaded)


def test_what_shares_the_model_knows_what_is_fused(loaded):
    other = StableDiffusionPipeline(**loaded.components, requires_safety_checker=False)
    lb.fuse(loaded, {"creatures": 1})
    with pytest.raises(ValueError, match="is fused already"):
        lb.fuse(other, {"creatures": 1})
    lb.unfuse(other)
    assert not any(row.fused for row in lb.list_adapters(loaded))


def test_sdxl_is_fused_with_both_text_encoders(tmp_path):
    from adapter_files import add_random

    pipe = plain(tiny_sdxl(tmp_path))
    checksum = lb.base_checksum(pipe)
    add_random(pipe)
    before = draw(pipe)
    lb.fuse(pipe)
    assert close(draw(pipe), before)
    lb.unfuse(pipe)
    assert lb.base_checksum(pipe) == checksum and torch.equal(draw(pipe), before)


def test_weights_that_are_not_finite_are_refused_before_anything_changes(loaded):
    checksum = lb.base_checksum(loaded)
    layer = next(iter(layers_of(loaded, "patch_cat")["unet"].values()))
    layer.lora_B["patch_cat"].weight.data[0, 0] = float("nan")
    with pytest.raises(ValueError, match="'patch_cat' has weights that are not finite in layer"):
        lb.fuse(loaded)
    assert lb.base_checksum(loaded) == checksum and not any(
        row.fused for row in lb.list_adapters(loaded)
    )


def test_an_overflow_in_half_precision_is_refused():
    pipe = lb.load_pipeline("tiny-sd", device="cpu", dtype=torch.float16)
    lb.load_adapter(pipe, "creatures")
    checksum = lb.base_checksum(pipe)
    with pytest.raises(ValueError, match="infinite in float16; give a smaller scale"):
        lb.fuse(pipe, {"creatures": 1e6})
    assert lb.base_checksum(pipe) == checksum


def test_scales_over_the_denoising_are_refused(loaded):
    lb.set_scales(loaded, {"creatures": {"steps": [[0, 0.5, 0]]}})
    for scales in (None, {"creatures": {"steps": [[0, 0.5, 0]]}}):
        with pytest.raises(ValueError, match="'creatures' change over the denoising"):
            lb.fuse(loaded, scales)


def test_nothing_fused_and_unknown_names_are_errors(loaded):
    with pytest.raises(ValueError, match="nothing is fused"):
        lb.unfuse(loaded)
    lb.fuse(loaded, {"creatures": 1})
    with pytest.raises(ValueError, match="'patch_cat' is not fused; fused are: creatures"):
        lb.unfuse(loaded, ["creatures", "patch_cat"])
    with pytest.raises(ValueError, match="no adapter 'quack'"):
        lb.fuse(loaded, {"quack": 1})
    with pytest.raises(ValueError, match="'vae' is no component.*unet, text_encoder"):
        lb.fuse(loaded, {"patch_cat": 1}, components=["vae"])


def test_what_diffusers_fused_itself_is_left_to_it(loaded):
    loaded.fuse_lora(adapter_names=["creatures"])
    with pytest.raises(ValueError, match=r"fused by diffusers itself; call pipe.unfuse_lora\(\)"):
        lb.fuse(loaded, {"creatures": 1})


def play(pipe, rng: random.Random, moves: int) -> None:
    """Random moves, each one legal."""
    for _ in range(moves):
        table = lb.list_adapters(pipe)
        fused, free = [r.name for r in table if r.fused], [r.name for r in table if not r.fused]
        missing = [n for n in ("creatures", "ink", "patch_cat") if n not in fused + free]
        on_free = ["scale", "fuse", "swap", "remove"] * bool(free)
        move = rng.choice(["load"] * bool(missing) + on_free + ["unfuse"] * bool(fused))
        if move == "load":
            lb.load_adapter(pipe, rng.choice(missing))
        elif move == "unfuse":
            lb.unfuse(pipe, rng.choice(fused))
        elif move == "scale":
            lb.set_scales(
                pipe, {rng.choice(free): rng.choice([0, 0.5, -1, {"unet": {"down": 0.3}}])}
            )
        elif move == "fuse":
            lb.fuse(pipe, {rng.choice(free): rng.uniform(-1, 2)})
        elif move == "swap":
            lb.swap_adapter(
                pipe, rng.choice(free), rng.choice(["creatures", "ink", "mosaic", "patch_cat"])
            )
        else:
            lb.remove_adapter(pipe, rng.choice(free))


def undo(pipe) -> None:
    if any(row.fused for row in lb.list_adapters(pipe)):
        lb.unfuse(pipe)
    lb.unload_adapters(pipe)


@pytest.mark.parametrize("seed", range(6))
def test_after_random_moves_all_undone_the_base_is_bit_equal(pipe, seed):
    base, checksum = draw(pipe), lb.base_checksum(pipe)
    play(pipe, random.Random(seed), 8)
    undo(pipe)
    assert lb.base_checksum(pipe) == checksum and torch.equal(draw(pipe), base)
