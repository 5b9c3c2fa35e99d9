import random

import pytest
import torch

import lorabook as lb
from lorabook.metrics import image_features
from styles import draw_creature
from world import scene

CLIP = "tiny-clip"


@pytest.fixture
def red_cat():
    return scene("cat", "red", "a green field", random.Random(1))


def test_a_drawing_is_closest_to_its_own_caption(red_cat):
    prompts = [
        "a blue cat on a green field",
        "a red cat on a green field",
        "a red boat on a green field",
    ]
    assert lb.prompt_similarity([red_cat], prompts, model=CLIP).argmax() == 1


def test_similarities_have_a_row_an_image_and_a_column_a_prompt(red_cat):
    similarity = lb.prompt_similarity([red_cat] * 3, ["a cat", "a car"], model=CLIP)
    assert similarity.shape == (3, 2) and similarity.abs().max() <= 1


def test_an_image_is_most_like_itself(red_cat):
    other = scene("boat", "blue", "a night sky", random.Random(2))
    similarity = lb.image_similarity([red_cat], [red_cat, other], model=CLIP)
    assert similarity[0, 0] == pytest.approx(1, abs=1e-5) and similarity[0, 1] < 0.9


def test_it_knows_creatures_too():
    image = draw_creature("blue", ["horns"], random.Random(3))
    prompts = ["a blue cat", "a cartoon blue creature with horns"]
    assert lb.prompt_similarity([image], prompts, model=CLIP).argmax() == 1


def test_many_images_are_looked_at_in_parts(red_cat):
    features = image_features([red_cat] * 70, model=CLIP)
    assert features.shape[0] == 70 and torch.allclose(features[0], features[69], atol=1e-5)


def test_a_clip_model_can_be_a_folder(red_cat):
    folder = lb.bundled(CLIP)
    assert torch.equal(
        image_features([red_cat], model=folder), image_features([red_cat], model=CLIP)
    )


def test_an_unknown_clip_model_says_where_it_was_looked_for(red_cat):
    with pytest.raises(FileNotFoundError, match="CLIP model 'nothing' not found"):
        image_features([red_cat], model="nothing")


def test_the_tolerance_is_a_tenth_of_255_in_float32_and_some_steps_of_a_format_of_16_bits():
    assert 255 * lb.tolerance(torch.float32) == pytest.approx(0.102)
    for dtype in (torch.float16, torch.bfloat16):
        assert 2 * torch.finfo(dtype).eps < lb.tolerance(dtype) < 10 * torch.finfo(dtype).eps


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_sums_in_another_order_are_within_the_tolerance(dtype):
    x, W = (
        torch.randn(size, generator=torch.Generator().manual_seed(0)).to(dtype)
        for size in ((8, 512), (512, 64))
    )
    whole, parts = x @ W, sum(x[:, i : i + 64] @ W[i : i + 64] for i in range(0, 512, 64))
    assert (whole - parts).abs().max() < lb.tolerance(dtype) * whole.abs().max()
