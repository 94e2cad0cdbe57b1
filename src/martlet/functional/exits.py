"""Which images leave at which exit, what that costs, and the thresholds for a budget."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

LEVELS = 400
"""How many distributions over the exits a solver tries, from all at the last to all at the first."""
EXACT = 1e-9
"""What floating point may add to a share."""


def decide(confidences: np.ndarray, thresholds: Sequence[float] | np.ndarray) -> np.ndarray:
    """At which exit (N,) each image leaves: the first whose confidence (E, N) is at least its threshold, else the last.

    thresholds: of the first E exits; the result is from 0 to E.
    """
    if not len(confidences):
        return np.zeros(confidences.shape[1], int)
    leaves = confidences >= np.asarray(thresholds)[:, None]  # (E, N)
    return np.where(leaves.any(0), leaves.argmax(0), len(confidences))


def shares(ratio: float, count: int) -> np.ndarray:
    """The share of images that is to leave at each of `count` exits: in proportion to ratio, ratio², …

    Source: Yue et al., DeeR-VLA, 2024, arXiv 2411.02359, an exponential distribution over the exits, as in its code.
    """
    powers = np.log(ratio) * np.arange(1, count + 1)
    found = np.exp(powers - powers.max())
    return found / found.sum()


def thresholds(confidences: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """The thresholds (E,) at which the wanted shares (E + 1,) of the images leave at each exit.

    confidences: (E, N). At each exit, of the images that are left, the surest so many of all N leave. A share of less
    than one image lets none leave: the threshold is infinite. Images as sure as the last of them leave with it, and
    where that has left fewer than are to leave at a later exit, these do.
    Source: as `shares`.
    """
    count = confidences.shape[1]
    left, found = np.ones(count, bool), np.full(len(confidences), math.inf)
    for k, values in enumerate(confidences):
        leaving = math.floor(count * wanted[k] + 1e-9)
        if leaving and left.any():
            surest = np.sort(values[left])[::-1]
            found[k] = surest[min(leaving, len(surest)) - 1]
            left &= values < found[k]
    return found


class Plan(NamedTuple):
    """Thresholds, and what comes of them on the images that they were solved on.

    share: of the images, at each exit. cost: the mean. wrong: the share of wrong answers.
    """

    thresholds: np.ndarray
    share: np.ndarray
    cost: float
    wrong: float


def plan(confidences: np.ndarray, right: np.ndarray, costs: np.ndarray, limits: Sequence[float] | np.ndarray) -> Plan:
    """What thresholds (E,) do to images with these confidences (E, N), right (E + 1, N) or not at each exit.

    costs: (E + 1,), of an image that leaves there.
    """
    exits = decide(confidences, limits)
    share = np.bincount(exits, minlength=len(costs)) / len(exits)
    wrong = 1 - right[exits, np.arange(len(exits))].mean()
    return Plan(np.asarray(limits, float), share, float(share @ costs), float(wrong))


class Budget(NamedTuple):
    """Limits; None is no limit.

    mean: of the cost. lost: share of answers that may become wrong, more than the last exit's. risk: share of wrong
    answers that other images exceed with a probability of `doubt` at most.
    """

    mean: float | None = None
    lost: float | None = None
    risk: float | None = None
    doubt: float = 0.05


def tried(confidences: np.ndarray, count: int) -> list[np.ndarray]:
    """Thresholds (count - 1,) that are tried, from those by which no image leaves early to those by which all do."""
    never = np.full(count - 1, math.inf)
    if count == 1:
        return [never]
    ratios = np.exp(np.linspace(12, -12, LEVELS))
    found = [thresholds(confidences, shares(ratio, count)) for ratio in ratios]
    return [never, *found, np.full(count - 1, -math.inf)]


def solve(confidences: np.ndarray, right: np.ndarray, costs: np.ndarray, budget: Budget) -> Plan | None:
    """The plan within the budget that is wrong least, if the mean cost is limited, else that costs least; None if no
    plan that is tried is within it.

    confidences: (E, N). right: (E + 1, N). costs: (E + 1,).
    Where risk is limited, thresholds are found on the first half of the images, and tested on the others: the plans one
    after the other, the dearest first, until one fails an exact binomial test. So `doubt` holds for the one that is
    chosen, however many were tried.
    Source: Yue et al., DeeR-VLA, 2024, arXiv 2411.02359, as `shares`; for risk Angelopoulos et al., Learn then Test,
    2021, arXiv 2110.01052, fixed sequence testing of binomial p-values.
    """
    learned, tested = slice(None), slice(None)
    if budget.risk is not None:
        learned, tested = slice(0, right.shape[1] // 2), slice(right.shape[1] // 2, None)
    lost = 1 - right[-1, tested].mean()
    best: Plan | None = None
    for limits in tried(confidences[:, learned], len(costs)):
        found = plan(confidences[:, tested], right[:, tested], costs, limits)
        if budget.risk is not None:
            count = right[:, tested].shape[1]
            if binomial_tail(round(found.wrong * count), count, budget.risk) > budget.doubt:
                break
        if budget.mean is not None and found.cost > budget.mean * (1 + EXACT):
            continue
        if budget.lost is not None and found.wrong > lost + budget.lost + EXACT:
            continue
        aims = (found.wrong, found.cost) if budget.mean is not None else (found.cost, found.wrong)
        if best is None or aims < ((best.wrong, best.cost) if budget.mean is not None else (best.cost, best.wrong)):
            best = found
    return best


def around(confidence: np.ndarray, coverage: float, width: float) -> tuple[float, float]:
    """The window [low, high) of confidence (N,) around the border above which a share `coverage` of images is answered.

    It holds a share `width` of the images, as many below the border as above, as far as there are so many.
    Source: Xia and Bouganis, 2023, arXiv 2303.08010, and its code, which cuts the window at the ends.
    """
    count, rising = len(confidence), np.sort(confidence)
    inside, border = round(width * count), round((1 - coverage) * count)
    first = min(max(border - inside // 2, 0), count - inside)
    if not inside:
        return math.inf, math.inf  # nothing is in it
    low = -math.inf if first == 0 else float(rising[first])
    return low, math.inf if first + inside == count else float(rising[first + inside])


def held_out(confidences: np.ndarray, right: np.ndarray, costs: np.ndarray, budget: Budget) -> Plan | None:
    """What the solver gives on images that it doesn't see: solved on each half of them and tried on the other; the mean
    of both. The thresholds are those of the first half. None where a half has no plan."""
    half = right.shape[1] // 2
    parts = slice(0, half), slice(half, None)
    found = []
    for seen, unseen in (parts, parts[::-1]):
        solved = solve(confidences[:, seen], right[:, seen], costs, budget._replace(risk=None))
        if solved is None:
            return None
        found.append(plan(confidences[:, unseen], right[:, unseen], costs, solved.thresholds))
    first, second = found
    return Plan(
        first.thresholds,
        (first.share + second.share) / 2,
        (first.cost + second.cost) / 2,
        (first.wrong + second.wrong) / 2,
    )


def depths(quality: np.ndarray, costs: np.ndarray, beta: float) -> np.ndarray:
    """Where each image (N,) should leave: at the place whose quality (E + 1, N) is best, once beta costs (E + 1,) are
    taken off; the first of equals.

    Source: Yao et al., ECO-M2F, 2024, arXiv 2404.15244, the utility q - beta k, whose k is the number of layers.
    """
    return (quality - beta * np.asarray(costs)[:, None]).argmax(0)


def regression(features: np.ndarray, labels: np.ndarray, classes: int) -> tuple[np.ndarray, np.ndarray]:
    """Weights (K, C) and biases (K,) of a softmax regression of labels (N,) on features (N, C), in float64.

    What is made small is the sum of the cross-entropies and half the square of the weights, of features with mean 0 and
    variance 1; what is given is for features as they are.
    """
    from scipy.optimize import minimize

    x = features.astype(np.float64)
    mean, std = x.mean(0), x.std(0)
    std[std == 0] = 1.0
    x, wanted = (x - mean) / std, np.eye(classes)[labels]

    def loss(flat: np.ndarray) -> tuple[float, np.ndarray]:
        weights, biases = flat[:-classes].reshape(classes, -1), flat[-classes:]
        scores = x @ weights.T + biases
        scores -= scores.max(1, keepdims=True)
        logs = scores - np.log(np.exp(scores).sum(1, keepdims=True))
        slope = np.exp(logs) - wanted  # (N, K)
        gradient = np.concatenate([(slope.T @ x + weights).ravel(), slope.sum(0)])
        return float(-(wanted * logs).sum() + (weights**2).sum() / 2), gradient

    found = minimize(loss, np.zeros(classes * (x.shape[1] + 1)), jac=True, method="L-BFGS-B").x
    weights, biases = found[:-classes].reshape(classes, -1), found[-classes:]
    return weights / std, biases - weights @ (mean / std)


def binomial_tail(wrong: int, count: int, probability: float) -> float:
    """P(X <= wrong) of a binomial X of `count` trials."""
    from scipy.stats import binom

    return float(binom.cdf(wrong, count, probability))
