"""Zeros in weights, so many of each so many neighbors: which, and what the other weights have to take over."""

from __future__ import annotations

import torch
from torch import Tensor

DAMPING = 0.01
"""Of the mean of the diagonal of x xᵀ, added to it."""


def smallest(scores: Tensor, zeros: int, of: int) -> Tensor:
    """True where a score is among the `zeros` smallest of each `of` neighbors in a row. scores: (O, I)."""
    groups = scores.unflatten(1, (-1, of))  # (O, I / of, of)
    return (
        torch.zeros_like(groups, dtype=torch.bool)
        .scatter(-1, groups.topk(zeros, largest=False).indices, True)
        .flatten(1)
    )


def wanda(weight: Tensor, xx: Tensor, zeros: int, of: int) -> Tensor:
    """W (O, I) with zeros where |w| times the norm of its input is smallest. xx: (I, I), the sum of x xᵀ.

    Source: Sun et al., A Simple and Effective Pruning Approach for Large Language Models, 2023, arXiv 2306.11695,
    equation 1.
    """
    return weight.masked_fill(smallest(weight.abs() * xx.diagonal().sqrt(), zeros, of), 0)


def sparsegpt(weight: Tensor, xx: Tensor, zeros: int, of: int) -> Tensor:
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
            gone[:, group] = smallest(work[:, group].square() / factor.diagonal()[group].square(), zeros, of)
        error = torch.where(gone[:, j], work[:, j], 0) / factor[j, j]  # (O,)
        work[:, j:] -= error[:, None] * factor[j, j:]
        work[:, j] = work[:, j].masked_fill(gone[:, j], 0)
    return work
