"""The search for a smoothing factor against plain Python in float64; and that a fault would show.

Lin et al., AWQ, 2023, arXiv 2306.00978, section 3.2: the exponent that gives the product the least error, over the
factors of Xiao et al., SmoothQuant, 2023, arXiv 2211.10438, equation 4.
"""

import math
from collections.abc import Callable, Sequence

import pytest
import torch

from martlet.functional.quantize.smoothing import ALPHAS, Smoothing, search_smoothing

Rows = list[list[float]]


def oracle_round(x: float, scale: float, zero: int, least: int, most: int) -> float:
    return (min(max(round(x / scale) + zero, least), most) - zero) * scale


def oracle_factors(reaches: Sequence[float], weight: Rows, alpha: float) -> list[float]:
    columns = [max(abs(row[j]) for row in weight) for j in range(len(reaches))]
    factors = [a**alpha / w ** (1 - alpha) for a, w in zip(reaches, columns, strict=True)]
    mean = math.prod(factors) ** (1 / len(factors))
    return [factor / mean for factor in factors]


def oracle_error(
    rows: Rows, low: list[float], high: list[float], weight: Rows, importance: Rows, factors: list[float]
) -> float:
    """Weighted squared error of rows @ weightᵀ, inputs on one u8 grid and weights on one s8 grid a row."""
    least = min(0.0, *(value / factor for value, factor in zip(low, factors, strict=True)))
    most = max(0.0, *(value / factor for value, factor in zip(high, factors, strict=True)))
    scale = (most - least) / 255
    zero = min(max(round(-least / scale), 0), 255)
    total = 0.0
    scaled = [[w * factor for w, factor in zip(row, factors, strict=True)] for row in weight]
    steps = [max(abs(w) for w in row) / 127 for row in scaled]
    rounded = [[oracle_round(w, step, 0, -127, 127) for w in row] for row, step in zip(scaled, steps, strict=True)]
    for r, row in enumerate(rows):
        given = [oracle_round(x / factor, scale, zero, 0, 255) for x, factor in zip(row, factors, strict=True)]
        for o, plain in enumerate(weight):
            exact = sum(x * w for x, w in zip(row, plain, strict=True))
            error = sum(x * w for x, w in zip(given, rounded[o], strict=True)) - exact
            total += error**2 * importance[r][o]
    return total


Case = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]


def case(seed: int) -> Case:
    """Rows with an outlier channel, whose range over all images is wider still."""
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(12, 6, generator=generator)
    rows[:, seed % 6] *= 3.0 ** (seed % 4)
    wide = 1 + torch.rand(6, generator=generator)
    weight = torch.randn(5, 6, generator=generator)
    weight[:, (seed + 2) % 6] *= 2.0 ** (seed % 5)
    importance = torch.rand(12, 5, generator=generator) ** 4 * 10
    return rows, rows.amin(0) * wide, rows.amax(0) * wide, weight, importance


def assert_finds_the_best(function: Callable[..., Smoothing]) -> None:
    chosen = set()
    for seed in range(24):
        given = case(seed)
        found, (_, low, high, *_) = function(*given), given
        exact = [tensor.double().tolist() for tensor in given]
        reaches = torch.maximum(-low, high).double().tolist()
        errors: dict[float | None, float] = {None: oracle_error(*exact, [1.0] * 6)}
        factors: dict[float | None, list[float]] = {None: [1.0] * 6}
        for alpha in ALPHAS:
            factors[alpha] = oracle_factors(reaches, exact[3], alpha)
            errors[alpha] = oracle_error(*exact, factors[alpha])
        best = min(errors, key=lambda alpha: errors[alpha])
        assert errors[found.alpha] <= errors[best] * (1 + 1e-3)  # a half may round otherwise in float32
        assert found.factors.tolist() == pytest.approx(factors[found.alpha], rel=1e-5)
        assert found.gain_db == pytest.approx(10 * math.log10(errors[None] / errors[found.alpha]), abs=0.02)
        chosen.add(found.alpha)
    assert len(chosen) >= 3


def test_the_exponent_with_the_least_error_is_found():
    assert_finds_the_best(search_smoothing)


@pytest.mark.parametrize(
    "fault",
    [
        lambda x, low, high, w, i: search_smoothing(
            x, x.amin(0), x.amax(0), w, i
        ),  # the samples' range for all images'
        lambda x, low, high, w, i: search_smoothing(x, low, high, w, torch.ones_like(i)),
        lambda x, low, high, w, i: search_smoothing(x, low, high, w.flip(0), i),
        lambda x, low, high, w, i: search_smoothing(x, low, high, w, i, ALPHAS[1:2]),
        lambda x, low, high, w, i: Smoothing(None, torch.ones(6), 0.0),
    ],
)
def test_a_fault_in_the_search_shows(fault):
    with pytest.raises(AssertionError):
        assert_finds_the_best(fault)


def test_what_gains_nothing_is_left_as_it_is():
    rows = torch.linspace(-1, 1, 36).reshape(6, 6)
    even = torch.ones(6)
    found = search_smoothing(rows, -even, even, torch.ones(2, 6), torch.ones(6, 2))
    assert (found.alpha, found.factors.tolist(), found.gain_db) == (None, [1.0] * 6, 0.0)
