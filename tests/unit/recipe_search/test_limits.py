"""Budgets of several limits: who keeps them, what is best, and what is nearest where nothing does."""

import pytest

from martlet.core.errors import UsageError
from martlet.recipe_search.confidence import Z
from martlet.recipe_search.limits import Limits


def point(ms: float, drop: float, mb: float = 5.0, error: float = 0.1) -> dict[str, float]:
    high = drop + Z * error
    return {"latency_ms": ms, "drop_pct": drop, "drop_high_pct": high, "kl": drop / 10, "file_bytes": mb * 1e6}


SLOW, MIDDLE, FAST = point(9, 0.1), point(7, 0.7), point(5, 2.0, 3.0)
ALL = (SLOW, MIDDLE, FAST)


def test_of_those_within_a_drop_the_fastest_and_of_those_within_a_time_the_most_faithful() -> None:
    assert Limits(max_drop=1.0).best(ALL) is MIDDLE
    assert Limits(max_drop=3.0).best(ALL) is FAST
    assert Limits(latency_ms=8.0).best(ALL) is MIDDLE
    assert Limits(size_mb=4.0).best(ALL) is FAST
    assert Limits(max_drop=1.0, latency_ms=10.0).best(ALL) is SLOW
    assert Limits(max_drop=1.0, latency_ms=6.0).best(ALL) is None


def test_a_drop_that_chance_may_have_kept_comes_second() -> None:
    risky = point(6, 0.95)
    assert Limits(max_drop=1.0).best([*ALL, risky]) is MIDDLE
    assert Limits(max_drop=1.0).best([risky]) is risky
    assert Limits(max_drop=1.0).best([*ALL, point(6, 0.85)]) is not MIDDLE


def test_the_nearest_is_least_past_all_limits_together() -> None:
    assert Limits(max_drop=1.0, latency_ms=6.0).nearest(ALL) is MIDDLE
    assert Limits(max_drop=1.0, latency_ms=5.0).nearest([SLOW, FAST]) is SLOW
    assert Limits(latency_ms=1.0).nearest(ALL) is FAST


def test_why_nothing_keeps_it() -> None:
    assert Limits(latency_ms=1.0).why_not(ALL) == "nothing measured keeps the latency"
    assert Limits(latency_ms=1.0, size_mb=1.0).why_not(ALL) == "nothing measured keeps the latency or the size"
    assert Limits(max_drop=0.5, latency_ms=6.0).why_not(ALL) == "each limit can be kept, but not all together"
    assert str(Limits(max_drop=1.0, latency_ms=8.0, size_mb=6.0)) == "a drop of 1 points and 8 ms and 6 MB"


@pytest.mark.parametrize(
    "limits", [{}, {"max_drop": 0.0}, {"max_drop": 100.0}, {"latency_ms": 0.0}, {"size_mb": float("inf")}]
)
def test_budgets_that_are_none(limits: dict[str, float]) -> None:
    with pytest.raises(UsageError):
        Limits(**limits).check()
    Limits(max_drop=1.0, latency_ms=2.0, size_mb=3.0).check()
