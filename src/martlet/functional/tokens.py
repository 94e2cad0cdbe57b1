"""Fewer tokens: which of them join which, and what becomes of their values.

A `Reduction` is one matrix of shares, made by a few comparisons, and the arithmetic on values is one product with it.
To an engine every operation costs some microseconds, however small; gathers and scatters for each side would be many.

The product is written with `baddbmm`, which quantizers of activation products leave alone: what it adds up is the
residual stream, whose outlier channels eight bits don't hold.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional


class Reduction(NamedTuple):
    """From N tokens to M.

    order: (N) the numbers of the tokens, in the order in which `shares` has them; the same for every image.
    shares: (B, M, N), how much of each token goes to each that is left; over M they add up to 1.
    """

    order: Sequence[int]
    shares: Tensor

    @property
    def num_tokens(self) -> int:
        """M."""
        return self.shares.shape[1]


def merge(
    x: Float[Tensor, "b n c"], reduction: Reduction, weights: Float[Tensor, "b n"] | None = None
) -> tuple[Float[Tensor, "b m c"], Float[Tensor, "b m"]]:
    """The tokens that are left, each the mean of its shares under `weights`, and their sums of weights.

    weights: None is 1 for all.
    """
    shares = reduction.shares
    if weights is not None:
        shares = shares * pick(weights, reduction.order)[:, None]
    total = shares.sum(-1)  # (B, M)
    return _product(shares, pick(x, reduction.order)) / total[..., None], total


def unmerge(y: Float[Tensor, "b m c"], reduction: Reduction) -> Float[Tensor, "b n c"]:
    """Gives every token, in its old place, the value of what it became."""
    places = sorted(range(len(reduction.order)), key=reduction.order.__getitem__)
    return pick(_product(reduction.shares.mT, y), places)


def cosine_similarity(a: Float[Tensor, "b s c"], b: Float[Tensor, "b d c"]) -> Float[Tensor, "b s d"]:
    """The cosine of each row of a with each of b."""
    return _product(functional.normalize(a, dim=-1), functional.normalize(b, dim=-1).mT)


def bipartite_soft_matching(
    scores: Float[Tensor, "b d s"],
    r: int,
    num_prefix: int,
    destinations: Sequence[int],
    sources: Sequence[int],
    handicap: Float[Tensor, "b s"] | None = None,
) -> Reduction:
    """Each source's best destination, and the r sources whose best is the best join it.

    handicap is subtracted from a source's best score before sources are compared with each other. A source that scores
    several destinations equally, as rounded numbers may, is shared among them. What is left: the prefix, the
    destinations, and the sources that stay, the worst match first.
    Source: Bolya et al., Token Merging, 2023, arXiv 2210.09461, section 3, steps 2 to 5.
    """
    best = scores.amax(1, keepdim=True)  # (B, 1, S)
    order = best[:, 0] if handicap is None else best[:, 0] - handicap
    staying = _one_hot(order.topk(len(sources) - r, largest=False).indices, len(sources), scores)  # (B, S - r, S)
    joins = (scores == best).to(scores.dtype)  # (B, D, S)
    joins = joins * ((1 - staying.sum(1, keepdim=True)) / joins.sum(1, keepdim=True))
    return _reduction(num_prefix, destinations, sources, joins, staying)


def fuse_rest(scores: Float[Tensor, "b s"], keep: int, num_prefix: int) -> Reduction:
    """Of the tokens behind the prefix, the `keep` of the highest scores stay, and the rest join a new one.

    What is left: the prefix, the new one, and those that stay, the best first.
    Source: Liang et al., EViT, 2022, arXiv 2202.07800, section 3.2.
    """
    count = scores.shape[1]
    staying = _one_hot(scores.topk(keep).indices, count, scores)  # (B, K, S)
    joins = 1 - staying.sum(1, keepdim=True)  # (B, 1, S)
    return _reduction(num_prefix, (), range(num_prefix, num_prefix + count), joins, staying)


def pick(x: Tensor, indices: Sequence[int]) -> Tensor:
    """The same of the second axis for every image, (B, N, …) -> (B, K, …)."""
    return x.index_select(1, torch.tensor(indices, dtype=torch.long, device=x.device))


def _reduction(
    num_prefix: int, destinations: Sequence[int], sources: Sequence[int], joins: Tensor, staying: Tensor
) -> Reduction:
    """Prefix and destinations go to themselves; joins (B, D, S) and staying (B, K, S) say where sources go."""
    batch, groups, count = joins.shape
    fixed = num_prefix + len(destinations)
    itself = torch.eye(num_prefix + groups + staying.shape[1], fixed, dtype=joins.dtype, device=joins.device)
    moves = torch.cat([joins.new_zeros(1, num_prefix, count).expand(batch, -1, -1), joins, staying], 1)  # (B, M, S)
    shares = torch.cat([itself.expand(batch, -1, -1), moves], -1)  # (B, M, N)
    return Reduction([*range(num_prefix), *destinations, *sources], shares)


def _product(a: Tensor, b: Tensor) -> Tensor:
    return torch.baddbmm(a.new_zeros(1, 1, 1), a, b)


def _one_hot(chosen: Int[Tensor, "b k"], n: int, like: Tensor) -> Float[Tensor, "b k n"]:
    return (chosen[:, :, None] == torch.arange(n, device=chosen.device)).to(like.dtype)
