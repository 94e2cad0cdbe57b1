"""A Gaussian process over global factors: what a few short trainings say of sizes that nobody trained."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from martlet.core.errors import UsageError

if TYPE_CHECKING:
    from sklearn.gaussian_process import GaussianProcessRegressor

Point = Mapping[str, float]
"""A positive number for each factor, by name."""

LENGTHS, NOISES = (0.3, 30.0), (1e-4, 1.0)
"""Of the kernel: between which its length lies, in octaves of a factor, and the share of the scores that is chance."""

STARTS = 4
"""From which the likelihood is climbed, besides the kernel as it is."""


class Surrogate:
    """Scores of sizes as a Gaussian process over the logarithms of their factors.

    A Matérn kernel of order 5/2 with a length for each factor, and noise; both from the likelihood, the best of several
    starts. Factors that are always the same are left out.

    Source: Meng and Chen, Navigating Efficiency in MobileViT through Gaussian Process on Global Architecture Factors,
    2024, arXiv 2406.04820, by summaries: a Matérn kernel over resolution, width and two depths. The paper's text wasn't
    at hand.

    Raises:
        UsageError: scikit-learn isn't installed, there are fewer than three points, or no factor differs among them.
    """

    def __init__(self, points: Sequence[Point], scores: Sequence[float], seed: int = 0) -> None:
        if len(points) < 3:
            raise UsageError(f"a Gaussian process takes three trainings or more, not {len(points)}; train more sizes")
        self.names = [name for name in points[0] if len({point[name] for point in points}) > 1]
        if not self.names:
            raise UsageError("a Gaussian process takes trainings of different sizes; these are all of one")
        self._process = _fitted(self._rows(points), np.asarray(scores, dtype=np.float64), seed)

    def __call__(self, points: Sequence[Point]) -> tuple[np.ndarray, np.ndarray]:
        """The expected score of each and its standard deviation, both (n)."""
        mean, spread = self._process.predict(self._rows(points), return_std=True)
        return np.asarray(mean), np.asarray(spread)

    def score(self, point: Point) -> float:
        """What is expected of one."""
        return float(self([point])[0][0])

    def _rows(self, points: Sequence[Point]) -> np.ndarray:
        return np.log2([[point[name] for name in self.names] for point in points])


def shrink(
    start: Point,
    macs: Callable[[Point], int],
    target_macs: float,
    score: Callable[[Point], float],
    smaller: Callable[[Point], Sequence[Point]],
    tolerance: float = 0.03,
) -> list[Point]:
    """The way from a size to one of a given number of MACs, each step the one that costs least for what it saves.

    macs: of a size. score: what is expected of it; higher is better. smaller: the sizes that a step may lead to, each
    with one factor less. tolerance: share of the target by which the end may miss it.

    Returns the sizes, the start first.

    Source: Meng and Chen (`Surrogate`), whose formula derives smaller models one from the other under a limit of MACs;
    as its text wasn't at hand, the rule of each step is ours: the least loss of score for each octave of MACs.

    Raises:
        UsageError: the start has fewer MACs, or no step leads there.
    """
    way, now = [start], macs(start)
    if now < target_macs * (1 - tolerance):
        raise UsageError(f"{now / 1e6:.1f} MMACs can't be shrunk to {target_macs / 1e6:.1f}; start from a larger model")
    while now > target_macs * (1 + tolerance):
        options: list[tuple[float, int, Point]] = []
        here = score(way[-1])
        for option in smaller(way[-1]):
            its = macs(option)
            if target_macs * (1 - tolerance) <= its < now:
                options.append(((here - score(option)) / math.log2(now / its), its, option))
        if not options:
            raise UsageError(
                f"no step leads from {now / 1e6:.1f} MMACs to {target_macs / 1e6:.1f}; allow more tolerance"
            )
        _, now, chosen = min(options, key=lambda its: its[0])
        way.append(chosen)
    return way


def _fitted(rows: np.ndarray, scores: np.ndarray, seed: int) -> GaussianProcessRegressor:
    try:
        from sklearn.exceptions import ConvergenceWarning
        from sklearn.gaussian_process import GaussianProcessRegressor
        from sklearn.gaussian_process.kernels import ConstantKernel, Matern, WhiteKernel
    except ModuleNotFoundError:
        raise UsageError("a Gaussian process needs scikit-learn: pip install 'martlet[search]'") from None
    lengths: Any = np.ones(rows.shape[1])  # stubs know one length alone
    kernel = ConstantKernel() * Matern(lengths, LENGTHS, nu=2.5) + WhiteKernel(0.1, NOISES)
    process = GaussianProcessRegressor(kernel, normalize_y=True, n_restarts_optimizer=STARTS, random_state=seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # a length at its bound: this factor doesn't matter
        return process.fit(rows, scores)
