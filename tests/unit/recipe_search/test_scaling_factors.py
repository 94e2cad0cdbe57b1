"""The process over factors against its equations, and the way to smaller networks against all steps tried by hand."""

import math
from dataclasses import asdict
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import timm
import torch

from martlet.core.errors import SourceError, UsageError
from martlet.measure.macs import macs_run
from martlet.models.compound import Factors, mobilevitv2
from martlet.recipe_search.scaling.factors import Surrogate, shrink


def points(n: int, seed: int = 0) -> list[dict[str, float]]:
    rng = np.random.default_rng(seed)
    return [
        {"resolution": float(rng.integers(32, 65)), "width": float(rng.uniform(0.25, 1)), "same": 2.0} for _ in range(n)
    ]


def reached(point: dict[str, float]) -> float:
    return 40 + 8 * math.log2(point["width"]) + 3 * math.log2(point["resolution"] / 32) ** 2


def matern(a: np.ndarray, b: np.ndarray, lengths: np.ndarray) -> float:
    """Of order 5/2: (1 + √5 r + 5/3 r²) e^(-√5 r), with r the distance in units of the lengths."""
    r = math.sqrt(sum(((x - y) / length) ** 2 for x, y, length in zip(a, b, lengths, strict=True)))
    return (1 + math.sqrt(5) * r + 5 * r * r / 3) * math.exp(-math.sqrt(5) * r)


def expected(surrogate: Surrogate, known: list[Any], scores: np.ndarray, wanted: list[Any]) -> np.ndarray:
    """k (K + σ²)⁻¹ y, with the kernel that was found, by loops."""
    kernel = surrogate._process.kernel_
    amplitude, lengths, noise = kernel.k1.k1.constant_value, kernel.k1.k2.length_scale, kernel.k2.noise_level
    rows, new = (np.log2([[p["resolution"], p["width"]] for p in each]) for each in (known, wanted))
    gram = np.array([[amplitude * matern(a, b, lengths) for b in rows] for a in rows]) + noise * np.eye(len(rows))
    cross = np.array([[amplitude * matern(a, b, lengths) for b in rows] for a in new])
    mean, std = scores.mean(), scores.std()
    return mean + std * (cross @ np.linalg.solve(gram, (scores - mean) / std))


def test_it_is_the_posterior_of_a_matern_kernel_and_ranks_what_it_hasnt_seen() -> None:
    known, wanted = points(16), points(12, seed=1)
    scores = np.array([reached(p) for p in known]) + np.random.default_rng(2).normal(0, 0.3, 16)
    surrogate = Surrogate(known, scores)
    assert surrogate.names == ["resolution", "width"]
    mean, spread = surrogate(wanted)
    by_hand = expected(surrogate, known, scores, wanted)
    np.testing.assert_allclose(mean, by_hand, rtol=1e-6)
    assert not np.allclose(mean, expected(surrogate, known, scores[::-1], wanted), rtol=1e-3)
    assert np.corrcoef(mean, [reached(p) for p in wanted])[0, 1] > 0.9
    far = {"resolution": 4096.0, "width": 30.0, "same": 2.0}
    assert surrogate([far])[1][0] > 2 * spread.max()
    assert surrogate.score(wanted[0]) == pytest.approx(mean[0])
    with pytest.raises(UsageError, match="three trainings or more, not 2"):
        Surrogate(known[:2], scores[:2])
    with pytest.raises(UsageError, match="these are all of one"):
        Surrogate(known[:1] * 3, scores[:3])


def smaller(point: Any) -> list[dict[str, float]]:
    return [
        {**point, "resolution": point["resolution"] - 1},
        {**point, "width": point["width"] * 0.97},
    ]


def work(point: Any) -> int:
    return round(1e4 * point["resolution"] ** 2 * point["width"] ** 2)


def test_each_step_costs_the_least_for_what_it_saves() -> None:
    start = {"resolution": 64.0, "width": 1.0}
    way = shrink(start, work, 8e6, reached, smaller)
    assert way[0] == start
    assert work(way[-1]) == pytest.approx(8e6, rel=0.03)
    for before, after in pairwise(way[:-1]):
        prices = {
            i: (reached(before) - reached(o)) / math.log2(work(before) / work(o)) for i, o in enumerate(smaller(before))
        }
        assert after == smaller(before)[min(prices, key=prices.__getitem__)]
    assert {p["width"] for p in way} == {1.0}  # the side is cheaper
    narrow = shrink(start, work, 8e6, lambda p: p["resolution"], smaller)
    assert {p["resolution"] for p in narrow} == {64.0}
    # A pixel costs 1 and saves 0.045 octaves, a narrower step costs 1.5 and saves 0.088.
    thrifty = shrink(start, work, 8e6, lambda p: p["resolution"] - 1.5 * math.log(p["width"], 0.97), smaller)
    assert {p["resolution"] for p in thrifty[:-1]} == {64.0}


def test_what_cant_be_reached_is_said() -> None:
    with pytest.raises(UsageError, match=r"10\.2 MMACs can't be shrunk to 20\.0; start from a larger model"):
        shrink({"resolution": 32.0, "width": 1.0}, work, 20e6, reached, smaller)
    with pytest.raises(UsageError, match=r"no step leads from 41\.0 MMACs to 20\.0"):
        shrink({"resolution": 64.0, "width": 1.0}, work, 20e6, reached, lambda p: [])


def params(module: torch.nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


@pytest.mark.parametrize("width", [0.5, 1.0, pytest.param(1.75, marks=pytest.mark.slow)])
def test_published_widths_are_timms_own(width: float) -> None:
    with torch.device("meta"):
        theirs = timm.create_model(f"mobilevitv2_{round(100 * width):03d}")
        assert params(mobilevitv2(Factors(width=width))) == params(theirs)
        deeper = mobilevitv2(Factors(width=width, transformers=2.0, convolutions=2.0))
    assert params(deeper) > 1.5 * params(theirs)


def macs(point: Any) -> int:
    factors = Factors(**point)
    with torch.device("meta"):
        return macs_run(mobilevitv2(factors).eval(), (factors.resolution,) * 2)


@pytest.mark.parametrize(
    "target_mmacs", [1750, *(pytest.param(n, marks=pytest.mark.slow) for n in (1200, 900, 600, 350))]
)
def test_mobilevitv2s_of_requested_macs_are_within_three_per_cent(target_mmacs: int) -> None:
    def score(point: Any) -> float:
        return point["resolution"] / 256 + point["width"] + 0.1 * (point["convolutions"] + point["transformers"])

    start = asdict(Factors())
    way = shrink(start, macs, 1e6 * target_mmacs, score, lambda p: [asdict(f) for f in Factors(**p).smaller()])  # type: ignore[arg-type]
    assert macs(way[-1]) == pytest.approx(1e6 * target_mmacs, rel=0.03)
    with torch.inference_mode():
        its = Factors(**way[-1])  # type: ignore[arg-type]
        assert mobilevitv2(its, num_classes=7).eval()(torch.zeros(1, 3, its.resolution, its.resolution)).shape == (1, 7)


def test_smaller_factors_leave_the_others() -> None:
    for factors in (Factors(), Factors(resolution=33, width=0.3, convolutions=0.4, transformers=0.2)):
        before = asdict(factors)
        changed = [[k for k, v in asdict(f).items() if v != before[k]] for f in factors.smaller()]
        assert all(len(names) == 1 for names in changed)
        assert all(asdict(f)[names[0]] < before[names[0]] for f, names in zip(factors.smaller(), changed, strict=True))
    assert {names[0] for names in (changed)} <= {"width", "resolution", "transformers", "convolutions"}
    with pytest.raises(SourceError, match="positive"):
        Factors(width=0.0)
