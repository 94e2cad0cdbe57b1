"""What several features of the same token say together, those that repeat each other counting less."""

from __future__ import annotations

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional

EPSILON = 1e-8
"""Least sum of weights that is divided by."""


def redundancy(x: Float[Tensor, "*b l s"]) -> Float[Tensor, "*b l"]:
    """How much each of l features is repeated by all: the sum of its positive cosines with them, its own 1 included."""
    x = functional.normalize(x, dim=-1)
    return functional.relu(x @ x.mT).sum(-1)


def gather(
    x: Float[Tensor, "*b l s"], guide: Float[Tensor, "*b s"], score: Callable[[Tensor], Tensor], spreads: bool = True
) -> Float[Tensor, "*b s"]:
    """guide + the mean of l features, weighed by relu(score(x guide)) over their redundancy.

    score: from (…, s) to (…, 1). spreads: False leaves the redundancy out. Without a positive weight, it is the guide.
    Source: Diao et al., SHERL, 2024, arXiv 2407.07523, as the official code has it.
    """
    weights = functional.relu(score(x * guide[..., None, :])[..., 0])  # (…, l)
    if spreads:
        weights = weights / redundancy(x)
    weights = weights / (weights.sum(-1, keepdim=True) + EPSILON)
    return guide + torch.einsum("...l,...ls->...s", weights, x)
