"""What holds for every affine grid, whatever is rounded to it."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from martlet.core.errors import NumericsError
from martlet.functional.quantize.affine import affine_parameters, dequantize, quantize

GRIDS = st.sampled_from([(torch.uint8, False), (torch.uint8, True), (torch.int8, False), (torch.int8, True)])
MAGNITUDES = st.floats(2.0**-20, 2.0**20, width=32)
VALUES = st.lists(st.floats(-1e6, 1e6, width=32), min_size=1, max_size=30)
PARTS = st.floats(0.125, 1.0, width=32)


def rounded(x: torch.Tensor, low: float, high: float, dtype: torch.dtype, symmetric: bool) -> torch.Tensor:
    scale, zero = affine_parameters(torch.tensor(low), torch.tensor(high), dtype, symmetric)
    return dequantize(quantize(x, scale, zero), scale, zero)


@given(st.floats(-1e6, 1e6, width=32), st.floats(-1e6, 1e6, width=32), GRIDS)
def test_zero_is_on_the_grid(a, b, grid):
    assert rounded(torch.zeros(1), min(a, b), max(a, b), *grid).item() == 0.0


@given(VALUES, MAGNITUDES, PARTS, GRIDS)
def test_rounding_twice_is_rounding_once(values, high, part, grid):
    once = rounded(torch.tensor(values), -high * part, high, *grid)
    assert torch.equal(rounded(once, -high * part, high, *grid), once)


@given(st.lists(st.floats(-1.0, 1.0, width=32), min_size=1, max_size=30), MAGNITUDES, PARTS, GRIDS)
def test_inside_the_range_the_error_is_at_most_half_a_step(values, high, part, grid):
    low = -high * part
    scale, _ = affine_parameters(torch.tensor(low), torch.tensor(high), *grid)
    inside = (torch.tensor(values) * high).clamp(low, high)
    error = (rounded(inside, low, high, *grid) - inside).abs().max()
    ends = 1.0 if grid[1] is False else 0.5  # rounding the zero point moves both ends by up to half a step more
    assert error <= scale * ends * (1 + 1e-4)


@given(VALUES, MAGNITUDES, GRIDS)
def test_rounding_keeps_the_order(values, high, grid):
    x = torch.tensor(values).sort().values
    assert (rounded(x, -high, high, *grid).diff() >= 0).all()


@given(MAGNITUDES, st.sampled_from([torch.int8, torch.uint8]))
def test_symmetric_grids_mirror(high, dtype):
    x = torch.linspace(-high, high, 51)
    assert torch.equal(rounded(-x, -high, high, dtype, True), -rounded(x, -high, high, dtype, True))


@given(st.integers(0, 1000), st.booleans())
def test_error_falls_with_more_bits_and_with_a_narrower_range(seed, symmetric):
    x = torch.rand(1000, generator=torch.Generator().manual_seed(seed)) * 2 - 1

    def error(high: float, dtype: torch.dtype) -> float:
        return float((rounded(x.double(), -high, high, dtype, symmetric) - x).square().mean())

    assert error(1.0, torch.int16) < error(1.0, torch.int8) / 1000
    assert error(1.0, torch.int8) < error(2.0, torch.int8) < error(8.0, torch.int8)


@given(st.integers(1, 5), st.integers(1, 4), st.integers(-3, -1), st.integers(0, 1000))
def test_a_scale_for_each_slice_is_each_slice_by_itself(channels, others, axis, seed):
    shape = [others, others, others]
    shape[axis] = channels
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=generator)
    scale = torch.rand(channels, generator=generator) + 0.01
    zero = torch.randint(0, 256, (channels,), generator=generator, dtype=torch.uint8)
    together = quantize(x, scale, zero, axis)
    for c in range(channels):
        assert torch.equal(together.select(axis, c), quantize(x.select(axis, c), scale[c], zero[c]))
    assert torch.equal(
        dequantize(together, scale, zero, axis).select(axis, 0), dequantize(together.select(axis, 0), scale[0], zero[0])
    )


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_range_that_is_no_range_is_refused(bad):
    with pytest.raises(NumericsError, match="a range to quantize is NaN or infinite"):
        affine_parameters(torch.tensor(-1.0), torch.tensor(bad), torch.int8, True)


def test_an_empty_range_has_scale_one():
    scale, zero = affine_parameters(torch.zeros(2), torch.zeros(2), torch.uint8, False)
    assert scale.tolist() == [1.0, 1.0]
    assert zero.tolist() == [0, 0]
