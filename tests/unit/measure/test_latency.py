import gc
import time

import numpy as np
import pytest

from martlet.measure.latency import interleave, ratio, summary, throughput


def test_every_round_runs_each_once_in_changing_order():
    order: list[str] = []
    runs = {name: (lambda name=name: order.append(name)) for name in "abc"}
    times = interleave(runs, min_seconds=0, max_rounds=40, seed=1)
    timed = order[15:]  # after five warm-up calls of each
    rounds = [tuple(timed[i : i + 3]) for i in range(0, len(timed), 3)]
    assert {len(values) for values in times.values()} == {30} == {len(rounds)}
    assert all(sorted(r) == ["a", "b", "c"] for r in rounds)
    assert len(set(rounds)) > 1
    order.clear()
    interleave(runs, min_seconds=0, max_rounds=40, seed=1)
    assert order[15:] == timed  # seeded


def test_milliseconds_of_a_known_wait():
    times = interleave({"wait": lambda: time.sleep(0.02), "none": lambda: None}, min_seconds=0, max_rounds=6)
    assert len(times["wait"]) == 6
    assert times["wait"].min() >= 20
    assert times["none"].min() < 1


def test_stops_at_the_time_that_is_given():
    start = time.perf_counter()
    times = interleave({"wait": lambda: time.sleep(0.02)}, min_seconds=0.1, max_seconds=0.2)
    assert time.perf_counter() - start < 2
    assert 5 <= len(times["wait"]) <= 12


@pytest.mark.parametrize(("seconds", "calls"), [(0.0, 1), (60.0, 5)])
def test_long_calls_are_warmed_up_less_often(monkeypatch, seconds, calls):
    monkeypatch.setattr("martlet.measure.latency.WARM_UP_SECONDS", seconds)
    made = []
    times = interleave({"a": lambda: made.append(0)}, min_seconds=0, max_rounds=7)
    assert len(times["a"]) == 7
    assert len(made) == calls + 7


def test_garbage_collection_is_off_only_while_timing():
    states: list[bool] = []
    interleave({"a": lambda: states.append(gc.isenabled())}, min_seconds=0, max_rounds=5)
    assert not any(states)
    assert gc.isenabled()
    with pytest.raises(ZeroDivisionError):
        interleave({"a": lambda: 1 / 0})
    assert gc.isenabled()


def test_progress_reaches_its_total():
    seen: list[tuple[int, int]] = []
    runs = {"a": lambda: time.sleep(0.01)}
    interleave(runs, min_seconds=0.3, progress=lambda what, done, total: seen.append((done, total)))
    assert seen[-1] == (300, 300)
    assert seen == sorted(seen)


def test_summary_of_a_known_sample():
    assert summary(np.arange(101.0)) == {"median": 50, "p05": 5, "p95": 95, "n": 101}


def test_ratio_is_paired():
    rng = np.random.default_rng(0)
    drift = np.exp(rng.standard_normal(200))  # the machine's mood, the same for both of a round
    found = ratio(30 * drift, 10 * drift)
    assert found["median"] == pytest.approx(3)
    assert found["high"] - found["low"] < 1e-9


def test_interval_covers_the_truth_nine_times_in_ten():
    rng = np.random.default_rng(0)
    covered = 0
    for i in range(200):
        found = ratio(2 * np.exp(0.1 * rng.standard_normal(41)), np.ones(41), seed=i)
        assert found["low"] <= found["median"] <= found["high"]
        covered += found["low"] <= 2 <= found["high"]
    assert 165 <= covered <= 195  # 90 % of 200 is 180


def test_ratio_refuses_other_rounds():
    with pytest.raises(ValueError, match="same rounds, not 3 and 4"):
        ratio(np.ones(3), np.ones(4))


class Sleeping:
    threads = 1

    def __init__(self, batch: int) -> None:
        self.batch = batch

    def __call__(self, images: np.ndarray) -> np.ndarray:
        assert images.shape == (self.batch, 3, 2, 5)
        time.sleep(0.02)
        return images[:, 0, 0]

    def profile(self, images, repeats=10):
        raise AssertionError("not to be profiled")


def test_throughput_counts_images():
    found = throughput(Sleeping, (2, 5), batches=(1, 4), seconds=0.1)  # type: ignore[arg-type]
    assert [item["batch"] for item in found] == [1, 4]
    assert 10 < found[0]["images_per_s"] <= 50
    assert 40 < found[1]["images_per_s"] <= 200
