"""Bidirectional matching of tokens by several criteria, and what fusing does to their values.

Few tokens move at a time, so these are looked up and added where they go, and no product runs over all.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional

from martlet.functional.tokens import pick

SMALLEST = 1e-6
"""Of what a logarithm is taken of."""


def attraction(
    x: Float[Tensor, "b n c"],
    informativeness: Float[Tensor, "b n"],
    size: Float[Tensor, "b n"],
    temperatures: tuple[float, float, float],
    first: list[int],
    second: list[int],
) -> Float[Tensor, "b p q"]:
    """The logarithm of how much tokens of the first list and of the second draw each other.

    W = sim^t1 info^t2 size^t3, with sim = (1 + cosine) / 2, info = 1 / (a_i a_j) and size = 1 / (s_i s_j).
    Source: Lee et al., Multi-criteria Token Fusion, 2024, arXiv 2403.10030, section 3.2, equations 3 to 7.
    """
    direction = functional.normalize(x, dim=-1)
    cosine = torch.baddbmm(x.new_zeros(1, 1, 1), pick(direction, first), pick(direction, second).mT)
    alike = (1 + cosine) / 2  # (B, P, Q)
    own = temperatures[1] * informativeness.clamp_min(SMALLEST).log() + temperatures[2] * size.log()  # (B, N)
    return temperatures[0] * alike.clamp_min(SMALLEST).log() - pick(own, first)[..., None] - pick(own, second)[:, None]


@dataclass(frozen=True, eq=False)
class Fusion:
    """From N tokens to M: prefix, what is left of the first list, and what is left of the second.

    joins1, stays1: (B, r1), (B, P - r1), places in the first list; to2: (B, r1), where in the second they go.
    joins2, stays2: likewise of the second; to1: (B, r2), where among the `stays1` they go, what they got included.
    joins1 and stays2 may be none, and are left out then: engines have no selection of none.
    """

    prefix: list[int]
    first: list[int]
    second: list[int]
    joins1: Int[Tensor, "b r1"]
    stays1: Int[Tensor, "b s1"]
    to2: Int[Tensor, "b r1"]
    joins2: Int[Tensor, "b r2"]
    stays2: Int[Tensor, "b s2"]
    to1: Int[Tensor, "b r2"]

    def total(self, x: Float[Tensor, "b n c"]) -> Float[Tensor, "b m c"]:
        """The sums over what is fused."""
        one, two = pick(x, self.first), pick(x, self.second)
        if self.joins1.shape[1]:
            two = two.scatter_add(1, _wide(self.to2, x), one.gather(1, _wide(self.joins1, x)))
        one = one.gather(1, _wide(self.stays1, x))
        one = one.scatter_add(1, _wide(self.to1, x), two.gather(1, _wide(self.joins2, x)))
        left = [two.gather(1, _wide(self.stays2, x))] if self.stays2.shape[1] else []
        return torch.cat([pick(x, self.prefix), one, *left], 1)

    def spread(self, y: Float[Tensor, "b m c"]) -> Float[Tensor, "b n c"]:
        """Gives every token, in its old place, the value of what it became."""
        begin, end = len(self.prefix), len(self.prefix) + self.stays1.shape[1]
        one_left, two_left = y[:, begin:end], y[:, end:]
        two = y.new_zeros(y.shape[0], len(self.second), y.shape[2])
        if self.stays2.shape[1]:
            two = two.scatter(1, _wide(self.stays2, y), two_left)
        two = two.scatter(1, _wide(self.joins2, y), one_left.gather(1, _wide(self.to1, y)))
        one = y.new_zeros(y.shape[0], len(self.first), y.shape[2])
        one = one.scatter(1, _wide(self.stays1, y), one_left)
        if self.joins1.shape[1]:
            one = one.scatter(1, _wide(self.joins1, y), two.gather(1, _wide(self.to2, y)))
        order = [*self.prefix, *self.first, *self.second]
        places = sorted(range(len(order)), key=order.__getitem__)
        return pick(torch.cat([y[:, :begin], one, two], 1), places)


def bidirectional_matching(
    scores: Float[Tensor, "b p q"], r: int, prefix: list[int], first: list[int], second: list[int]
) -> Fusion:
    """r // 2 of the first list join their best in the second; then as many, or one more, of the second join their best
    among those of the first that are left. Who draws most, goes.

    Source: Lee et al., 2024, arXiv 2403.10030, section 3.2, bidirectional bipartite soft matching; by the same scores
    both times, as in the official code.
    """
    r1, r2 = r // 2, r - r // 2
    best, partner = scores.max(2)  # (B, P)
    order = best.argsort(1, descending=True)
    joins1, stays1 = order[:, :r1], order[:, r1:].sort(1).values
    left = scores.gather(1, stays1[..., None].expand(-1, -1, scores.shape[2]))  # (B, P - r1, Q)
    back, partner_back = left.max(1)  # (B, Q)
    order_back = back.argsort(1, descending=True)
    joins2, stays2 = order_back[:, :r2], order_back[:, r2:].sort(1).values
    return Fusion(
        prefix,
        first,
        second,
        joins1,
        stays1,
        partner.gather(1, joins1),
        joins2,
        stays2,
        partner_back.gather(1, joins2),
    )


def _wide(indices: Int[Tensor, "b k"], like: Float[Tensor, "b n c"]) -> Int[Tensor, "b k c"]:
    return indices[..., None].expand(-1, -1, like.shape[2])
