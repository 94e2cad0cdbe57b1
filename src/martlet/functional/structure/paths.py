"""Weights of the paths of a residual network, whose outputs are added up."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor


def path_scale(gram: Float[Tensor, "p p"], missing: Float[Tensor, " p"], ridge: float) -> Float[Tensor, " p"]:
    """Weights λ (P,) of paths p, so that Σ λ p comes nearest to what is wanted, w.

    gram: the products p q of all paths, summed over tokens. missing: those of p with w - Σ p. ridge: how strongly
    weights are held to 1, relative to the mean of the diagonal. Nothing missing leaves all at 1.
    """
    pull = ridge * gram.diagonal().mean().clamp(min=torch.finfo(gram.dtype).tiny)
    return 1 + torch.linalg.solve(gram + pull * torch.eye(len(gram), dtype=gram.dtype), missing)
