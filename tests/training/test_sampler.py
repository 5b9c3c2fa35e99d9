import torch

from lorabook.training.sampler import BatchSampler, seed_of


def test_every_example_comes_once_an_epoch_in_another_sampler_each_time():
    sampler = BatchSampler(seed=0, groups=(12,), batch=4)
    first, second = (
        torch.cat([sampler.rows(number) for number in range(start, start + 3)]) for start in (0, 3)
    )
    assert sampler.batches == 3 and first.tolist() != second.tolist()
    assert sorted(first.tolist()) == sorted(second.tolist()) == list(range(12))


def test_processes_share_what_one_process_does_alone():
    alone = BatchSampler(seed=3, groups=(7, 5), batch=4)
    parts = [
        BatchSampler(seed=3, groups=(7, 5), batch=2, process=process, processes=2)
        for process in range(2)
    ]
    for number in range(6):
        whole = alone.rows(number).view(2, 4)
        assert torch.equal(whole, torch.cat([part.rows(number).view(2, 2) for part in parts], 1))
        whole = alone.rng(number, 2).normal(3).view(2, 4, 3)
        assert torch.equal(
            whole, torch.cat([part.rng(number, 2).normal(3).view(2, 2, 3) for part in parts], 1)
        )


def test_groups_stand_behind_each_other_and_the_smaller_one_comes_round_again():
    sampler = BatchSampler(seed=0, groups=(2, 6), batch=3)
    rows = torch.cat([sampler.rows(number).view(2, 3) for number in range(2)], 1)
    assert sampler.epoch == 6 and sorted(rows[1].tolist()) == list(range(2, 8))
    assert sorted(rows[0].tolist()) == [0, 0, 0, 1, 1, 1]


def test_repeats_lengthen_the_epoch():
    assert BatchSampler(seed=0, groups=(5,), batch=5, repeats=4).batches == 4


def test_draws_depend_on_seed_number_and_purpose_alone():
    sampler = BatchSampler(seed=0, groups=(6,), batch=2)
    same = [sampler.rng(5, 2).normal(4) for _ in range(2)]
    others = [
        sampler.rng(6, 2),
        sampler.rng(5, 1),
        BatchSampler(seed=1, groups=(6,), batch=2).rng(5, 2),
    ]
    assert torch.equal(*same) and not any(torch.equal(same[0], other.normal(4)) for other in others)


def test_batches_can_begin_anywhere():
    sampler = BatchSampler(seed=0, groups=(6,), batch=2)
    whole, late = list(sampler.indices(0, 5, True)), list(sampler.indices(3, 5, True))
    assert [batch.number for batch in late] == [3, 4]
    assert torch.equal(whole[4].rows, late[1].rows) and torch.equal(whole[4].flips, late[1].flips)


def test_seeds_of_different_parts_differ():
    assert len({seed_of(a, b) for a in range(20) for b in range(20)}) == 400
