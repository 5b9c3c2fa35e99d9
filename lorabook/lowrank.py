"""Low rank as linear algebra on plain matrices: spectra, truncation, energy, angles."""

import torch
from torch import Tensor

Svd = tuple[Tensor, Tensor, Tensor]


def svd(up: Tensor, down: Tensor | None = None) -> Svd:
    """The thin SVD, in float64, of up (out, in), or of up (out, rank) times down (rank, in).

    A product of much smaller rank than the matrix is never formed. A matrix is decomposed by the
    eigenvectors of its smaller Gram matrix: for 1280 × 5120 on one core that takes a quarter of the
    time of `torch.linalg.svd`. Singular values fall; below 1e-7 of the largest they are rounding.
    """
    up = up.double()
    if down is not None and _is_thin(up, down):
        left, upper = torch.linalg.qr(up)
        right, lower = torch.linalg.qr(down.double().T)
        U, S, Vh = torch.linalg.svd(upper @ lower.T, full_matrices=False)
        return left @ U, S, Vh @ right.T
    matrix = up if down is None else up @ down.double()
    is_tall = matrix.shape[0] > matrix.shape[1]
    wide = matrix.T if is_tall else matrix
    energies, vectors = torch.linalg.eigh(wide @ wide.T)
    rank = up.shape[1]
    U, S = vectors.flip(1)[:, :rank], energies.flip(0)[:rank].clamp_min(0).sqrt()
    floor = (S[0] * 1e-8).clamp_min(torch.finfo(torch.float64).tiny)
    Vh = (U.T @ wide) / S.clamp_min(floor)[:, None]
    return (Vh.T, S, U.T) if is_tall else (U, S, Vh)


def singular_values(up: Tensor, down: Tensor) -> Tensor:
    """What `svd(up, down)` gives as S, in less time."""
    if _is_thin(up, down):
        upper, lower = (torch.linalg.qr(half, mode="r").R for half in (up, down.T))
        return torch.linalg.svdvals(upper @ lower.T)
    matrix = (up @ down).double()
    wide = matrix.T if matrix.shape[0] > matrix.shape[1] else matrix
    energies = torch.linalg.eigvalsh(wide @ wide.T).flip(0)[: up.shape[1]]
    return energies.clamp_min(0).sqrt().to(up.dtype)


def truncated(U: Tensor, S: Tensor, Vh: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """The best factors of a rank: up (out, rank) and down (rank, in), each with the root of S.

    Source: Eckart and Young 1936, doi:10.1007/BF02288367.
    """
    root = S[:rank].sqrt()
    return U[:, :rank] * root, root[:, None] * Vh[:rank]


def energy_kept(singular_values: Tensor, rank: int) -> float:
    """Share of a matrix's energy that survives truncation to `rank`.

    Args:
        singular_values: (k,), falling.
        rank: 0 to k.

    Returns:
        The top `rank` squared singular values over all of them; 0 to 1, no unit; 1 for zeros.
    """
    energy = singular_values.double().square()
    total = energy.sum()
    return float(energy[:rank].sum() / total) if total > 0 else 1.0


def rank_for_energy(singular_values: Tensor, share: float) -> int:
    """The smallest rank, at least 1, that keeps a share of the energy, above 0 and up to 1."""
    energy = singular_values.double().square().cumsum(0)
    if energy[-1] == 0:
        return 1
    # the sum of all squares is only known to rounding: whatever is within it counts as all
    return min(int((energy < share * energy[-1] * (1 - 1e-12)).sum()) + 1, len(singular_values))


def effective_rank(singular_values: Tensor) -> float:
    """How many directions a matrix really uses: e to the entropy of its normalised singular values.

    From 1 to their number; 0 for a matrix of zeros.
    Source: Roy and Vetterli 2007, "The effective rank: a measure of effective dimensionality".
    """
    values = singular_values.double()
    share = values / values.sum().clamp_min(1e-300)
    share = share[share > 0]
    return float(torch.exp(-(share * share.log()).sum())) if len(share) else 0.0


def principal_angles(a: Tensor, b: Tensor) -> Tensor:
    """The angles between the spaces that the columns of two matrices span, in radians, rising.

    0 in a shared direction, pi / 2 at right angles; the columns of each are independent.
    Source: Björck and Golub 1973, doi:10.2307/2005662.
    """
    cosines = torch.linalg.svdvals(torch.linalg.qr(a)[0].T @ torch.linalg.qr(b)[0])
    return torch.arccos(cosines.clamp(-1, 1))


def inner_product(a: tuple[Tensor, Tensor], b: tuple[Tensor, Tensor]) -> float:
    """The Frobenius inner product of two matrices, in float64, from factors (up, down) of each."""
    (up_a, down_a), (up_b, down_b) = ([half.double() for half in pair] for pair in (a, b))
    return float(((up_a.T @ up_b) * (down_a @ down_b.T)).sum())


def parameter_count(shape: tuple[int, ...], rank: int) -> int:
    """Numbers in a LoRA of a rank on a weight of shape (out, in) or (out, in, height, width)."""
    out, *rest = shape
    return rank * (out + torch.Size(rest).numel())


def _is_thin(up: Tensor, down: Tensor) -> bool:
    """Whether the rank is so far below the matrix's size that the product is not worth forming."""
    return 2 * up.shape[1] < min(up.shape[0], down.shape[1])
