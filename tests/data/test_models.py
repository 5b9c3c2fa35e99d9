import json

import pytest
import torch
from diffusers import UNet2DConditionModel
from safetensors import safe_open
from transformers import CLIPModel, CLIPTokenizer

import lorabook as lb
from judge import drawings, generated, judge, wanted

SD15_BLOCKS = (
    ["CrossAttnDownBlock2D"] * 3 + ["DownBlock2D"],
    "UNetMidBlock2DCrossAttn",
    ["UpBlock2D"] + ["CrossAttnUpBlock2D"] * 3,
)


def test_all_components_together_take_at_most_30_megabytes():
    sizes = [path.stat().st_size for path in lb.bundled("tiny-sd").rglob("*") if path.is_file()]
    assert sum(sizes) <= 30e6


def test_the_unet_has_the_topology_of_stable_diffusion_1_5():
    config = UNet2DConditionModel.load_config(lb.bundled("tiny-sd"), subfolder="unet")
    assert (
        list(config["down_block_types"]),
        config["mid_block_type"],
        list(config["up_block_types"]),
    ) == SD15_BLOCKS
    assert config["layers_per_block"] == 2


def test_the_text_encoder_is_the_text_tower_of_tiny_clip(pipe):
    tower = CLIPModel.from_pretrained(lb.bundled("tiny-clip")).text_model.state_dict()
    ours = {
        key.removeprefix("text_model."): value
        for key, value in pipe.text_encoder.state_dict().items()
    }
    assert tower.keys() == ours.keys() and all(torch.equal(tower[key], ours[key]) for key in tower)


def test_the_text_encoders_keys_are_those_that_transformers_reads_from_4_on():
    with safe_open(lb.bundled("tiny-sd") / "text_encoder/model.safetensors", "pt") as file:
        assert all(key.startswith("text_model.") for key in file.keys())  # noqa: SIM118


@pytest.mark.parametrize("folder", ["tiny-sd/tokenizer", "tiny-clip"])
def test_the_tokenizers_files_for_transformers_4_hold_what_tokenizer_json_holds(folder):
    folder = lb.bundled(folder)
    pieces = json.loads((folder / "tokenizer.json").read_text())["model"]
    assert json.loads((folder / "vocab.json").read_text()) == pieces["vocab"]
    assert (folder / "merges.txt").read_text().splitlines()[1:] == [
        " ".join(pair) for pair in pieces["merges"]
    ]


@pytest.mark.parametrize(
    "text", ["", "éclair, 日本 🎉", "a photo of an astronaut riding a horse, masterpiece, 8k"]
)
def test_any_text_tokenises(text):
    tokenizer = CLIPTokenizer.from_pretrained(lb.bundled("tiny-sd"), subfolder="tokenizer")
    ids = tokenizer(text).input_ids
    assert max(ids) < len(tokenizer) and tokenizer.decode(ids, skip_special_tokens=True).replace(
        " ", ""
    ) == text.replace(" ", "")


def test_sks_is_made_of_pieces_and_cat_is_whole(pipe):
    assert len(pipe.tokenizer.tokenize("sks")) > 1 and pipe.tokenizer.tokenize("cat") == ["cat</w>"]


def test_tiny_clip_sees_kind_color_and_place_of_held_out_drawings():
    triples = wanted(150, seed=21)
    assert min(judge(drawings(triples, seed=91_000), triples, "tiny-clip").values()) >= 0.96


def test_the_base_model_draws_what_the_prompt_says(pipe):
    triples = wanted(40, seed=22)
    seen = judge(generated(pipe, triples), triples, "tiny-clip")
    assert seen["kind"] >= 0.9 and seen["color"] >= 0.92 and seen["place"] >= 0.92, seen
