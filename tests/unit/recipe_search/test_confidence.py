"""How many images tell a drop, and how wide intervals are: against counting and against chance itself."""

import numpy as np
import pytest

from martlet.recipe_search import confidence


@pytest.mark.parametrize("drop_pct", [0.1, 1.0, 5.0, 20.0, 50.0])
def test_the_fewest_images_that_would_show_a_drop(drop_pct: float) -> None:
    n, p = confidence.images_to_tell(drop_pct), 1.0
    for i in range(1, n + 1):
        p *= 1 - drop_pct / 100  # none of i images went wrong
        assert (p <= confidence.MISSED) == (i == n)


def test_no_number_of_images_tells_nothing_from_nothing() -> None:
    for drop_pct in (0.0, 100.0, -1.0):
        with pytest.raises(ValueError, match="between 0 and 100"):
            confidence.images_to_tell(drop_pct)


def covered(interval, truth: float, trials: int = 2000) -> float:
    """How often an interval from a fresh sample holds the truth."""
    rng = np.random.default_rng(0)
    return float(np.mean([low <= truth <= high for _, low, high in (interval(rng) for _ in range(trials))]))


@pytest.mark.parametrize(("lost", "won"), [(0.02, 0.01), (0.05, 0.05), (0.004, 0.0)])
def test_the_interval_of_a_drop_holds_nine_times_of_ten(lost: float, won: float) -> None:
    def interval(rng: np.random.Generator) -> tuple[float, float, float]:
        kind = rng.choice(3, 400, p=[lost, won, 1 - lost - won])
        return confidence.drop(kind != 1, kind != 0)

    assert 0.88 <= covered(interval, 100 * (lost - won)) <= 1.0
    before = np.array([True, True, False, False] * 5)
    after = np.array([True, False, False, False] * 5)
    assert confidence.drop(before, after)[0] == 25.0
    assert confidence.drop(after, before)[0] == -25.0
    same = confidence.drop(before, before)
    assert same[1] < same[0] == 0 < same[2]  # equal on twenty images isn't equal


def test_the_other_intervals_hold_nine_times_of_ten() -> None:
    share = covered(lambda rng: confidence.share_pct(rng.random(100) < 0.03), 3.0)
    mean = covered(lambda rng: confidence.mean(rng.exponential(size=200)), 1.0)
    assert 0.85 <= share <= 0.97
    assert 0.86 <= mean <= 0.93
