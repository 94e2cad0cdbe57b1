"""How sure a number is: what a drop measured on so many images says, and how many images it takes to tell one."""

from __future__ import annotations

import math

import numpy as np

MISSED = 0.05
"""The risk that a drop as large as the one asked for isn't seen."""
Z = 1.6448536269514722
"""Of the normal distribution: 5 % lie above. Intervals from the 5th to the 95th percentile hold 90 %."""


def images_to_tell(drop_pct: float) -> int:
    """The fewest images on which a model that loses nothing can be told from one that loses so many points.

    Where a share d of images goes wrong that was right, none of n does with probability (1 - d)ⁿ. That has to be MISSED
    at most: n ≥ ln MISSED / ln(1 - d), 299 for one point. With chance in what changes it takes more (`paired`).

    Raises:
        ValueError: not between 0 and 100.
    """
    if not 0 < drop_pct < 100:
        raise ValueError(f"a drop is between 0 and 100 points, not {drop_pct}")
    return math.ceil(math.log(MISSED) / math.log1p(-drop_pct / 100))


def drop(before: np.ndarray, after: np.ndarray) -> tuple[float, float, float]:
    """Points of top-1 lost and their 90 % interval; both bool (images), whether each image is right.

    McNemar's setting: only images on which the two differ tell anything. With b that are right before only and c after
    only, the drop is (b - c) / n, with variance (b + c - (b - c)² / n) / n². One image is added to b and to c for the
    variance (Agresti and Min, 2005), so that no difference at all isn't taken for certainty.
    """
    n = len(before)
    b, c = int((before & ~after).sum()), int((after & ~before).sum())
    lost = (b - c) / n
    spread = Z * math.sqrt(b + c + 2 - (b - c) ** 2 / n) / n
    return 100 * lost, 100 * (lost - spread), 100 * (lost + spread)


def mean(values: np.ndarray) -> tuple[float, float, float]:
    """The mean and its 90 % interval, by the normal distribution."""
    middle = float(values.mean())
    spread = Z * float(values.std(ddof=1)) / math.sqrt(len(values)) if len(values) > 1 else math.inf
    return middle, middle - spread, middle + spread


def share_pct(hits: np.ndarray) -> tuple[float, float, float]:
    """Per cent of True and its 90 % interval (Wilson, 1927)."""
    n, p = len(hits), float(hits.mean())
    centre, spread = p + Z**2 / (2 * n), Z * math.sqrt(p * (1 - p) / n + Z**2 / (4 * n**2))
    low, high = (100 * min(1.0, max(0.0, (centre + sign * spread) / (1 + Z**2 / n))) for sign in (-1, 1))
    return 100 * p, low, high
