"""Splitting outlier channels against plain Python in float64, written from its definition; and that a fault would show.

Zhao et al., Improving Neural Network Quantization without Retraining using Outlier Channel Splitting, 2019,
arXiv 1901.09504, section 3: the channel that reaches furthest is split, again and again.
"""

import itertools
import math
from collections.abc import Callable, Iterator, Sequence

import pytest
import torch

from martlet.functional.quantize.splitting import Split, split_counts

EXTRA = (2, 4)
CASES = range(60)


def oracle_error(low: Sequence[float], high: Sequence[float], importance: Sequence[float], n: Sequence[int]) -> float:
    """Expected squared error of the products: n parts of a channel each err by step² / 12, all n alike."""
    least = min(0.0, *(value / parts for value, parts in zip(low, n, strict=True)))
    most = max(0.0, *(value / parts for value, parts in zip(high, n, strict=True)))
    step = (most - least) / 255
    return sum(i * parts**2 * step**2 / 12 for i, parts in zip(importance, n, strict=True))


def reach(low: Sequence[float], high: Sequence[float], n: Sequence[int]) -> float:
    """How far from zero the widest part reaches."""
    return max(max(-a, b, 0.0) / parts for a, b, parts in zip(low, high, n, strict=True))


def divisions(channels: int, extra: int) -> Iterator[list[int]]:
    """Every way to add `extra` parts."""
    for added in itertools.product(range(extra + 1), repeat=channels):
        if sum(added) == extra:
            yield [1 + parts for parts in added]


def halves(reaches: list[float], extra: int) -> float:
    """How far the widest channel reaches after the paper's splits: the widest is replaced by two halves."""
    reaches = list(reaches)
    for _ in range(extra):
        widest = reaches.pop(reaches.index(max(reaches)))
        reaches += [widest / 2, widest / 2]
    return max(reaches)


def case(seed: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """low, high and importance of five channels, one with outliers; every other as a GELU gives them."""
    generator = torch.Generator().manual_seed(seed)
    high = torch.rand(5, generator=generator) * torch.tensor([1.0, 1.0, 1.0, 4.0, 10.0])
    low = -torch.rand(5, generator=generator) * (high if seed % 2 else torch.full((5,), 0.17))
    return low, high, torch.rand(5, generator=generator) ** (seed % 3)


def assert_splits_the_widest(function: Callable[..., Split]) -> None:
    """No other division of as many parts reaches less far, and of the numbers allowed the best is taken."""
    split = 0
    for seed in CASES:
        low, high, importance = case(seed)
        found = function(low, high, importance, EXTRA)
        lows, highs, weights, counts = low.tolist(), high.tolist(), importance.tolist(), found.counts.tolist()
        added = sum(counts) - len(counts)
        assert added in (0, *EXTRA)
        assert min(counts) >= 1
        narrowest = min(reach(lows, highs, n) for n in divisions(5, added))
        assert reach(lows, highs, counts) == pytest.approx(narrowest, rel=1e-6)
        assert narrowest <= halves([max(-a, b) for a, b in zip(lows, highs, strict=True)], added) * (1 + 1e-6)
        plain = oracle_error(lows, highs, weights, [1] * 5)
        error = oracle_error(lows, highs, weights, counts)
        assert found.gain_db == pytest.approx(10 * math.log10(plain / error), abs=1e-4)
        for extra in EXTRA:
            rival = [n for n in divisions(5, extra) if reach(lows, highs, n) <= reach(lows, highs, counts) * 0.999]
            rival = [n for n in rival if reach(lows, highs, n) == min(reach(lows, highs, m) for m in rival)]
            assert not rival or error <= max(oracle_error(lows, highs, weights, n) for n in rival) * (1 + 1e-6)
        split += added > 0
    assert split > 0.9 * len(CASES)


def test_the_widest_is_split_and_as_often_as_pays():
    assert_splits_the_widest(split_counts)


@pytest.mark.parametrize(
    "fault",
    [
        lambda low, high, importance, extra: split_counts(low, high, importance, (extra[0] + 1,)),  # another number
        lambda low, high, importance, extra: split_counts(torch.zeros_like(low), high, importance, extra),
        lambda low, high, importance, extra: split_counts(low, high * high, importance, extra),
        lambda low, high, importance, extra: split_counts(low, high, importance, extra[:1]),
        lambda low, high, importance, extra: split_counts(low, high, torch.ones(5), extra),
        lambda low, high, importance, extra: Split(torch.ones(5, dtype=torch.long), 0.0),
        lambda low, high, importance, extra: Split(split_counts(low, high, importance, extra).counts, 3.0),
    ],
)
def test_a_fault_in_the_split_shows(fault):
    with pytest.raises(AssertionError):
        assert_splits_the_widest(fault)


def test_it_comes_near_the_best_of_all_divisions():
    """Splitting the widest is a rule of thumb where importance differs: mostly it is the best, and 2 dB off at most."""
    lost = []
    for seed in CASES:
        low, high, importance = case(seed)
        found = split_counts(low, high, importance, EXTRA).counts.tolist()
        rest = (low.tolist(), high.tolist(), importance.tolist())
        best = min(oracle_error(*rest, n) for extra in (0, *EXTRA) for n in divisions(5, extra))
        lost.append(10 * math.log10(oracle_error(*rest, found) / best))
    assert max(lost) < 2.2
    assert sum(db < 1e-5 for db in lost) > 0.6 * len(lost)


def rounded_products_error(x: torch.Tensor, weight: torch.Tensor, counts: torch.Tensor) -> float:
    """Mean squared error of x wᵀ when x (R, C), split into `counts` parts, is rounded to one grid of 256 levels."""
    parts = (x / counts).repeat_interleave(counts, 1)
    low, high = min(float(parts.min()), 0.0), max(float(parts.max()), 0.0)
    step = (high - low) / 255
    zero = round(-low / step)
    rounded = ((parts / step).round() + zero).clamp(0, 255).sub(zero) * step
    return float((rounded @ weight.repeat_interleave(counts, 1).T - x @ weight.T).square().mean())


def test_the_expected_gain_is_the_gain():
    """Importance of a channel is what its error costs: for a matrix product, the square of its weights."""
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(4000, 12, generator=generator, dtype=torch.float64) * 2 - 0.17
    x[:, 7] *= 20
    weight = torch.randn(9, 12, generator=generator, dtype=torch.float64)
    weight[:, 7] /= 4
    found = split_counts(x.amin(0), x.amax(0), weight.square().sum(0), (8, 16))
    ones = torch.ones(12, dtype=torch.long)
    gain = 10 * math.log10(rounded_products_error(x, weight, ones) / rounded_products_error(x, weight, found.counts))
    assert found.gain_db > 10
    assert gain == pytest.approx(found.gain_db, abs=0.5)  # measured: 0.1
    assert found.counts.argmax() == 7
    flat = split_counts(x.amin(0), x.amax(0), torch.ones(12), (8, 16))
    assert abs(gain - flat.gain_db) > 1  # without importance, the gain is another


def test_zero_is_on_the_grid_whatever_the_values():
    """Values from 99 to 100 need a grid from 0 to 100."""
    low, high, one = torch.tensor([99.0, 9.0]), torch.tensor([100.0, 10.0]), torch.ones(2)
    found = split_counts(low, high, one, (2,))
    assert found.counts.tolist() == [3, 1]
    expected = oracle_error([99, 9], [100, 10], [1, 1], [1, 1]) / oracle_error([99, 9], [100, 10], [1, 1], [3, 1])
    assert found.gain_db == pytest.approx(10 * math.log10(expected), abs=1e-4)


@pytest.mark.parametrize("high", [torch.zeros(3), torch.ones(3)])
def test_what_has_no_outlier_stays_whole(high):
    found = split_counts(torch.zeros(3), high, torch.ones(3), (1, 2))
    assert (found.counts.tolist(), found.gain_db) == ([1, 1, 1], 0.0)
