"""Layer-wise relevance propagation: how an output's relevance is divided among what the output was made of.

No rule loses or adds relevance: what all inputs get is what the output had, and none gets a share of another sign.

Source: Chefer et al., Transformer Interpretability Beyond Attention Visualization, 2021, arXiv 2012.09838, section 3.1:
the positive contributions of a layer (equation 7), and relevance shared by two operands (equations 8 to 10). Differs:
there a sum or a product of two tensors divides by its own signed value, which comes near 0, and rescales afterwards;
here both divide by sums of one sign, so that a relevance can't be larger than what came.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.func import vjp

Multiply = Callable[[Tensor, Tensor], Tensor]
"""What is linear in both arguments: a Linear or convolution without its bias, a product of two activations."""


def through_product(multiply: Multiply, x: Tensor, y: Tensor, relevance: Tensor) -> Tensor:
    """The relevance (as x) of the left factor, all of the product's: by the positive parts of x_j y_ij in the output i.

    R_j = Σ_i (x_j y_ij)⁺ / Σ_k (x_k y_ik)⁺ R_i. Where no part of an output is positive, by the negative ones; where all
    are 0, the output's relevance ends there. The other factor's is that of the transposed product.
    """
    x_up, x_down, y_up, y_down = x.clamp(min=0), x.clamp(max=0), y.clamp(min=0), y.clamp(max=0)
    found = torch.zeros_like(x)
    open_ = torch.ones_like(relevance, dtype=torch.bool)
    for first, second in ((y_up, y_down), (y_down, y_up)):  # parts of one sign: positive ones, then negative ones
        total, pull, *_ = vjp(lambda a, b, f=first, s=second: multiply(a, f) + multiply(b, s), x_up, x_down)
        takes = open_ & (total.abs() > torch.finfo(total.dtype).tiny)
        by_up, by_down = pull(torch.where(takes, relevance / torch.where(takes, total, 1), 0))
        found = found + x_up * by_up + x_down * by_down
        open_ = open_ & ~takes
    return found


def through_sum(a: Tensor, b: Tensor, relevance: Tensor) -> tuple[Tensor, Tensor]:
    """The relevances of two terms, of shapes that broadcast to the sum's: |a| to |b|, value by value; halves at 0."""
    size_a, size_b = (term.abs().expand(relevance.shape) for term in (a, b))
    total = size_a + size_b
    share = torch.where(total > 0, size_a / torch.where(total > 0, total, 1), 0.5)
    return (relevance * share).sum_to_size(a.shape), (relevance * (1 - share)).sum_to_size(b.shape)


def through_mean(pool: Callable[[Tensor], Tensor], x: Tensor, relevance: Tensor) -> Tensor:
    """The relevance (as x) of what a weighted sum with no negative weight takes, by |x| times the weight.

    pool: a mean, an average pooling, an interpolation.
    """
    size = x.abs().clamp(min=torch.finfo(x.dtype).eps)  # where all is 0, by the weights alone
    total, pull, *_ = vjp(pool, size)
    return size * pull(relevance / total)[0]
