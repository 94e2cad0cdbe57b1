"""Several fine-tunes of one model as one: what becomes of a parameter, or of what training changed of it.

A task vector is a fine-tuned parameter less the one that it was tuned from.
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor


class Mean:
    """A weighted mean of tensors of one shape, in float64, of which none is kept.

    Equal weights, whatever they are, give what no weights give, bit for bit.
    """

    def __init__(self, like: Tensor) -> None:
        self.value, self.total = (
            torch.zeros_like(like, dtype=torch.float64),
            torch.zeros_like(like, dtype=torch.float64),
        )

    def add_(self, x: Tensor, weight: Tensor | float = 1.0) -> None:
        """weight: more than 0; of x's shape, or one for all."""
        self.total += weight
        self.value += (x - self.value) * (weight / self.total)


def trim(x: Float[Tensor, " n"], trim_ratio: float) -> Float[Tensor, " n"]:
    """x without this share of its numbers, those of least magnitude. Source: TIES, arXiv 2306.01708, first step."""
    drop = int(len(x) * trim_ratio)
    if not drop:
        return x
    return torch.where(x.abs() > x.abs().kthvalue(drop).values, x, 0.0)


def elect(x: Float[Tensor, "m n"]) -> Float[Tensor, " n"]:
    """The sign of the sum over m models; where that is 0, that which most of the n numbers have (TIES, second step)."""
    signs = x.sum(0).sign()
    return torch.where(signs == 0, signs.sum().sign(), signs)


def disjoint_mean(x: Float[Tensor, "m n"], signs: Float[Tensor, " n"]) -> Float[Tensor, " n"]:
    """The mean over the models whose number has the elected sign; 0 where none has (TIES, third step)."""
    agrees: Bool[Tensor, "m n"] = x.sign() == signs
    agrees &= x != 0
    return (x * agrees).sum(0) / agrees.sum(0).clamp(min=1)


def drop(x: Tensor, drop_ratio: float, generator: torch.Generator) -> Tensor:
    """x with each number 0 at this probability, and the others 1 / (1 - p) times what they were.

    Source: Yu et al., DARE, 2024, arXiv 2311.03099.
    """
    stays = torch.rand(x.shape, generator=generator) >= drop_ratio
    return torch.where(stays, x / (1 - drop_ratio), 0.0)


def project_away(task: Float[Tensor, "o i"], merged: Float[Tensor, "o i"], share: float) -> Float[Tensor, "o i"]:
    """What of a task vector lies outside of what was merged before.

    In the singular bases of `merged`, without the diagonal and without the block of the largest singular values that
    make up this share of their sum: orthogonal to each u vᵀ of `merged`, so to `merged` itself.
    Source: Tang et al., OPCM, 2025, arXiv 2501.09522.
    """
    u, s, vt = torch.linalg.svd(merged.double(), full_matrices=True)
    rank = int((s.cumsum(0) <= share * s.sum()).sum())
    inside = u.T @ task.double() @ vt.T  # (o, i)
    inside.diagonal().zero_()
    inside[:rank, :rank] = 0
    return (u @ inside @ vt).to(task.dtype)
