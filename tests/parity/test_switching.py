"""Switching between two models on a stream against plain Python: which runs on each frame, and the threshold for a
budget; that the session does the same; and that a fault would show.

Motetti et al., 2024, arXiv 2401.15236, the policy by temporal consistency.
"""

import math

import numpy as np
import pytest

from martlet.core.errors import UsageError
from martlet.engine.base import Session
from martlet.engine.stream import Stream
from martlet.functional import switching

COSTS = (1.0, 5.0)


def sample(count: int = 120, seed: int = 0):
    """Two streams in which what moves fast is hard for the small model alone."""
    rng = np.random.default_rng(seed)
    fast = (np.arange(count) // 10) % 3 == 0
    wanted = np.cumsum(rng.normal(size=(count, 2)) * np.where(fast, 3.0, 0.1)[:, None], 0)
    big = wanted + 0.2 * rng.normal(size=wanted.shape)
    small = wanted + np.where(fast, 2.0, 0.2)[:, None] * rng.normal(size=wanted.shape)
    return small, big, wanted, np.arange(count) % 60 == 0


def oracle(small, big, starts, threshold) -> list[bool]:
    """Frame by frame, with what was given kept in a list."""
    ran, given = [], []
    for t in range(len(big)):
        if starts[t]:
            given = []
        steady = len(given) >= 2 and sum(abs(a - b) for a, b in zip(given[-1], given[-2], strict=True)) < threshold
        ran.append(not steady)
        given.append((small if steady else big)[t].tolist())
    return ran


@pytest.mark.parametrize("threshold", [0.0, 0.5, 1.5, 4.0, math.inf])
def test_which_model_runs(threshold):
    small, big, _, starts = sample()
    found = switching.switched(small, big, starts, threshold).tolist()
    assert found == oracle(small, big, starts, threshold)
    assert sum(found) == {0.0: 120, math.inf: 4}.get(threshold, sum(found))
    if threshold == 1.5:
        assert 4 < sum(found) < 120
        # by what the big model would have given, and not by what was given, others would run
        always = [t < 2 or bool(np.abs(big[t - 1] - big[t - 2]).sum() >= threshold) for t in range(120)]
        assert found != always


def test_a_threshold_for_an_error_or_a_cost():
    small, big, wanted, starts = sample()
    found = switching.tried(small, big, wanted, starts, COSTS)
    assert (found[0].big_share, found[0].cost) == (1.0, 5.0)
    assert found[0].error == pytest.approx(sum(abs(v) for v in (big - wanted).ravel()) / big.size)
    for each in found[:: len(found) // 5]:
        ran = oracle(small, big, starts, each.threshold)
        outputs = [(big if r else small)[t] for t, r in enumerate(ran)]
        error = sum(abs(a - b) for o, w in zip(outputs, wanted, strict=True) for a, b in zip(o, w, strict=True))
        assert each.error == pytest.approx(error / wanted.size)
        assert each.cost == pytest.approx(sum(COSTS[r] for r in ran) / len(ran))
    cheap = switching.cheapest(found, found[0].error * 1.3)
    assert cheap is not None
    assert cheap.cost == min(each.cost for each in found if each.error <= found[0].error * 1.3) < 4.0
    within = switching.best(found, 3.0)
    assert within is not None
    assert within.error == min(each.error for each in found if each.cost <= 3.0)
    assert switching.cheapest(found, 0.0) is None
    assert switching.best(found, 0.5) is None


def test_it_beats_switching_at_random():
    small, big, wanted, starts = sample(1200)
    chosen = switching.best(switching.tried(small, big, wanted, starts, COSTS), 3.5)
    assert chosen is not None
    rng = np.random.default_rng(3)
    random = np.where((rng.random(1200) < chosen.big_share)[:, None], big, small)
    assert chosen.error < 0.9 * np.abs(random - wanted).mean()


class Table(Session):
    """Gives the rows of a table, one after the other."""

    def __init__(self, rows: np.ndarray, batch: int = 1) -> None:
        self.rows, self.batch, self.threads, self.clock = rows, batch, 1, 0

    def run(self, inputs):
        return [self.rows[int(inputs[0].ravel()[0])][None].astype(np.float32)]

    def profile(self, images, repeats: int = 10):
        return []


def test_a_session_of_a_stream_does_the_same():
    small, big, _, starts = sample()
    small, big = small.astype(np.float32), big.astype(np.float32)
    stream = Stream(Table(small), Table(big), 1.5)
    ran = []
    for t in range(120):
        if starts[t]:
            stream.restart()
        found = stream(np.full((1, 3, 1, 1), t, np.float32))
        ran.append(stream.big_ran)
        assert np.array_equal(found[0], (big if stream.big_ran else small)[t])
    assert ran == oracle(small, big, starts, 1.5)


def test_what_a_stream_cannot_be():
    table = np.zeros((2, 2))
    with pytest.raises(UsageError, match="one frame at a time, not batches of 4 and 1; open with batch=1"):
        Stream(Table(table, 4), Table(table), 1.0)
    with pytest.raises(UsageError, match=r"the threshold of a stream is -1\.0; it can't be less than 0"):
        Stream(Table(table), Table(table), -1.0)
    with pytest.raises(UsageError, match="a stream is of two models"):
        Stream.of(Table(table), 1.0)
