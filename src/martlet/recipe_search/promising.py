"""Which of what was screened is worth compressing for good and measuring on the engine."""

from __future__ import annotations

from collections.abc import Sequence

from martlet.recipe_search.limits import Limits, Values
from martlet.recipe_search.space import front


def promising(fresh: Sequence[Values], measured: Sequence[Values], limits: Limits, n: int) -> list[Values]:
    """Of those not measured, at most n of the front of all: the best within the limits, then where the gap is widest.

    Predictions and measurements stand beside each other as they are.
    """
    ms, kl = (lambda v: v["latency_ms"]), (lambda v: v["kl"])
    best = front([*fresh, *measured], ms, kl)
    open_ = [entry for entry in best if any(entry is other for other in fresh)]
    chosen: list[Values] = []
    while open_ and len(chosen) < n:
        kept = [entry for entry in open_ if limits.keeps(entry)]
        if chosen:
            pick = max(open_, key=lambda entry: _gap(entry, best))
        else:
            pick = min(kept, key=limits.price) if kept else limits.nearest(open_)
        chosen.append(pick)
        open_ = [entry for entry in open_ if entry is not pick]
    return chosen


def _gap(entry: Values, best: Sequence[Values]) -> float:
    """How much of the front's box this member alone dominates, a share of it."""
    i = next(i for i, other in enumerate(best) if other is entry)
    if i in (0, len(best) - 1):
        return 1.0
    return (best[i + 1]["latency_ms"] / entry["latency_ms"] - 1) * (best[i - 1]["kl"] - entry["kl"])
