"""A budget of several limits at once, who keeps it, and what is best or nearest."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from martlet.core.errors import UsageError
from martlet.recipe_search.confidence import Z

FAR = 2.0
"""Times the drop that is allowed: what loses more than that isn't drawn from."""
Values = Mapping[str, Any]
"""Of a point: `drop_pct`, `latency_ms`, `file_bytes`, and `drop_high_pct`, the upper end of its interval."""


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What may be lost, taken and weighed at most; None is no limit."""

    max_drop: float | None = None
    latency_ms: float | None = None
    size_mb: float | None = None

    def check(self) -> None:
        """Raises:
        UsageError: no limit, or one that nothing can keep.
        """
        if self.max_drop is None and self.latency_ms is None and self.size_mb is None:
            raise UsageError("a search needs a budget: --max-drop in points, --latency-ms or --size-mb, or several")
        if self.max_drop is not None and not 0 < self.max_drop < 100:
            raise UsageError(
                f"--max-drop is between 0 and 100 points, not {self.max_drop:g}: no number of images can tell a drop "
                "of 0 from a small one"
            )
        for option, value in (("--latency-ms", self.latency_ms), ("--size-mb", self.size_mb)):
            if value is not None and not 0 < value < math.inf:
                raise UsageError(f"{option} is a positive number, not {value:g}; nothing could keep it")

    @property
    def far(self) -> float:
        """Points of top-1 beyond which nothing is drawn from; infinite where the drop has no limit."""
        return math.inf if self.max_drop is None else FAR * self.max_drop

    def over(self, values: Values, sure: bool = False) -> dict[str, float]:
        """By limit, how far past it, as a share of it; negative is within.

        sure: one standard error is added to the drop, so that chance in few images doesn't decide (Breiman's rule).
        """
        drop_pct = values["drop_pct"]
        if sure:
            drop_pct += (values["drop_high_pct"] - drop_pct) / Z
        pairs = {
            "drop": (drop_pct, self.max_drop),
            "latency": (values["latency_ms"], self.latency_ms),
            "size": (values["file_bytes"] / 1e6, self.size_mb),
        }
        return {name: value / limit - 1 for name, (value, limit) in pairs.items() if limit is not None}

    def keeps(self, values: Values, sure: bool = False) -> bool:
        return all(excess <= 1e-9 for excess in self.over(values, sure).values())

    def price(self, values: Values) -> tuple[float, float]:
        """What is to be small of those that keep it: the latency where only the drop is limited, else the loss."""
        ms, kl = values["latency_ms"], values["kl"]
        return (ms, kl) if self.max_drop is not None and self.latency_ms is None else (kl, ms)

    def best(self, points: Iterable[Values]) -> Values | None:
        """The best that keeps it for sure, else the best that keeps it, else None."""
        points = list(points)
        for sure in (True, False):
            if kept := [values for values in points if self.keeps(values, sure)]:
                return min(kept, key=self.price)
        return None

    def nearest(self, points: Iterable[Values]) -> Values:
        """The one that is least past the limits, by the sum of the shares."""
        return min(points, key=lambda v: (self.excess(v), self.price(v)))

    def excess(self, values: Values) -> float:
        """How far past all limits, as the sum of the shares."""
        return sum(max(0.0, share) for share in self.over(values).values())

    def why_not(self, points: Iterable[Values]) -> str:
        """Whether no point keeps one of the limits, or each is kept and not all together."""
        overs = [self.over(values) for values in points]
        alone = [name for name in overs[0] if all(over[name] > 0 for over in overs)]
        if alone:
            return f"nothing measured keeps the {' or the '.join(alone)}"
        return "each limit can be kept, but not all together"

    def __str__(self) -> str:
        parts = [
            *([f"a drop of {self.max_drop:g} points"] if self.max_drop is not None else []),
            *([f"{self.latency_ms:g} ms"] if self.latency_ms is not None else []),
            *([f"{self.size_mb:g} MB"] if self.size_mb is not None else []),
        ]
        return " and ".join(parts)
