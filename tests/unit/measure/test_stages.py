"""Images to time that leave as all do, and what is told of where they left."""

from types import SimpleNamespace

import numpy as np
import pytest

from martlet.engine.staged import Step
from martlet.measure.accuracy import Logits
from martlet.measure.stages import shares, spread


@pytest.mark.parametrize("n", [4, 10, 50])
def test_a_sample_leaves_as_all_do(n):
    exits = np.random.default_rng(0).permutation(np.repeat([0, 1, 2], [50, 30, 20]))
    chosen = spread(exits, n)
    assert len(set(chosen.tolist())) == n
    assert abs(np.bincount(exits[chosen], minlength=3) / n - [0.5, 0.3, 0.2]).max() <= 0.5 / n + 1e-9


def test_a_sample_of_more_than_there_are_is_all():
    assert spread(np.array([1, 0, 1]), 8).tolist() == [0, 1, 2]


def test_shares_and_who_is_right_of_those_that_left_there():
    steps = [Step(f"stage{k}", (), (), 0.0, 1.0, macs * 10**9) for k, macs in ((1, 1), (2, 3), (3, 4))]
    session = SimpleNamespace(steps=steps)
    values = np.eye(3, dtype=np.float32)[[0, 1, 2, 0]]
    found = Logits({"it": values}, [0, 2, 2, 0], ["a", "b", "c", "d"], {"it": np.array([0, 0, 2, 0])})
    told = shares(session, found, "it")  # type: ignore[arg-type]
    assert [each["share_pct"] for each in told] == [75.0, 0.0, 25.0]
    assert [each["gmacs"] for each in told] == [1.0, 3.0, 4.0]
    assert told[0]["top1_pct"] == pytest.approx(200 / 3)
    assert told[1]["top1_pct"] is None
    assert told[2]["top1_pct"] == 100.0
