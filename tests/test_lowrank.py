import math

import pytest
import torch

from lorabook.lowrank import (
    effective_rank,
    energy_kept,
    inner_product,
    parameter_count,
    principal_angles,
    rank_for_energy,
    singular_values,
    svd,
    truncated,
)


def rand(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


def product(out: int, rank: int, inside: int) -> tuple[torch.Tensor, torch.Tensor]:
    return rand(out, rank), rand(rank, inside)


@pytest.mark.parametrize("factors", [(rand(30, 50),), (rand(50, 30),), (rand(20, 20),)])
@pytest.mark.parametrize("rank", [3, 8, 15, 24])
def test_the_decomposition_is_torchs(factors, rank):
    out, inside = factors[0].shape
    for halves in (factors, product(out, rank, inside)):
        matrix = halves[0].double() @ halves[1].double() if halves[1:] else halves[0].double()
        U, S, Vh = svd(*halves)
        k = min(out, inside, rank if halves[1:] else out)
        assert (U.shape, S.shape, Vh.shape) == ((out, k), (k,), (k, inside))
        assert torch.allclose(S, torch.linalg.svdvals(matrix)[:k], atol=1e-6)
        assert torch.allclose((U * S) @ Vh, matrix, atol=1e-9)
        assert torch.allclose(U.T @ U, torch.eye(k).double(), atol=1e-9)


@pytest.mark.parametrize("rank", [3, 15, 20])
def test_singular_values_are_those_of_the_product(rank):
    up, down = product(24, rank, 20)
    expected = torch.linalg.svdvals(up @ down)[:rank]
    torch.testing.assert_close(singular_values(up, down), expected, atol=1e-4, rtol=1e-4)


def test_truncation_is_the_best_of_its_rank():
    halves = product(12, 4, 9)
    U, S, Vh = svd(*halves)
    up, down = truncated(U, S, Vh, 2)
    off = (halves[0].double() @ halves[1].double() - up @ down).norm()
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


def test_the_inner_product_of_factors_is_that_of_the_matrices():
    a, b = product(6, 2, 7), (rand(6, 3), rand(3, 7))
    expected = float(((a[0] @ a[1]) * (b[0] @ b[1])).sum())
    assert inner_product(a, b) == pytest.approx(expected, rel=1e-5)
