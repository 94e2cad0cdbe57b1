"""A linear map as a product of two thinner ones: of its weight, of what it gives, of a pair of maps in attention."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from martlet.functional.structure.heads import HeadWeights


class Thin(NamedTuple):
    """y = up (down x) + bias. down: (r, I); up: (O, r); bias: (O,) or None."""

    down: Tensor
    up: Tensor
    bias: Tensor | None


@dataclass(frozen=True, eq=False)
class Factors:
    """A map of O outputs and I inputs at every rank up to R = min(O, I).

    up: (O, R); down: (R, I); bias: (O,) or None; spectrum: (R,), of the squared error, what each rank takes away, the
    most first. center: (O,), what outputs are around; None leaves the bias as it is.
    """

    up: Float[Tensor, "o r"]
    down: Float[Tensor, "r i"]
    bias: Tensor | None
    spectrum: Float[Tensor, " r"]
    center: Tensor | None = None

    def at(self, rank: int) -> Thin:
        up, bias = self.up[:, :rank], self.bias
        if self.center is not None:
            offset = (0.0 if bias is None else bias) - self.center
            bias = self.center + up @ (up.mT @ offset)
        return Thin(self.down[:rank], up, bias)

    def lost(self, rank: int) -> float:
        """Squared error that is left at a rank, as a share of the whole."""
        return float(self.spectrum[rank:].sum() / self.spectrum.sum().clamp(min=torch.finfo(torch.float64).tiny))


def of_weight(weight: Float[Tensor, "o i"], bias: Tensor | None) -> Factors:
    """The nearest maps of each rank: W = U S Vᵀ, up = U √S and down = √S Vᵀ, in float64.

    Both factors get half of the singular values, so that neither has much larger numbers than the other to round.
    Source: Eckart and Young, 1936; as in Cahyawijaya, Greenformers, 2021, arXiv 2108.10808.
    """
    u, s, v = torch.linalg.svd(weight.detach().double(), full_matrices=False)
    root = s.sqrt()
    return Factors(u * root, root[:, None] * v, None if bias is None else bias.detach().double(), s.square())


def of_outputs(
    weight: Float[Tensor, "o i"], bias: Tensor | None, mean: Float[Tensor, " o"], covariance: Float[Tensor, "o o"]
) -> Factors:
    """The maps of each rank that give the nearest outputs: principal components of them, in float64.

    With the eigenvectors U of the outputs' covariance, y ≈ U_r U_rᵀ (y - E y) + E y, so that down = U_rᵀ W, up = U_r
    and the bias is U_r U_rᵀ b + (1 - U_r U_rᵀ) E y.
    Source: Yu et al., Unified Low-rank Compression Framework for CTR Prediction, 2024, arXiv 2405.18146 (atomic feature
    mimicking), after the official code.
    """
    values, vectors = torch.linalg.eigh(covariance.double())
    size = min(weight.shape)
    values, vectors = values.flip(0)[:size].clamp(min=0), vectors.flip(1)[:, :size]
    down = vectors.mT @ weight.detach().double()
    return Factors(vectors, down, None if bias is None else bias.detach().double(), values, mean.double())


class Moments:
    """Mean and covariance of what comes by, of O features; its memory doesn't grow with the number of images."""

    def __init__(self, features: int) -> None:
        self.sums = torch.zeros(features, dtype=torch.float64)
        self.squares = torch.zeros(features, features, dtype=torch.float64)
        self.count = 0

    def add_(self, y: Float[Tensor, "s o"]) -> None:
        # Around the first batch's mean, or float32 would lose small deviations from large means.
        if self.count == 0:
            self.shift = y.mean(0)
        y = y - self.shift
        self.sums += y.sum(0).double()
        self.squares += (y.mT @ y).double()
        self.count += len(y)

    def result(self) -> tuple[Tensor, Tensor]:
        """(O,) and (O, O)."""
        mean = self.sums / self.count
        return mean + self.shift.double(), self.squares / self.count - torch.outer(mean, mean)


@dataclass(frozen=True, eq=False)
class HeadFactors:
    """An attention whose scores and values can be had at any rank.

    weights: at full rank, dimensions in order of what they carry. scores, values: (H, D) and (H, E), squared singular
    values of the products that a head computes.
    """

    weights: HeadWeights
    scores: Tensor
    values: Tensor

    def at(self, qk_rank: int, v_rank: int) -> HeadWeights:
        w = self.weights
        return replace(
            w,
            q=w.q[:, :qk_rank],
            q_bias=w.q_bias[:, :qk_rank],
            k=w.k[:, :qk_rank],
            k_bias=w.k_bias[:, :qk_rank],
            v=w.v[:, :v_rank],
            v_bias=w.v_bias[:, :v_rank],
            proj=w.proj[..., :v_rank],
        )


def of_heads(weights: HeadWeights, *, scores: bool = True, values: bool = True) -> HeadFactors:
    """Of each head, the products W_qᵀ W_k and W_proj W_v, which are all that attention has of the four maps.

    A score is (W_q x + b_q)ᵀ (W_k y + b_k). Softmax doesn't see what it has from b_k, which is the same for every key;
    b_q goes with W_q, as a column. The weights of a softmax add up to 1, so that b_v gives W_proj b_v whatever they
    are, which goes to the bias of proj. So at full rank nothing is lost, biases included.
    scores, values: which of the two to factorize; the other stays as it is, with a spectrum of ones.
    Source: Xiao et al., COMCAT, 2023, arXiv 2305.17235, after the official code.
    Differs: the official code has no biases left; both factors get half of the singular values.
    """
    heads, qk, v = weights.num_heads, weights.qk_dim, weights.v_dim
    spectra = [weights.q.new_ones(heads, qk), weights.q.new_ones(heads, v)]
    if scores:
        queries = torch.cat([weights.q, weights.q_bias[..., None]], -1)  # (H, D, C + 1)
        left, s, right = _product(queries.mT, weights.k)  # (H, C + 1, D), (H, D), (H, D, C)
        root, spectra[0] = s.sqrt(), s.square()
        queries = (left * root[:, None]).mT
        weights = replace(
            weights,
            q=queries[..., :-1],
            q_bias=queries[..., -1],
            k=root[..., None] * right,
            k_bias=torch.zeros_like(weights.k_bias),
        )
    if values:
        bias = weights.proj_bias + torch.einsum("che,he->c", weights.proj, weights.v_bias)
        left, s, right = _product(weights.proj.transpose(0, 1), weights.v)  # (H, C, E), (H, E), (H, E, C)
        root, spectra[1] = s.sqrt(), s.square()
        weights = replace(
            weights,
            v=root[..., None] * right,
            v_bias=torch.zeros_like(weights.v_bias),
            proj=(left * root[:, None]).transpose(0, 1),
            proj_bias=bias,
        )
    return HeadFactors(weights, *spectra)


def _product(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Singular vectors and values of a b, for a (…, M, D) and b (…, D, N) with D at most M and N."""
    qa, ra = torch.linalg.qr(a)
    qb, rb = torch.linalg.qr(b.mT)
    u, s, v = torch.linalg.svd(ra @ rb.mT)
    return qa @ u, s, v @ qb.mT
