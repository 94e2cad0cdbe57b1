"""Orthogonal matrices that spread what stands out in few channels over all of them, and leave products as they are.

Rows x are multiplied from the right, x Q. A LayerNorm without scale and shift commutes with every rotation that keeps
the vector of ones: neither the mean of a row nor its variance changes. So all rotations here come from two parts, a
basis whose last vector is the ones, and `spread`, which gives every coordinate in that basis to all channels alike.
"""

from __future__ import annotations

import math

import torch
from jaxtyping import Float, Float64
from torch import Tensor


def hadamard(n: int) -> Float64[Tensor, "n n"] | None:
    """A matrix of 1 and -1 whose rows are orthogonal; None where none of the constructions here gives one of order n.

    Source: Sylvester's doubling, and Paley's two constructions for primes q: of order q + 1 if q is 3 more than a
    multiple of 4, of order 2 (q + 1) if 1 more (Paley, On Orthogonal Matrices, 1933).
    """
    if n == 1:
        return torch.ones(1, 1, dtype=torch.float64)
    if n == 2:
        return torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64)
    if n % 4:
        return None
    if _is_prime(n - 1):  # n - 1 is 3 more than a multiple of 4
        return _bordered(n - 1, -1.0) + torch.eye(n, dtype=torch.float64)
    if (half := hadamard(n // 2)) is not None:
        return torch.kron(torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64), half)
    q = n // 2 - 1
    if q % 4 == 1 and _is_prime(q):
        ones = torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64)
        diagonal = torch.tensor([[1.0, -1.0], [-1.0, -1.0]], dtype=torch.float64)
        return torch.kron(_bordered(q, 1.0), ones) + torch.kron(torch.eye(q + 1, dtype=torch.float64), diagonal)
    return None


def spread(n: int, generator: torch.Generator) -> Float64[Tensor, "n n"]:
    """An orthogonal matrix whose last row is 1 / √n everywhere: the last coordinate goes to all channels alike.

    With a Hadamard matrix of order n so do all others, up to signs. Else it is the Kronecker product of one of the
    greatest order that divides n and a random orthogonal matrix, whose rows are spread as chance has it. Signs of the
    other rows are random.
    """
    order = next(order for order in range(n, 0, -1) if n % order == 0 and hadamard(order) is not None)
    known = hadamard(order)
    assert known is not None
    known = known * known[-1] / math.sqrt(order)
    rest = n // order
    drawn = torch.randn(rest, rest, generator=generator, dtype=torch.float64)
    drawn[:, 0] = 1.0
    columns, _ = torch.linalg.qr(drawn)
    columns[:, 0] = 1 / math.sqrt(rest)  # QR may have turned it around
    signs = 2.0 * torch.randint(2, (n,), generator=generator) - 1
    signs[-1] = 1.0
    return signs[:, None] * torch.kron(known, columns.T.flip(0))


def standard_basis(n: int) -> Float64[Tensor, "n n"]:
    """Orthonormal columns, the last of which is 1 / √n; the others are the axes, each moved by 1 / √n at the most."""
    axis, ones = torch.eye(n, dtype=torch.float64)[-1], torch.full((n,), 1 / math.sqrt(n), dtype=torch.float64)
    normal = axis - ones
    if n == 1:
        return torch.ones(1, 1, dtype=torch.float64)
    return torch.eye(n, dtype=torch.float64) - 2 * torch.outer(normal, normal) / normal.square().sum()


def klt_basis(covariance: Float[Tensor, "n n"], keep_ones: bool = False) -> Float64[Tensor, "n n"]:
    """The Karhunen-Loève basis: columns in which rows of this covariance are uncorrelated, by falling variance.

    keep_ones: the last column is 1 / √n, and the others are the basis of what is orthogonal to it.
    """
    covariance = covariance.double()
    if not keep_ones:
        return torch.linalg.eigh(covariance).eigenvectors.flip(1)
    others, ones = standard_basis(len(covariance)).split([len(covariance) - 1, 1], 1)
    inside = torch.linalg.eigh(others.T @ covariance @ others).eigenvectors.flip(1)
    return torch.cat([others @ inside, ones], 1)


def rotation(basis: Float[Tensor, "n n"], generator: torch.Generator) -> Float64[Tensor, "n n"]:
    """Coordinates in a basis, each spread over all channels. Keeps the ones if they are the basis' last column.

    Of the Karhunen-Loève basis, this is the KLT-enhanced rotation: with a Hadamard matrix of the order every channel
    has the same variance then, the mean of the eigenvalues.
    Source: Xu et al., MambaQuant, 2025, arXiv 2501.13484, KLT-enhanced rotation H_K = K H; of the axes, the random
    Hadamard matrix of Ashkboos et al., QuaRot, 2024, arXiv 2404.00456.
    """
    return basis.double() @ spread(len(basis), generator)


def orthogonality_error(matrix: Float[Tensor, "n n"]) -> float:
    """The largest entry of |QᵀQ - I|."""
    return float((matrix.mT @ matrix - torch.eye(matrix.shape[-1], dtype=matrix.dtype)).abs().max())


def variance_spread(variances: Float[Tensor, " n"]) -> float:
    """The greatest channel's variance over the mean: 1 where all are equal, n where one has all; 1 of zeros."""
    mean = float(variances.mean())
    return float(variances.max()) / mean if mean > 0 else 1.0


def _bordered(q: int, corner: float) -> Float64[Tensor, "m m"]:
    """Paley's conference matrix of order q + 1: zeros on the diagonal, a border of ones (corner down the left side)."""
    squares = {i * i % q for i in range(1, q)}
    character = torch.tensor([0.0] + [1.0 if i in squares else -1.0 for i in range(1, q)], dtype=torch.float64)
    indices = torch.arange(q)
    bordered = torch.zeros(q + 1, q + 1, dtype=torch.float64)
    bordered[0, 1:] = 1.0
    bordered[1:, 0] = corner
    bordered[1:, 1:] = character[(indices[:, None] - indices) % q]
    return bordered


def _is_prime(n: int) -> bool:
    return n > 1 and all(n % d for d in range(2, math.isqrt(n) + 1))
