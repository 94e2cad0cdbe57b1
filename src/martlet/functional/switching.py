"""A small and a big model on a stream of frames: which of them is to run next, by how steady the last outputs were."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np

THRESHOLDS = 100
"""How many a solver tries: so many quantiles of the changes in what the big model gives, besides 0 and infinity."""


def change(last: np.ndarray, before: np.ndarray) -> float:
    """How far two outputs (K,) are apart: the sum of absolute differences.

    Source: Motetti et al., Adaptive Deep Learning aboard Nano-drones, 2024, arXiv 2401.15236, the policy by temporal
    consistency of the output.
    """
    return float(np.abs(last - before).sum())


def switched(small: np.ndarray, big: np.ndarray, starts: np.ndarray, threshold: float) -> np.ndarray:
    """On which frames (T,) the big model runs, from what both would give (T, K).

    A frame gets the big model if the outputs of the two frames before it, whichever model gave them, are `threshold`
    or more apart; so do the first two of a stream. starts: (T,), true where one begins.
    """
    ran, outputs, since = np.zeros(len(big), bool), np.empty_like(big), 0
    for t in range(len(big)):
        since = 0 if starts[t] else since + 1
        ran[t] = since < 2 or change(outputs[t - 1], outputs[t - 2]) >= threshold
        outputs[t] = big[t] if ran[t] else small[t]
    return ran


class Switch(NamedTuple):
    """A threshold, and what comes of it on the frames that it was found on.

    big_share: of the frames, which the big model gets. cost: the mean. error: the mean absolute error.
    """

    threshold: float
    big_share: float
    cost: float
    error: float


def tried(
    small: np.ndarray, big: np.ndarray, wanted: np.ndarray, starts: np.ndarray, costs: tuple[float, float]
) -> list[Switch]:
    """What every threshold that is tried does, from the big model on every frame to the small one wherever it can be.

    small, big, wanted: (T, K), what the models give and what is right. starts: (T,). costs: of a frame, by each.
    """
    changes = np.abs(np.diff(big, axis=0)).sum(1)[~starts[1:]]
    found = []
    for threshold in (0.0, *np.quantile(changes, np.linspace(0, 1, THRESHOLDS)), math.inf):
        ran = switched(small, big, starts, float(threshold))
        outputs, share = np.where(ran[:, None], big, small), float(ran.mean())
        cost = (1 - share) * costs[0] + share * costs[1]
        found.append(Switch(float(threshold), share, cost, float(np.abs(outputs - wanted).mean())))
    return found


def cheapest(found: list[Switch], error: float) -> Switch | None:
    """The cheapest with an error of at most this; None if there is none."""
    return min((each for each in found if each.error <= error), key=lambda each: (each.cost, each.error), default=None)


def best(found: list[Switch], cost: float) -> Switch | None:
    """That with the least error whose mean cost is at most this; None if there is none."""
    return min((each for each in found if each.cost <= cost), key=lambda each: (each.error, each.cost), default=None)
