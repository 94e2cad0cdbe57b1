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

SHARPNESS = 100.0
"""Of the softmax of correlations: a difference of 0.05 is a factor of 150."""
OUT_OF_REACH = 1e4


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


class Pairs(NamedTuple):
    """Of a matching, the r tokens that join others, the best match first, and whom.

    destinations, sources: (D), (S) the numbers of the tokens that may be joined and that may join. leaving: (B, r, S),
    a one for each token that leaves. joined: (B, r, D), its shares in those that it joins, which add up to 1.
    """

    destinations: Sequence[int]
    sources: Sequence[int]
    leaving: Tensor
    joined: Tensor


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
    return product(shares, pick(x, reduction.order)) / total[..., None], total


def unmerge(y: Float[Tensor, "b m c"], reduction: Reduction) -> Float[Tensor, "b n c"]:
    """Gives every token, in its old place, the value of what it became."""
    places = sorted(range(len(reduction.order)), key=reduction.order.__getitem__)
    return pick(product(reduction.shares.mT, y), places)


def cosine_similarity(a: Float[Tensor, "b s c"], b: Float[Tensor, "b d c"]) -> Float[Tensor, "b s d"]:
    """The cosine of each row of a with each of b."""
    return product(functional.normalize(a, dim=-1), functional.normalize(b, dim=-1).mT)


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
    staying = _one_hot_of_best(order, len(sources) - r, largest=False)  # (B, S - r, S)
    joins = (scores == best).to(scores.dtype)  # (B, D, S)
    joins = joins * ((1 - staying.sum(1, keepdim=True)) / joins.sum(1, keepdim=True))
    return _reduction(num_prefix, destinations, sources, joins, staying)


def matched_pairs(
    reduction: Reduction,
    scores: Float[Tensor, "b d s"],
    destinations: Sequence[int],
    sources: Sequence[int],
    handicap: Float[Tensor, "b s"] | None = None,
) -> Pairs:
    """What a reduction by `bipartite_soft_matching` from these scores has matched."""
    order = scores.amax(1) if handicap is None else scores.amax(1) - handicap  # (B, S)
    fixed, count = len(reduction.order) - len(sources), len(destinations)
    moves = reduction.shares[..., fixed:]  # (B, M, S)
    stays = moves[:, fixed:].sum(1)  # (B, S)
    joins = moves[:, fixed - count : fixed]  # (B, D, S)
    leaving = _one_hot_of_best(order - OUT_OF_REACH * stays, len(reduction.order) - reduction.num_tokens)
    return Pairs(destinations, sources, leaving, product(leaving, joins.mT))


def reactivate(
    source: Float[Tensor, "b r c"],
    information: Float[Tensor, "b r c"],
    tokens: Float[Tensor, " r"],
    channels: Float[Tensor, " c"],
) -> Float[Tensor, "b r c"]:
    """s + (2 sigmoid(z w_C) - 1) (2 sigmoid(w_r z) s), for tokens s that are about to be merged, z being what is known
    of each pair. Where w_C is zero, s stays as it is.

    Source: Xiong et al., PYRA, 2024, arXiv 2403.09192, as the official code has it.
    """
    by_channel = 2 * (tokens @ information).sigmoid()[:, None]  # (B, 1, C)
    by_token = 2 * (information @ channels).sigmoid()[..., None] - 1  # (B, r, 1)
    return source + source * by_channel * by_token


def squeeze(
    features: Float[Tensor, "b n c"],
    r: int,
    num_prefix: int,
    anchors: Sequence[int],
    bonus: Float[Tensor, "b n"] | None = None,
) -> Reduction:
    """All but r tokens stay, and each of these r joins the one that stays which it correlates with most.

    Prefix and anchors stay. So do those others whose best correlation with an anchor, less their bonus, is least. What
    is left: the prefix, the anchors, the others that stay, the odd one out first. Only patches join, and no prefix.

    Who joins whom is a softmax of correlations over those that stay, so sharp (SHARPNESS) that nearly all goes to the
    nearest: one operation, in which equals share, and in which a token that stays joins itself.
    Source: Wei et al., Joint Token Pruning and Squeezing, 2023, arXiv 2304.10716, section 3.2, for joining the nearest
    that stays.
    """
    _, count, width = features.shape
    fixed = [*range(num_prefix), *anchors]
    scores = functional.layer_norm(features, (width,))  # (B, N, C); products of two are C times their correlation
    held = pick(scores, fixed)  # (B, F, C)
    staying = count - r - len(fixed)
    if staying:
        alike = product(scores, held[:, num_prefix:].mT).amax(-1) / width  # (B, N)
        if bonus is not None:
            alike = alike - bonus
        never = torch.zeros(count).index_fill(0, torch.tensor(fixed, dtype=torch.long), OUT_OF_REACH)
        chosen = (alike + never.to(alike)).topk(staying, largest=False).indices  # (B, S)
        held = torch.cat([held, _rows(scores, chosen)], 1)  # (B, M, C)
    barred = torch.zeros(count, held.shape[1])
    barred[:num_prefix] = barred[:, :num_prefix] = -OUT_OF_REACH
    barred[range(num_prefix), range(num_prefix)] = 0
    shares = product(scores, held.mT) * (SHARPNESS / width) + barred.to(scores)  # (B, N, M)
    return Reduction(range(count), shares.softmax(-1).mT)


def fuse_rest(scores: Float[Tensor, "b s"], keep: int, num_prefix: int) -> Reduction:
    """Of the tokens behind the prefix, the `keep` of the highest scores stay, and the rest join a new one.

    What is left: the prefix, the new one, and those that stay, the best first.
    Source: Liang et al., EViT, 2022, arXiv 2202.07800, section 3.2.
    """
    count = scores.shape[1]
    staying = _one_hot_of_best(scores, keep)  # (B, K, S)
    joins = 1 - staying.sum(1, keepdim=True)  # (B, 1, S)
    return _reduction(num_prefix, (), range(num_prefix, num_prefix + count), joins, staying)


def skip(scores: Float[Tensor, "b s"], keep: int, num_prefix: int) -> Reduction:
    """Of the tokens behind the prefix, the `keep` of the highest scores stay; the others join nothing.

    What is left: the prefix, and those that stay, the best first.
    """
    count = scores.shape[1]
    staying = _one_hot_of_best(scores, keep)  # (B, K, S)
    return _reduction(num_prefix, (), range(num_prefix, num_prefix + count), staying[:, :0], staying)


def rejoin(y: Float[Tensor, "b m c"], x: Float[Tensor, "b n c"], reduction: Reduction) -> Float[Tensor, "b n c"]:
    """Every token in its old place: those that stayed with the value that they have now, the others as in x."""
    gone = 1 - unmerge(torch.ones_like(y[..., :1]), reduction)  # (B, N, 1)
    return unmerge(y, reduction) + gone * x


def product(a: Float[Tensor, "b m n"], b: Float[Tensor, "b n c"]) -> Float[Tensor, "b m c"]:
    """In floating point, whatever is quantized around it."""
    return torch.baddbmm(a.new_zeros(1, 1, 1), a, b)


def pick(x: Tensor, indices: Sequence[int]) -> Tensor:
    """The same of the second axis for every image, (B, N, …) -> (B, K, …)."""
    if [*indices] == [*range(x.shape[1])]:
        return x
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


def _rows(x: Float[Tensor, "b n c"], indices: Int[Tensor, "b k"]) -> Float[Tensor, "b k c"]:
    """Each image's own, as one lookup in the rows of all images."""
    batch, n, _ = x.shape
    first = torch.arange(batch, device=x.device)[:, None] * n
    return x.flatten(0, 1).index_select(0, (indices + first).flatten()).unflatten(0, (batch, indices.shape[1]))


def _one_hot_of_best(scores: Float[Tensor, "b n"], k: int, largest: bool = True) -> Float[Tensor, "b k n"]:
    """A row for each of the k best, the best first; engines have no selection of none."""
    if k == 0:
        return scores.new_zeros(scores.shape[0], 0, scores.shape[1])
    chosen = scores.topk(k, largest=largest).indices  # (B, K)
    return (chosen[:, :, None] == torch.arange(scores.shape[1], device=chosen.device)).to(scores.dtype)
