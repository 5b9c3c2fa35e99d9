"""Low rank as linear algebra on plain matrices: spectra, truncation, energy, angles."""

import torch
from torch import Tensor


def svd_of_product(up: Tensor, down: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The thin SVD of `up @ down`, without forming the product.

    Args:
        up: (out, rank), floating point.
        down: (rank, in).
    Returns: (U, S, Vh) of shapes (out, k), (k,), (k, in) with k = min(out, rank, in), singular values falling.
    """
    left, upper = torch.linalg.qr(up)
    right, lower = torch.linalg.qr(down.T)
    U, S, Vh = torch.linalg.svd(upper @ lower.T, full_matrices=False)
    return left @ U, S, Vh @ right.T


def truncated(U: Tensor, S: Tensor, Vh: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """The best factors of a rank: (up, down) of shapes (out, rank) and (rank, in), each with the root of S.

    Source: Eckart and Young 1936, doi:10.1007/BF02288367.
    """
    root = S[:rank].sqrt()
    return U[:, :rank] * root, root[:, None] * Vh[:rank]


def energy_kept(singular_values: Tensor, rank: int) -> float:
    """Share of a matrix's energy that survives truncation to `rank`.

    Args:
        singular_values: (k,), falling.
        rank: 0 to k.
    Returns: the top `rank` squared singular values over all of them; 0 to 1, no unit; 1 for a matrix of zeros.
    """
    energy = singular_values.double().square()
    total = energy.sum()
    return float(energy[:rank].sum() / total) if total > 0 else 1.0


def rank_for_energy(singular_values: Tensor, share: float) -> int:
    """The smallest rank, at least 1, that keeps a share of the energy.

    Args:
        singular_values: (k,), falling.
        share: above 0, up to 1.
    """
    energy = singular_values.double().square().cumsum(0)
    if energy[-1] == 0:
        return 1
    # the sum of all squares is only known to rounding: whatever is within it counts as all
    return min(int((energy < share * energy[-1] * (1 - 1e-12)).sum()) + 1, len(singular_values))


def effective_rank(singular_values: Tensor) -> float:
    """How many directions a matrix really uses: e to the entropy of its normalised singular values.

    Args:
        singular_values: (k,).
    Returns: 1 to k; 0 for a matrix of zeros.
    Source: Roy and Vetterli 2007, "The effective rank: a measure of effective dimensionality".
    """
    values = singular_values.double()
    share = values / values.sum().clamp_min(1e-300)
    share = share[share > 0]
    return float(torch.exp(-(share * share.log()).sum())) if len(share) else 0.0


def principal_angles(a: Tensor, b: Tensor) -> Tensor:
    """The angles between the subspaces that two matrices' columns span.

    Args:
        a, b: (n, p) and (n, q), of full column rank.
    Returns: (min(p, q),) radians, rising; 0 where the spaces share a direction, pi / 2 where they are at right angles.
    Source: Björck and Golub 1973, doi:10.2307/2005662.
    """
    cosines = torch.linalg.svdvals(torch.linalg.qr(a)[0].T @ torch.linalg.qr(b)[0])
    return torch.arccos(cosines.clamp(-1, 1))


def parameter_count(shape: tuple[int, ...], rank: int) -> int:
    """Numbers in a LoRA of some rank on a weight of this shape, (out, in) or (out, in, height, width)."""
    out, *rest = shape
    return rank * (out + torch.Size(rest).numel())
