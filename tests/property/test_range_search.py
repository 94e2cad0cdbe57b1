"""What holds for every histogram and every range that is chosen from one."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from martlet.core.errors import NumericsError
from martlet.functional.quantize.affine import affine_parameters, dequantize, quantize
from martlet.functional.quantize.ranges import BINS, Histogram, quantization_mse, weight_scale_mse

GRIDS = st.sampled_from([(torch.uint8, False), (torch.int8, False), (torch.int8, True)])
SEEDS = st.integers(0, 10_000)


def sample(seed: int, n: int = 500) -> torch.Tensor:
    """Values with a random tail and a random offset."""
    generator = torch.Generator().manual_seed(seed)
    tail, offset = torch.rand(2, generator=generator).tolist()
    return torch.randn(n, generator=generator) * (4 * tail * torch.rand(n, generator=generator)).exp() + 2 * offset


@given(
    st.floats(2.0**-10, 2.0**10, width=32),
    st.lists(st.lists(st.integers(-BINS // 2, BINS // 2 - 1), min_size=1, max_size=20), min_size=1, max_size=5),
    st.integers(0, 6),
)
def test_histogram_is_numpys_after_any_number_of_doublings(first, batches, doublings):
    limit = first * (1 + 1e-6) * 2**doublings  # where it must end
    width = 2 * limit / BINS
    largest = (BINS // 2 - 1 + 1 / 3) * width
    tensors = [torch.tensor([first]), torch.tensor([largest])]
    tensors += [torch.tensor([(k + 1 / 3) * width for k in batch]) for batch in batches]  # on no edge, before or after
    histogram = Histogram()
    for tensor in tensors:
        histogram.add(tensor)
    assert histogram.limit == pytest.approx(limit if doublings else histogram.limit)
    values = torch.cat(tensors).double().numpy()
    expected, _ = np.histogram(values, BINS, (-histogram.limit, histogram.limit))
    assert np.array_equal(histogram.counts.numpy(), expected)
    assert (histogram.low, histogram.high) == (values.min(), values.max())


@given(st.lists(st.lists(st.floats(-1e4, 1e4, width=32), min_size=1, max_size=20), min_size=1, max_size=5))
def test_every_value_after_the_first_that_is_not_zero_is_counted(batches):
    histogram = Histogram()
    histogram.add(torch.tensor([1e-4]))
    for batch in batches:
        histogram.add(torch.tensor(batch))
    assert histogram.counts.sum() == 1 + sum(len(batch) for batch in batches)
    assert histogram.low >= -histogram.limit
    assert histogram.high <= histogram.limit


@settings(max_examples=30)
@given(SEEDS, GRIDS)
def test_mse_range_is_no_worse_than_minmax(seed, grid):
    histogram = Histogram()
    histogram.add(sample(seed))
    low, high = histogram.mse(*grid)
    lows, highs = torch.tensor([low, histogram.low]), torch.tensor([high, histogram.high])
    chosen, minmax = quantization_mse(histogram.centers(), histogram.counts, lows, highs, *grid).tolist()
    assert chosen <= minmax * (1 + 1e-6)


@settings(max_examples=30)
@given(SEEDS, GRIDS)
def test_mse_range_lies_within_what_was_seen(seed, grid):
    histogram = Histogram()
    histogram.add(sample(seed))
    low, high = histogram.mse(*grid)
    assert min(histogram.low, 0.0) <= low <= high <= max(histogram.high, 0.0)


@given(SEEDS, st.floats(50.0, 100.0))
def test_percentile_keeps_what_it_says(seed, keep_pct):
    x = sample(seed, 2000)
    histogram = Histogram()
    histogram.add(x)
    low, high = histogram.percentile(keep_pct)
    kept_pct = 100 * float(((x >= low) & (x <= high)).float().mean())
    densest_pct = 100 * float(histogram.counts.max()) / len(x)
    assert kept_pct >= keep_pct - 0.1
    assert kept_pct <= keep_pct + 0.1 + 4 * densest_pct
    assert histogram.low <= low <= high <= histogram.high


@settings(max_examples=30)
@given(SEEDS)
def test_weight_scales_are_no_worse_than_the_largest_magnitudes(seed):
    weight = sample(seed, 400).reshape(4, 100)
    largest = weight.abs().amax(1)
    plain, zero = affine_parameters(-largest, largest, torch.int8, True)

    def error(scale: torch.Tensor) -> torch.Tensor:
        return (dequantize(quantize(weight, scale, zero, 0), scale, zero, 0) - weight).square().sum(1)

    chosen = weight_scale_mse(weight)
    assert (error(chosen) <= error(plain) * (1 + 1e-6)).all()
    assert (chosen <= plain * (1 + 1e-6)).all()


def test_a_channel_of_zeros_has_scale_one():
    assert weight_scale_mse(torch.zeros(2, 5)).tolist() == [1.0, 1.0]


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_a_value_that_is_no_number_is_refused(bad):
    with pytest.raises(NumericsError, match="an activation is NaN or infinite"):
        Histogram().add(torch.tensor([0.0, bad]))


def test_only_zeros_have_an_empty_range():
    histogram = Histogram()
    histogram.add(torch.zeros(3))
    assert histogram.mse(torch.uint8, False) == (0.0, 0.0)
    assert histogram.percentile(99.0) == (0.0, 0.0)
