"""A few of many that stand for all: each is as near as can be to one of them."""

from __future__ import annotations

import heapq
from collections.abc import Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor


def likeness(x: Float[Tensor, "n p"]) -> Float[Tensor, "n n"]:
    """The greatest distance of any two, less the distance of each two."""
    distance = torch.cdist(x, x)
    return distance.max() - distance


def facility_location(alike: Float[Tensor, "n n"], k: int) -> Int[Tensor, " k"]:
    """k of n, one after the other: each time the one that adds most to Σ_i max_j s_ij over those chosen.

    Gains only fall, so those that were once less than another's gain now needn't be asked again (lazy greedy).
    Source: Mirzasoleiman et al., CRAIG, 2020, arXiv 1906.01827, section 3.
    """
    best = alike.new_zeros(len(alike))

    def gain(j: int) -> float:
        return float((alike[:, j] - best).clamp_(min=0).sum())

    waiting = [(-total, j) for j, total in enumerate(alike.clamp(min=0).sum(0).tolist())]
    heapq.heapify(waiting)
    chosen: list[int] = []
    while len(chosen) < k:
        _, j = heapq.heappop(waiting)
        now = (-gain(j), j)
        if waiting and now > waiting[0]:
            heapq.heappush(waiting, now)
            continue
        chosen.append(j)
        best = torch.maximum(best, alike[:, j])
    return torch.tensor(chosen, dtype=torch.long)


def stands_for(alike: Float[Tensor, "n n"], chosen: Int[Tensor, " k"]) -> Int[Tensor, " k"]:
    """How many of all are nearest to each that was chosen, itself included; of equals, to the first."""
    return alike[:, chosen].argmax(1).bincount(minlength=len(chosen)).clamp(min=1)


def even_shares(counts: Sequence[int], total: int) -> list[int]:
    """How many of each class to take, as evenly as its images allow, so that it is `total` in all."""
    shares, left = [0] * len(counts), min(total, sum(counts))
    while left:
        room = [k for k, count in enumerate(counts) if shares[k] < count]
        each = max(1, left // len(room))
        for k in room:
            more = min(each, counts[k] - shares[k], left)
            shares[k], left = shares[k] + more, left - more
    return shares
