"""Auto-scaling without training: a small network is grown where untrained measures say that it gains most."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from martlet.recipe_search.scaling.topology import Measures

WIDER = (0.05, 0.1, 0.15, 0.2)
"""By how much of itself the width may grow in a step."""


@dataclass(frozen=True)
class Size:
    """Blocks in each stage, and channels of the first one."""

    depths: tuple[int, ...]
    width: int


def growths(size: Size) -> list[Size]:
    """One more block in one of the stages, and each wider width; the sizes that a step chooses from."""
    deeper = [tuple(d + (i == stage) for i, d in enumerate(size.depths)) for stage in range(len(size.depths))]
    wider = dict.fromkeys(round(size.width * (1 + share)) for share in WIDER)
    return [Size(depths, width) for depths in deeper for width in wider]


def best(measured: Sequence[Measures]) -> int:
    """Which has the least sum of ranks over all measures, each the better the larger; equal values share a rank.

    Of those that are equal, the first best by the measure that differs most among all, as a share of its largest.
    """
    names = list(measured[0])
    columns = {name: np.array([measures[name] for measures in measured], dtype=np.float64) for name in names}
    ranks = np.sum([np.unique(-values, return_inverse=True)[1] for values in columns.values()], axis=0)
    tied = np.flatnonzero(ranks == ranks.min())
    span = {name: np.ptp(values) / max(np.abs(values).max(), 1e-300) for name, values in columns.items()}
    decisive = columns[max(names, key=lambda name: span[name])]
    return int(tied[decisive[tied].argmax()])


def grow(
    start: Size, judge: Callable[[Size], Measures], fits: Callable[[Size], bool]
) -> Iterator[tuple[Size, Measures]]:
    """Yields size after size, each grown from the one before it, until none fits.

    judge: measures of a network of this size, each the better the larger. fits: whether a size keeps what limits it.

    Source: Chen et al., Auto-scaling Vision Transformers without Training, 2022, arXiv 2202.11921, section 3.4, by its
    official code: in each step one stage gets a block and the width grows by 5 to 20 %, whichever pair has the best sum
    of ranks by length distortion and the condition of the tangent kernel. Of equal sums, the code takes the least value
    of a measure whether less is better or not; here the better one is taken.
    """
    size = start
    while options := [option for option in growths(size) if fits(option)]:
        measured = [judge(option) for option in options]
        chosen = best(measured)
        size = options[chosen]
        yield size, measured[chosen]
