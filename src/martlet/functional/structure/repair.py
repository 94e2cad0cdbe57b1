"""Closed forms for what a cut leaves: which part to cut, and what the part that stays has to take over.

All of them know the data through Gram matrices alone, so their memory doesn't grow with the number of images. Float64.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Gram:
    """Sums over samples of x xᵀ, x yᵀ and y yᵀ, for the least squares y ≈ W x + b.

    xx: (I + 1, I + 1) and xy: (I + 1, O), the last row being of x = 1, which carries the bias. yy: sum of |y|².
    """

    def __init__(self, inputs: int, outputs: int) -> None:
        self.xx = torch.zeros(inputs + 1, inputs + 1, dtype=torch.float64)
        self.xy = torch.zeros(inputs + 1, outputs, dtype=torch.float64)
        self.yy = 0.0

    def add_(self, x: Tensor, y: Tensor, weights: Tensor | None = None) -> None:
        """x (S, I), y (S, O); weights (S,) of the samples, 1 without."""
        x = torch.cat([x, x.new_ones(x.shape[0], 1)], 1)
        left = x if weights is None else x * weights[:, None]
        self.xx += (left.mT @ x).double()
        self.xy += (left.mT @ y).double()
        self.yy += float((y.square().sum(1) * (1 if weights is None else weights)).sum())


class Fit(NamedTuple):
    """weight (O, I'), bias (O,) or None; error: the sum of squares that is left."""

    weight: Tensor
    bias: Tensor | None
    error: float


def fit(gram: Gram, kept: Tensor, prior: Tensor, ridge: float, bias: bool = True) -> Fit:
    """The least squares from the inputs of numbers (I',) alone, with a ridge towards what was there.

    prior: (O, I'), the weights before. ridge: relative to the mean of the diagonal of xx. bias: whether there is one.
    """
    count = len(kept)
    index = torch.cat([kept, torch.tensor([gram.xx.shape[0] - 1] if bias else [], dtype=kept.dtype)])
    xx, xy = gram.xx[index][:, index], gram.xy[index]
    pull = ridge * xx.diagonal()[:count].mean()
    lhs, rhs = xx.clone(), xy.clone()
    lhs.diagonal()[:count] += pull
    rhs[:count] += pull * prior.double().mT
    solved = _solve(lhs, rhs)
    error = gram.yy - 2 * float((solved * xy).sum()) + float((solved * (xx @ solved)).sum())
    return Fit(solved[:count].mT, solved[-1] if bias else None, max(error, 0.0))


def _solve(lhs: Tensor, rhs: Tensor) -> Tensor:
    """lhs⁻¹ rhs, symmetric; where it is singular, the smallest solution."""
    factor, info = torch.linalg.cholesky_ex(lhs)
    return torch.cholesky_solve(rhs, factor) if int(info) == 0 else torch.linalg.lstsq(lhs, rhs).solution


class Order(NamedTuple):
    """numbers: of inputs, those to remove first coming first; errors: the sum of squares after each removal."""

    numbers: Tensor
    errors: Tensor


def removal_order(gram: Gram, ridge: float) -> Order:
    """Removes inputs one by one, always the one whose removal costs the refitted least squares least.

    With P = xx⁻¹ and W = P xy, removing input j adds |W_j|² / P_jj; then P and W lose their share of j. It is the
    optimal brain surgeon's order for whole columns, exact for a quadratic.
    Source: Hassibi and Stork, Optimal Brain Surgeon, 1992, for columns as in Kurtic et al., ZipLM, 2023, arXiv
    2302.04089; derived here, without the papers' text at hand.
    """
    inputs = gram.xx.shape[0] - 1
    pull = ridge * gram.xx.diagonal()[:-1].mean()
    p = torch.linalg.inv(gram.xx + torch.diag(torch.cat([pull.expand(inputs), pull.new_zeros(1)])))
    w = p @ gram.xy
    error = gram.yy - float((w * gram.xy).sum())
    alive = torch.ones(inputs, dtype=torch.bool)
    numbers, errors = torch.empty(inputs, dtype=torch.long), torch.empty(inputs, dtype=torch.float64)
    for step in range(inputs):
        cost = w[:-1].square().sum(1) / p.diagonal()[:-1]
        j = int(torch.where(alive, cost, torch.inf).argmin())
        error += float(cost[j])
        column = p[:, j] / p[j, j]
        w -= column[:, None] * w[j].clone()
        p -= column[:, None] * p[j].clone()
        p[j], p[:, j], p[j, j], w[j] = 0, 0, 1, 0
        alive[j] = False
        numbers[step], errors[step] = j, error
    return Order(numbers, errors)


class Bases(NamedTuple):
    """first, second: what to multiply with; spectrum: (H, D), what each dimension carries, the most first."""

    first: Tensor
    second: Tensor
    spectrum: Tensor


def score_bases(queries: Tensor, keys: Tensor) -> Bases:
    """A and B (H, D, D) whose first r columns give the best scores of r dimensions: q A (k B)ᵀ ≈ q kᵀ.

    With R² the Gram of q and S² that of k, R S = U Σ Vᵀ; A = R⁻¹ U Σ^½ and B = S⁻¹ V Σ^½. What is lost is the sum of
    the σ² that are left out, as far as queries and keys of an image are those of all images.
    queries: (H, D, D), the mean of q qᵀ. keys: the mean of k kᵀ, each k without the mean of its image: what all keys
    share is added to all scores of a query, and softmax doesn't see it.
    """
    r, r_inverse = _roots(queries)
    s, s_inverse = _roots(keys)
    u, sigma, vh = torch.linalg.svd(r @ s)
    half = sigma.sqrt()[:, None]
    return Bases(r_inverse @ u * half, s_inverse @ vh.mT * half, sigma.square())


def score_fit(keys: Tensor, kept: Tensor) -> Tensor:
    """A (H, D, D') with which q A gives, with the dimensions of k of numbers (H, D') alone, the scores of q k best.

    keys: (H, D, D), as in `score_bases`. A = K[:, kept] K[kept, kept]⁻¹: the share of each dimension of k that those
    that stay can tell.
    """
    chosen = torch.nn.functional.one_hot(kept, keys.shape[-1]).mT.double()  # (H, D, D')
    cross = keys.double() @ chosen
    inner = chosen.mT @ cross
    floor = 1e-9 * inner.diagonal(dim1=-2, dim2=-1).mean(-1)[:, None, None].clamp(min=torch.finfo(torch.float64).tiny)
    inner = inner + floor * torch.eye(inner.shape[-1], dtype=inner.dtype)
    return torch.linalg.solve(inner, cross.mT).mT


def value_bases(outputs: Tensor, proj: Tensor, size: int) -> Bases:
    """A (H, E, size) and B (H, size, E) that give the best output of so many dimensions: z A B ≈ z.

    With R² the covariance of a head's output z and W (C, E) its part of proj, R Wᵀ = U Σ Vᵀ, and of U as many columns:
    A = R⁻¹ U made orthonormal, A B = R⁻¹ U Uᵀ R. What is lost, of each head alone, is the sum of the σ² that are left
    out.
    outputs: (H, E, E), the covariance of z. proj: (C, H, E).
    """
    r, r_inverse = _roots(outputs)
    u, sigma, _ = torch.linalg.svd(r @ proj.double().permute(1, 2, 0))  # U is whole, if C is less than E too
    u = u[..., :size]
    into, triangle = torch.linalg.qr(r_inverse @ u)
    return Bases(into, triangle @ u.mT @ r, sigma.square())


def _roots(gram: Tensor, floor: float = 1e-6) -> tuple[Tensor, Tensor]:
    """The symmetric square root of (…, D, D) and its inverse; eigenvalues of at least `floor` of the greatest."""
    values, vectors = torch.linalg.eigh(gram.double())
    values = values.clamp(min=floor * values[..., -1:].clamp(min=torch.finfo(torch.float64).tiny)).sqrt()[..., None, :]
    return vectors * values @ vectors.mT, vectors / values @ vectors.mT


def units_kept(order: Order, count: int) -> Tensor:
    """The numbers (count,), ascending, of those that are removed last."""
    return order.numbers[len(order.numbers) - count :].sort().values
