"""Latency from work: an engine that is as assumed is told exactly, and one that isn't, nearly."""

import numpy as np
import pytest

from martlet.recipe_search.predict import Clock, features

RATE = {"f32": 9e-9, "bf16": 5e-9, "int8": 2e-9}
"""Milliseconds a MAC of an imagined engine."""


def work(precision: str, floating: float, integer: float) -> dict[str, object]:
    return {"precision": precision, "float_macs": floating, "integer_macs": integer}


def call_ms(its: dict) -> float:
    return 0.7 + RATE[its["precision"]] * its["float_macs"] + RATE["int8"] * its["integer_macs"]


KNOWN = [work("f32", 1e9, 0), work("bf16", 1e9, 0), work("bf16", 1e7, 1e9), work("f32", 5e8, 1e8), work("bf16", 4e8, 0)]


def test_what_was_timed_tells_the_rest() -> None:
    clock = Clock((its, call_ms(its)) for its in KNOWN)
    for its in (work("f32", 3e8, 3e8), work("bf16", 2e7, 4e8), work("bf16", 0, 6e8)):
        assert clock.latency_ms(its) == pytest.approx(call_ms(its), rel=0.02)
    wrong = Clock((its, 10 - call_ms(its)) for its in KNOWN)
    assert wrong.latency_ms(KNOWN[0]) != pytest.approx(call_ms(KNOWN[0]), rel=0.2)


def test_more_work_is_never_faster_whatever_the_noise() -> None:
    rng = np.random.default_rng(0)
    for _ in range(20):
        clock = Clock((its, call_ms(its) * rng.lognormal(0, 0.3)) for its in KNOWN)
        less, more = (clock.latency_ms(work("bf16", 1e8, macs)) for macs in (1e8, 9e8))
        assert 0 < less <= more


def test_noise_of_models_that_work_alike_does_not_make_work_free() -> None:
    """Of two in bf16 the one with a little less work was timed as a little slower; as those of a ViT-Ti were."""
    timed = [(work("f32", 1.254e9, 0), 15.3), (work("bf16", 1.254e9, 0), 6.50), (work("bf16", 1.174e9, 0), 6.93)]
    clock = Clock(timed)
    half, whole = (clock.latency_ms(work("bf16", macs, 0)) for macs in (0.627e9, 1.254e9))
    assert half < 0.7 * whole
    told = Clock([*timed, (work("bf16", 0.627e9, 0), 5.3)])  # where a model with half of the work says otherwise
    assert told.latency_ms(work("bf16", 0.627e9, 0)) > 0.7 * told.latency_ms(work("bf16", 1.254e9, 0))


def test_one_model_is_enough_to_begin_with() -> None:
    clock = Clock([(KNOWN[0], call_ms(KNOWN[0]))])
    assert clock.latency_ms(KNOWN[0]) == pytest.approx(call_ms(KNOWN[0]), rel=0.01)
    assert clock.latency_ms(work("f32", 5e8, 0)) < clock.latency_ms(KNOWN[0])
    assert features(KNOWN[2]).tolist() == [1.0, 0.0, 1e7, 0.0, 1e9]
