import pytest
import torch

import lorabook as lb
from lorabook.training.dataset import EncodedImages, ImageTransform
from lorabook.training.families import family_of
from lorabook.training.sampler import BatchSampler


def make(pipe, folder, store=None, **changes):
    settings = dict(resolution=64, center_crop=True)
    return EncodedImages(
        family_of(pipe),
        lb.load_captioned_images(folder),
        ImageTransform(**settings | changes),
        folder=store,
    )


def batches(examples, **kwargs):
    order = BatchSampler(seed=0, groups=(len(examples),), batch=4)
    return list(examples.batches(order, 0, 5, **kwargs))


def test_kept_moments_are_those_of_encoding_anew(pipe, creature_folder, tmp_path):
    kept, fresh = (
        make(pipe, creature_folder, store, random_flip=True) for store in (tmp_path, None)
    )
    assert kept.moments is not None and fresh.moments is None
    for ours, theirs in zip(batches(kept), batches(fresh), strict=True):
        assert torch.equal(ours.rows, theirs.rows) and torch.allclose(
            ours.moments, theirs.moments, atol=1e-5
        )


def test_workers_read_the_same_images(pipe, creature_folder):
    examples = make(pipe, creature_folder, random_flip=True, center_crop=False)
    for ours, theirs in zip(batches(examples), batches(examples, workers=2), strict=True):
        assert torch.equal(ours.moments, theirs.moments)


def test_half_of_the_images_are_mirrored(pipe, creature_folder, tmp_path):
    examples = make(pipe, creature_folder, tmp_path, random_flip=True)
    assert torch.equal(
        examples.transformed.pixels(0, True), examples.transformed.pixels(0).flip(-1)
    )
    order = BatchSampler(seed=0, groups=(6,), batch=100)
    (batch,) = examples.batches(order, 0, 1)
    straight, _ = examples.plain(batch.rows)
    assert 30 < sum(torch.equal(a, b) for a, b in zip(batch.moments, straight, strict=True)) < 70


def test_prompts_are_encoded_once_for_each_caption(pipe, creature_folder, tmp_path):
    for store in (tmp_path, None):
        examples = make(pipe, creature_folder, store)
        (embedding,) = examples.prompts(examples.caption_of[[3]])
        (expected,) = family_of(pipe).encode_prompts([examples.transformed.images[3]["text"]])
        assert torch.allclose(embedding, expected, atol=1e-5)


def test_dropped_captions_are_the_empty_prompt(pipe, creature_folder, tmp_path):
    examples = make(pipe, creature_folder, tmp_path)
    order = BatchSampler(seed=0, groups=(6,), batch=1000)
    (batch,) = examples.batches(order, 0, 1, dropout=0.3)
    assert examples.texts[0] == "" and (batch.captions == 0).sum().item() == pytest.approx(
        300, abs=50
    )


def test_the_shorter_side_becomes_the_resolution(pipe, tmp_path, picture):
    picture("red", (200, 100)).save(tmp_path / "a.png")
    (tmp_path / "a.txt").write_text("red")
    examples = make(pipe, tmp_path)
    assert (
        examples.transformed.pixels(0).shape == (3, 64, 64)
        and examples.transformed.pixels(0)[0].min() > 0.9
    )
    assert examples.transform.geometry((200, 100)) == (100, 200, 0, 32)


def test_random_crops_reach_both_edges_and_are_not_kept(pipe, tmp_path, picture):
    picture("red", (200, 100)).save(tmp_path / "a.png")
    (tmp_path / "a.txt").write_text("red")
    examples = make(pipe, tmp_path, tmp_path / "store", center_crop=False)
    lefts = [
        examples.transform.geometry((200, 100), crop=(0.0, share))[3]
        for share in (0.0, 0.5, 0.9999)
    ]
    assert examples.moments is None and lefts == [0, 32, 64]


def test_a_folder_that_takes_nothing_costs_time_and_not_the_run(pipe, creature_folder, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.warns(UserWarning, match="cannot keep what was encoded"):
        examples = make(pipe, creature_folder, tmp_path / "file")
    assert len(batches(examples)) == 5
