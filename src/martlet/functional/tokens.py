"""Fewer tokens: which of them join which, and what becomes of their values.

A `Reduction` parts the N tokens in a prefix, destinations and sources. Some sources stay; the others join destinations,
wholly or in shares. Afterwards come, in this order, the prefix, the destinations, and the sources that stay. All that
depends on the image is in two small tensors, and values move in one product and one lookup of rows: a handful of large
kernels, where a gather and a scatter a step would be many small ones.

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
    """From N tokens to num_prefix + D + K.

    num_prefix: how many leading tokens stay as they are.
    destinations, sources: the numbers of the D and S other tokens. Without destinations, there are D = 1 new ones.
    joins: (B, D, S), the share of each source that each destination takes; over destinations they add up to 1, or to 0
        for a source that stays or is dropped.
    staying: (B, K), which sources stay, counted among the sources.
    """

    num_prefix: int
    destinations: Sequence[int]
    sources: Sequence[int]
    joins: Tensor
    staying: Tensor

    @property
    def num_tokens(self) -> int:
        """How many tokens are left."""
        return self.num_prefix + self.joins.shape[1] + self.staying.shape[1]


def merge(
    x: Float[Tensor, "b n c"], reduction: Reduction, weights: Float[Tensor, "b n"] | None = None
) -> Float[Tensor, "b m c"]:
    """The tokens that are left: each destination becomes the mean of itself and what joins it, under `weights`.

    weights: None is 1 for all.
    """
    _, destinations, sources, joins, staying = reduction
    moving = pick(x, sources)  # (B, S, C)
    if weights is not None:
        joins = joins * pick(weights, sources)[:, None]
    total = joins.sum(-1, keepdim=True)  # (B, D, 1)
    if destinations:
        into = pick(x, destinations)  # (B, D, C)
        own = 1.0 if weights is None else pick(weights, destinations)[..., None]
        merged = torch.baddbmm(into * own, joins, moving) / (total + own)
    else:
        merged = torch.baddbmm(x.new_zeros(1, 1, 1), joins, moving) / total
    return torch.cat([x[:, : reduction.num_prefix], merged, take(moving, staying)], 1)


def sizes(size: Float[Tensor, "b n"], reduction: Reduction) -> Float[Tensor, "b m"]:
    """How many patches the tokens that are left stand for."""
    _, destinations, sources, joins, staying = reduction
    moving = pick(size, sources)  # (B, S)
    into = (joins * moving[:, None]).sum(-1)  # (B, D)
    if destinations:
        into = into + pick(size, destinations)
    return torch.cat([size[:, : reduction.num_prefix], into, take(moving, staying)], 1)


def unmerge(y: Float[Tensor, "b m c"], reduction: Reduction) -> Float[Tensor, "b n c"]:
    """Gives every token the value of what it became, in its old place."""
    prefix, destinations, sources, joins, staying = reduction
    shares = torch.cat([joins, _one_hot(staying, len(sources), y)], 1)  # (B, D + K, S)
    back = torch.baddbmm(y.new_zeros(1, 1, 1), shares.mT, y[:, prefix:])  # (B, S, C)
    everything = torch.cat([y[:, : prefix + len(destinations)], back], 1)
    order = [*range(prefix), *destinations, *sources]
    return pick(everything, [order.index(token) for token in range(len(order))])


def cosine_similarity(a: Float[Tensor, "b s c"], b: Float[Tensor, "b d c"]) -> Float[Tensor, "b s d"]:
    """The cosine of each row of a with each of b."""
    a, b = functional.normalize(a, dim=-1), functional.normalize(b, dim=-1)
    return torch.baddbmm(a.new_zeros(1, 1, 1), a, b.mT)


def bipartite_soft_matching(
    scores: Float[Tensor, "b s d"],
    r: int,
    num_prefix: int,
    destinations: Sequence[int],
    sources: Sequence[int],
    handicap: Float[Tensor, "b s"] | None = None,
) -> Reduction:
    """Each source's best destination, and the r sources whose best is the best join it.

    handicap is subtracted from a source's best score before sources are compared with each other. A source that scores
    several destinations equally, as rounded numbers may, is shared among them. The worst match stays first.
    Source: Bolya et al., Token Merging, 2023, arXiv 2210.09461, section 3, steps 2 to 5.
    """
    best = scores.amax(-1)  # (B, S)
    order = best if handicap is None else best - handicap
    staying = order.topk(len(sources) - r, largest=False).indices  # (B, S - r)
    moves = 1 - _one_hot(staying, len(sources), scores).sum(1)  # (B, S)
    joins = (scores == best[..., None]).to(scores.dtype).mT  # (B, D, S)
    joins = joins * (moves / joins.sum(1))[:, None]
    return Reduction(num_prefix, destinations, sources, joins, staying)


def fuse_rest(scores: Float[Tensor, "b s"], keep: int, num_prefix: int) -> Reduction:
    """Of the tokens behind the prefix, the `keep` of the highest scores stay, the best first; the rest join a new one.

    Source: Liang et al., EViT, 2022, arXiv 2202.07800, section 3.2.
    """
    count = scores.shape[1]
    staying = scores.topk(keep).indices  # (B, K)
    joins = 1 - _one_hot(staying, count, scores).sum(1, keepdim=True)  # (B, 1, S)
    return Reduction(num_prefix, (), range(num_prefix, num_prefix + count), joins, staying)


def pick(x: Tensor, indices: Sequence[int]) -> Tensor:
    """The same of the second axis for every image, (B, N, …) -> (B, K, …)."""
    return x.index_select(1, torch.tensor(indices, dtype=torch.long, device=x.device))


def take(x: Tensor, indices: Int[Tensor, "b k"]) -> Tensor:
    """Others of the second axis for every image, (B, N, …) -> (B, K, …)."""
    images = torch.arange(x.shape[0], device=x.device)[:, None]
    return x[images, indices]


def _one_hot(chosen: Int[Tensor, "b k"], n: int, like: Tensor) -> Float[Tensor, "b k n"]:
    return (chosen[:, :, None] == torch.arange(n, device=chosen.device)).to(like.dtype)
