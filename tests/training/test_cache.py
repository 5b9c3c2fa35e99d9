import pytest
import torch

import lorabook as lb
from lorabook.training.cache import Examples
from lorabook.training.families import family_of


def make(pipe, folder, **changes):
    told = dict(resolution=64, center_crop=True, random_flip=False, interpolation="lanczos", progress=False)
    return Examples(family_of(pipe), lb.load_captioned_images(folder), **told | changes)


def seeded():
    return torch.Generator().manual_seed(0)


def test_cached_latents_are_those_of_encoding_anew(pipe, creature_folder):
    cached, fresh = (make(pipe, creature_folder, random_flip=True) for _ in range(2))
    fresh.moments = None
    chosen = torch.tensor([4, 0, 4, 2])
    assert torch.allclose(cached.latents(chosen, seeded()), fresh.latents(chosen, seeded()), atol=1e-5)


def test_latents_are_sampled_anew_each_time(pipe, creature_folder):
    examples, generator, chosen = make(pipe, creature_folder), seeded(), torch.tensor([1])
    first, second = examples.latents(chosen, generator), examples.latents(chosen, generator)
    deviation = examples.moments[1][0, 1]
    assert 0 < ((first - second)[0] / deviation).abs().max() < 10


def test_half_of_the_images_are_mirrored(pipe, creature_folder):
    examples = make(pipe, creature_folder, random_flip=True)
    assert torch.equal(examples.pixels(0, True), examples.pixels(0, False).flip(-1))
    chosen = torch.zeros(400, dtype=torch.long)
    latents = examples.latents(chosen, seeded())
    straight, mirror = (((latents - mean[0]) ** 2).mean((1, 2, 3)) for mean in examples.moments[0])
    mirrored = mirror < straight
    assert 150 < mirrored.sum() < 250


def test_prompts_are_encoded_once_for_each_caption(pipe, creature_folder):
    examples = make(pipe, creature_folder)
    embedding = examples.prompts(torch.tensor([3]), 0, seeded())
    expected = family_of(pipe).encode_prompts([examples.images[3]["text"]])
    assert torch.allclose(embedding, expected, atol=1e-5)


def test_dropped_captions_are_the_empty_prompt(pipe, creature_folder):
    examples = make(pipe, creature_folder)
    dropped = examples.prompts(torch.zeros(1000, dtype=torch.long), 0.3, seeded())
    empty = family_of(pipe).encode_prompts([""])[0]
    assert (dropped - empty).abs().amax((1, 2)).lt(1e-4).sum().item() == pytest.approx(300, abs=50)


def test_the_shorter_side_becomes_the_resolution(pipe, tmp_path, picture):
    picture("red", (200, 100)).save(tmp_path / "a.png")
    (tmp_path / "a.txt").write_text("red")
    examples = make(pipe, tmp_path)
    assert examples.pixels(0, False).shape == (3, 64, 64)
    assert examples.pixels(0, False)[0].min() > 0.9
