"""Several objectives at once: which points are beaten by none, and how much of the space they beat."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


def front(points: np.ndarray) -> np.ndarray:
    """Which points no other dominates; every objective is to be small.

    A point dominates another if it is nowhere worse and somewhere better, so that equal points stay together. NaN is
    worse than anything, and a point with one is never on the front.

    points: float (n, d). Returns bool (n).
    """
    points = np.asarray(points, dtype=np.float64)
    known = np.logical_not(np.isnan(points).any(axis=1))
    no_worse = (points[:, None] <= points[None]).all(2)  # (n, n): i against j
    better = (points[:, None] < points[None]).any(2)
    dominated = np.any(no_worse & better & known.reshape(-1, 1), axis=0)
    return np.logical_and(known, ~dominated)


def hypervolume(points: np.ndarray, reference: Sequence[float]) -> float:
    """The volume between the points and the reference that some point dominates; every objective is to be small.

    What isn't better than the reference everywhere adds nothing. Its unit is the product of the objectives' units; a
    ratio of two such volumes depends on the reference, which has to be said with it.

    points: float (n, d). reference: (d), a point that is worse than what counts.
    Source: While, Bradstreet and Barone, A Fast Way of Calculating Exact Hypervolumes, 2012 (WFG): each point adds its
    box less what the later ones, cut to that box, cover of it.
    """
    limit = np.asarray(reference, dtype=np.float64)
    points = np.asarray(points, dtype=np.float64).reshape(-1, len(limit))
    return _covered(points[(points < limit).all(1)], limit)


def _covered(points: np.ndarray, limit: np.ndarray) -> float:
    points = np.unique(points[front(points)], axis=0)
    if len(limit) == 2:  # a staircase; sorted by the first objective, the second falls
        edges = np.append(points[1:, 0], limit[0])
        return float(((edges - points[:, 0]) * (limit[1] - points[:, 1])).sum()) if len(points) else 0.0
    total = 0.0
    for i, point in enumerate(points):
        total += float(np.prod(limit - point)) - _covered(np.maximum(points[i + 1 :], point), limit)
    return total
