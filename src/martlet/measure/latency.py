"""Latency and throughput: warm, interleaved, with their spread."""

from __future__ import annotations

import contextlib
import gc
import time
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING

import numpy as np

from martlet.core.report import Latency, Ratio, Throughput
from martlet.core.technique import Progress, silent

if TYPE_CHECKING:
    from martlet.engine.base import Session

MIN_ROUNDS = 30
WARM_UP, WARM_UP_SECONDS = 5, 2.0
"""Calls before any is timed; fewer, once they took so long: long calls are warm after the first."""
RESAMPLES = 2000


def interleave(
    runs: Mapping[str, Callable[[], object]],
    *,
    seed: int = 0,
    min_seconds: float = 3.0,
    max_seconds: float = 60.0,
    max_rounds: int = 1000,
    fewest: int = 5,
    progress: Progress = silent,
) -> dict[str, np.ndarray]:
    """Times every run once a round, in a new random order each round, so that all see the same minutes.

    Goes on until `min_seconds` are spent and MIN_ROUNDS rounds are done, or `max_seconds` or `max_rounds` are reached;
    `fewest` rounds at least, however long they take. Returns milliseconds by name, one a round: the i-th of each
    belong together.
    """
    rng = np.random.default_rng(seed)
    names = list(runs)
    times: dict[str, list[int]] = {name: [] for name in names}  # nanoseconds
    with _no_garbage_collection():
        for name in names:
            start = time.perf_counter()
            for _ in range(WARM_UP):
                runs[name]()
                if time.perf_counter() - start > WARM_UP_SECONDS:
                    break
        start = time.perf_counter()
        for done in range(1, max_rounds + 1):
            for i in rng.permutation(len(names)):
                before = time.perf_counter_ns()
                runs[names[i]]()
                times[names[i]].append(time.perf_counter_ns() - before)
            spent = time.perf_counter() - start
            progress("time", min(int(1000 * spent), int(1000 * min_seconds)), int(1000 * min_seconds))
            if done >= fewest and (spent >= max_seconds or (spent >= min_seconds and done >= MIN_ROUNDS)):
                break
    return {name: np.array(values) / 1e6 for name, values in times.items()}


def summary(ms: np.ndarray) -> Latency:
    """Median, 5th and 95th percentile of the milliseconds, and how many there are."""
    p05, median, p95 = np.percentile(ms, [5, 50, 95])
    return {"median": float(median), "p05": float(p05), "p95": float(p95), "n": len(ms)}


def ratio(baseline_ms: np.ndarray, ms: np.ndarray, seed: int = 0) -> Ratio:
    """How many times faster than the baseline: the median over rounds of baseline time over time.

    low, high: the 5th and 95th percentile of that median over RESAMPLES bootstrap samples of the rounds (with
    replacement, both times of a round together): its 90 % interval.

    Raises:
        ValueError: not the same rounds.
    """
    if len(baseline_ms) != len(ms):
        raise ValueError(f"a paired ratio needs the same rounds, not {len(baseline_ms)} and {len(ms)}")
    ratios = baseline_ms / ms
    samples = np.random.default_rng(seed).choice(ratios, size=(RESAMPLES, len(ratios)))
    low, high = np.percentile(np.median(samples, axis=1), [5, 95])
    return {"median": float(np.median(ratios)), "low": float(low), "high": float(high)}


def throughput(
    open_session: Callable[[int], Session],
    size: tuple[int, int],
    progress: Progress = silent,
    batches: tuple[int, ...] = (1, 8, 32),
    seconds: float = 1.0,
    images: np.ndarray | None = None,
) -> list[Throughput]:
    """Images a second at each batch size, from the median time of a call; each timed for `seconds`, 3 calls at least.

    size: (H, W) of the images. images: (N, 3, H, W), of which each call takes the next, all at least once, so that the
    mean time counts; zeros, if not given.
    """
    found: list[Throughput] = []
    for i, batch in enumerate(batches):
        progress("throughput", i, len(batches))
        session = open_session(batch)
        pool = np.zeros((1, 3, *size), dtype=np.float32) if images is None else images
        given = [pool[(np.arange(batch) + k * batch) % len(pool)] for k in range(-(-len(pool) // batch))]
        session(given[0])
        times: list[int] = []  # nanoseconds
        with _no_garbage_collection():
            start = time.perf_counter()
            while len(times) < max(3, len(given)) or time.perf_counter() - start < seconds:
                called = given[len(times) % len(given)]
                before = time.perf_counter_ns()
                session(called)
                times.append(time.perf_counter_ns() - before)
        middle = np.median if images is None else np.mean  # calls differ in what they compute
        found.append({"batch": batch, "images_per_s": batch / (float(middle(times)) / 1e9)})
    progress("throughput", len(batches), len(batches))
    return found


@contextlib.contextmanager
def _no_garbage_collection() -> Iterator[None]:
    was = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        if was:
            gc.enable()
