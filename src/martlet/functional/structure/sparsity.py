"""Zeros in weights, so many of each so many neighbors: which, and what the other weights have to take over."""

from __future__ import annotations

import math

import torch
from torch import Tensor

DAMPING = 0.01
"""Of the mean of the diagonal of x xᵀ, added to it."""


def smallest(scores: Tensor, zeros: int, of: int, run: int = 1) -> Tensor:
    """True where a score is among the `zeros` smallest of each `of` neighbors in a row. scores: (O, I).

    run: so many neighbors go together, by the sum of their scores.
    """
    groups = scores.unflatten(1, (-1, of // run, run)).sum(-1)  # (O, I / of, of / run)
    gone = torch.zeros_like(groups, dtype=torch.bool)
    gone = gone.scatter(-1, groups.topk(zeros // run, largest=False).indices, True)
    return gone[..., None].expand(*gone.shape, run).flatten(1)


def least(weight: Tensor, share: float) -> Tensor:
    """True for this share of a weight's numbers, rounded down, those of the least size."""
    n = weight.numel()
    return smallest(weight.abs().reshape(1, n), int(share * n), n).view_as(weight)


def gradual(sparsity: float, done: float) -> float:
    """The share that is zero when so much of the schedule is done, from 0 to 1: all of `sparsity` from 1 on.

    Source: Zhu and Gupta, To prune, or not to prune, 2017, arXiv 1710.01878, equation 1, from none at the start.
    """
    return sparsity * (1 - (1 - min(done, 1.0)) ** 3)


def pattern_of(is_zero: Tensor, sizes: Tensor, zeros: int, of: int, run: int = 1) -> Tensor | None:
    """True where zeros (O, I) make the pattern of `smallest`; None if there are too few.

    Where there are more, as after rounding, those of the smallest sizes (O, I) are of the pattern.
    """
    if is_zero.shape[1] % of:
        return None
    order = 1e-3 / (1 + sizes.abs())  # less than any zero weighs
    gone = smallest(torch.where(is_zero, -1 - order, 0), zeros, of, run)
    return gone if bool(is_zero[gone].all()) else None


def stored_bits(bits: int, zeros: int, of: int, run: int = 1) -> float:
    """Of a weight on average, where what isn't zero is kept in so many bits, and each run of it says where it stands.

    Two of four in 8 bits: 5, which is 6.4 times less than 32; four of eight in pairs, in 4 bits: 2.5, 12.8 times less.
    Source: Yu et al., Boost Vision Transformer with GPU-Friendly Sparsity and Quantization, 2023, arXiv 2305.10727, its
    abstract's 6.4 and 12.7.
    """
    kept = of - zeros
    return (kept * bits + kept // run * math.ceil(math.log2(of // run))) / of


def wanda(weight: Tensor, xx: Tensor, zeros: int, of: int, run: int = 1) -> Tensor:
    """W (O, I) with zeros where |w| times the norm of its input is smallest. xx: (I, I), the sum of x xᵀ.

    Source: Sun et al., A Simple and Effective Pruning Approach for Large Language Models, 2023, arXiv 2306.11695,
    equation 1.
    """
    return weight.masked_fill(smallest(weight.abs() * xx.diagonal().sqrt(), zeros, of, run), 0)


def sparsegpt(weight: Tensor, xx: Tensor, zeros: int, of: int, run: int = 1) -> Tensor:
    """W (O, I) with zeros where they cost W x least, for which the weights to the right make up. xx: (I, I).

    With U the upper Cholesky factor of (x xᵀ)⁻¹, from left to right: those of a group of neighbors go whose
    w² / U_jj² is smallest, and what goes of column j moves the columns after it by its error over U_jj times U_j.
    Source: Frantar and Alistarh, SparseGPT, 2023, arXiv 2301.00774, algorithm 1, with the groups of its section 3.3.
    """
    work, xx = weight.double().clone(), xx.double().clone()
    dead = xx.diagonal() == 0  # inputs that never come
    xx[dead, dead] = 1
    work[:, dead] = 0
    xx += DAMPING * xx.diagonal().mean() * torch.eye(len(xx), dtype=xx.dtype)
    factor = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(xx)), upper=True)
    gone = torch.zeros_like(work, dtype=torch.bool)
    for j in range(len(xx)):
        if j % of == 0:
            group = slice(j, j + of)
            gone[:, group] = smallest(work[:, group].square() / factor.diagonal()[group].square(), zeros, of, run)
        error = torch.where(gone[:, j], work[:, j], 0) / factor[j, j]  # (O,)
        work[:, j:] -= error[:, None] * factor[j, j:]
        work[:, j] = work[:, j].masked_fill(gone[:, j], 0)
    return work
