import math

import pytest
import torch

from lorabook.lowrank import (
    effective_rank,
    energy_kept,
    parameter_count,
    principal_angles,
    rank_for_energy,
    svd_of_product,
    truncated,
)


@pytest.fixture
def halves():
    generator = torch.Generator().manual_seed(0)
    return torch.randn(12, 4, generator=generator), torch.randn(4, 9, generator=generator)


def test_the_svd_of_a_product_is_that_of_the_matrix(halves):
    up, down = halves
    U, S, Vh = svd_of_product(up, down)
    torch.testing.assert_close((U * S) @ Vh, up @ down)
    torch.testing.assert_close(S, torch.linalg.svdvals(up @ down)[:4])


def test_truncation_is_the_best_of_its_rank(halves):
    U, S, Vh = svd_of_product(*halves)
    up, down = truncated(U, S, Vh, 2)
    off = (halves[0] @ halves[1] - up @ down).norm()
    torch.testing.assert_close(off, S[2:].norm())


def test_energy_and_the_rank_that_keeps_it_are_each_others_inverse():
    values = torch.tensor([3.0, 2.0, 1.0])
    assert energy_kept(values, 1) == pytest.approx(9 / 14) and energy_kept(values, 3) == 1
    assert [rank_for_energy(values, share) for share in (0.6, 9 / 14, 0.65, 13 / 14, 0.93, 1)] == [
        1,
        1,
        2,
        2,
        3,
        3,
    ]
    assert energy_kept(torch.zeros(3), 1) == 1 and rank_for_energy(torch.zeros(3), 0.9) == 1


def test_effective_rank_counts_equal_directions():
    assert effective_rank(torch.ones(5)) == pytest.approx(5)
    assert effective_rank(torch.tensor([1.0, 0.0])) == 1 and effective_rank(torch.zeros(2)) == 0


def test_angles_are_zero_in_a_shared_direction_and_right_elsewhere():
    eye = torch.eye(4)
    torch.testing.assert_close(
        principal_angles(eye[:, :2], eye[:, 1:3]), torch.tensor([0.0, math.pi / 2])
    )


def test_a_matrix_of_a_thousand_by_two_thousand_at_rank_two_is_six_thousand_numbers():
    assert parameter_count((1000, 2000), 2) == 6000
    assert parameter_count((8, 4, 3, 3), 2) == 2 * (8 + 36)
