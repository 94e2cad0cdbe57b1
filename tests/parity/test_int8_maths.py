"""The arithmetic of int8 against plain Python in float64, written from its definitions; and that a fault would show.

ONNX operators QuantizeLinear and DequantizeLinear, opset 21; Xiao et al., SmoothQuant, 2023, arXiv 2211.10438,
equation 4.
"""

import math
from collections.abc import Callable

import pytest
import torch

from martlet.functional.quantize.affine import affine_parameters, dequantize, quantize
from martlet.functional.quantize.ranges import BINS, Histogram, weight_scale_mse
from martlet.functional.quantize.smoothing import smoothquant_factors

LIMITS = {torch.uint8: (0, 255), torch.int8: (-128, 127)}
TYPES = list(LIMITS)


def half_to_even(x: float) -> int:
    """Rounding by the rule itself: up from more than a half, and to the even neighbour from exactly a half."""
    floor = math.floor(x)
    part = x - floor
    return floor + 1 if part > 0.5 or (part == 0.5 and floor % 2) else floor


def oracle_quantize(x: float, scale: float, zero: int, dtype: torch.dtype) -> int:
    least, most = LIMITS[dtype]
    return min(max(half_to_even(x / scale) + zero, least), most)


def oracle_dequantize(q: int, scale: float, zero: int) -> float:
    return (q - zero) * scale


def oracle_grid(low: float, high: float, dtype: torch.dtype, symmetric: bool) -> tuple[float, int]:
    """(scale, zero point) of the grid over [min(low, 0), max(high, 0)]."""
    least, most = LIMITS[dtype]
    low, high = min(low, 0.0), max(high, 0.0)
    if symmetric:
        codes = 127
        return max(-low, high) / codes, 128 if least == 0 else 0
    scale = (high - low) / (most - least)
    return scale, min(max(half_to_even(least - low / scale), least), most)


def oracle_error(
    values: list[float], low: float, high: float, dtype: torch.dtype, symmetric: bool, counts: list[int] | None = None
) -> float:
    """Mean squared rounding error of values, each as often as its count."""
    scale, zero = oracle_grid(low, high, dtype, symmetric)
    counts = counts or [1] * len(values)
    errors = (oracle_dequantize(oracle_quantize(v, scale, zero, dtype), scale, zero) - v for v in values)
    return sum(n * error**2 for n, error in zip(counts, errors, strict=True)) / sum(counts)


def oracle_smoothquant(activations: list[list[float]], weight: list[list[float]], alpha: float) -> list[float]:
    """s_j = max|X_j|^alpha / max|W_j|^(1 - alpha) of X (T, C) and W (O, C), over their geometric mean."""
    factors = [
        max(abs(row[j]) for row in activations) ** alpha / max(abs(row[j]) for row in weight) ** (1 - alpha)
        for j in range(len(weight[0]))
    ]
    mean = math.prod(factors) ** (1 / len(factors))
    return [factor / mean for factor in factors]


def assert_quantizes_as_onnx(function: Callable[..., torch.Tensor], dtype: torch.dtype) -> None:
    scale, zero = 0.25, {torch.uint8: 100, torch.int8: -3}[dtype]
    halves = [k * scale / 2 for k in range(-9, 10)]
    values = [*halves, 0.1, -0.1, 31.0, 1e6, -1e6]  # both ends saturate
    found = function(torch.tensor(values), torch.tensor(scale), torch.tensor(zero, dtype=dtype))
    assert found.dtype == dtype
    assert found.tolist() == [oracle_quantize(v, scale, zero, dtype) for v in values]


def assert_grid(
    function: Callable[..., tuple[torch.Tensor, torch.Tensor]], dtype: torch.dtype, symmetric: bool
) -> None:
    for low, high in [(-1.0, 1.1), (-0.3, 2.1), (0.5, 2.0), (-2.0, -0.5), (-7.3, 0.0), (-0.01, 511.0)]:
        scale, zero = function(torch.tensor(low), torch.tensor(high), dtype, symmetric)
        expected_scale, expected_zero = oracle_grid(low, high, dtype, symmetric)
        assert scale.item() == pytest.approx(expected_scale, rel=1e-6)
        assert zero.item() == expected_zero


def assert_smoothquant(function: Callable[..., torch.Tensor], alpha: float) -> None:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(20, 6, generator=generator) * torch.tensor([0.1, 1, 1, 3, 10, 50])
    weight = torch.randn(5, 6, generator=generator)
    found = function(x.abs().amax(0), weight.abs().amax(0), alpha)
    assert found.tolist() == pytest.approx(oracle_smoothquant(x.tolist(), weight.tolist(), alpha), rel=1e-5)


def assert_range_is_the_best(search: Callable[[Histogram], tuple[float, float]], symmetric: bool) -> None:
    """No range of a fine grid of ranges has a clearly smaller error, on the values themselves and not on their bins."""
    dtype = torch.int8
    bulk = torch.randn(150, generator=torch.Generator().manual_seed(3)) * 0.1
    x = torch.cat([bulk, torch.tensor([3.0, 2.0, -1.0])])  # outliers on both sides, more on one
    counts = [600] * len(bulk) + [1] * 3
    histogram = Histogram()
    histogram.add(x.repeat_interleave(torch.tensor(counts)))
    values, steps = x.double().tolist(), 40

    def error(low: float, high: float) -> float:
        return oracle_error(values, low, high, dtype, symmetric, counts)

    fractions = [k / steps for k in range(1, steps + 1)]
    pairs = [(b, b) for b in fractions] if symmetric else [(a, b) for a in fractions for b in fractions]
    found = error(*search(histogram))
    assert found <= min(error(histogram.low * a, histogram.high * b) for a, b in pairs) * 1.05
    assert found < 0.9 * error(histogram.low, histogram.high)


def assert_weight_scales_are_the_best(function: Callable[[torch.Tensor], torch.Tensor]) -> None:
    generator = torch.Generator().manual_seed(5)
    weight = torch.randn(3, 64, generator=generator) * torch.tensor([[0.01], [1.0], [30.0]])
    weight[:, 0] *= 1.5
    for row, scale in zip(weight.double().tolist(), function(weight).tolist(), strict=True):
        largest = max(abs(v) for v in row)
        shrinks = [1 - 0.4 * k / 39 for k in range(40)]
        errors = [oracle_error(row, -largest * shrink, largest * shrink, torch.int8, True) for shrink in shrinks]
        assert oracle_error(row, -127 * scale, 127 * scale, torch.int8, True) == pytest.approx(min(errors), rel=1e-3)


@pytest.mark.parametrize("dtype", TYPES)
def test_quantize_is_onnx_quantizelinear(dtype):
    assert_quantizes_as_onnx(quantize, dtype)


@pytest.mark.parametrize(
    "fault",
    [
        lambda x, scale, zero: quantize(x + 1e-6, scale, zero),  # halves go up
        lambda x, scale, zero: quantize(x * scale * scale, scale, zero),  # times the scale
        lambda x, scale, zero: quantize(x, scale, torch.zeros_like(zero)),
        lambda x, scale, zero: (torch.round(x / scale) + zero).to(torch.int64).to(zero.dtype),  # wraps around
        lambda x, scale, zero: quantize(x, scale, zero).clamp(max=126),
    ],
)
@pytest.mark.parametrize("dtype", TYPES)
def test_a_fault_in_quantize_shows(fault, dtype):
    with pytest.raises(AssertionError):
        assert_quantizes_as_onnx(fault, dtype)


@pytest.mark.parametrize("dtype", TYPES)
def test_dequantize_is_onnx_dequantizelinear(dtype):
    least, most = LIMITS[dtype]
    codes = list(range(least, most + 1))
    found = dequantize(torch.tensor(codes, dtype=dtype), torch.tensor(0.037), torch.tensor(11, dtype=dtype))
    expected = [oracle_dequantize(q, 0.037, 11) for q in codes]
    assert found.tolist() == pytest.approx(expected, rel=1e-6)
    wrapped = (torch.tensor(codes, dtype=dtype) - torch.tensor(11, dtype=dtype)) * 0.037  # without widening first
    assert wrapped.tolist() != pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("dtype", TYPES)
def test_grids_are_those_of_the_definition(dtype, symmetric):
    assert_grid(affine_parameters, dtype, symmetric)


@pytest.mark.parametrize(
    "fault",
    [
        lambda low, high, dtype, symmetric: affine_parameters(low * 1.01, high * 1.01, dtype, symmetric),
        lambda low, high, dtype, symmetric: affine_parameters(low, high, dtype, not symmetric),
        lambda low, high, dtype, symmetric: affine_parameters(high, low, dtype, symmetric),
    ],
)
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("dtype", TYPES)
def test_a_fault_in_a_grid_shows(fault, dtype, symmetric):
    with pytest.raises(AssertionError):
        assert_grid(fault, dtype, symmetric)


@pytest.mark.parametrize("alpha", [0.0, 0.25, 0.5, 1.0])
def test_smoothing_is_equation_4(alpha):
    assert_smoothquant(smoothquant_factors, alpha)


@pytest.mark.parametrize(
    "fault",
    [
        lambda x, w, alpha: 1 / smoothquant_factors(x, w, alpha),  # leaves X W as it is, and is wrong
        lambda x, w, alpha: smoothquant_factors(x, w, 1 - alpha),
        lambda x, w, alpha: smoothquant_factors(w, x, alpha),
        lambda x, w, alpha: smoothquant_factors(x, w, alpha) * 1.01,
    ],
)
def test_a_fault_in_smoothing_shows(fault):
    with pytest.raises(AssertionError):
        assert_smoothquant(fault, 0.3)


def test_channels_that_are_never_active_are_left_alone():
    found = smoothquant_factors(torch.tensor([0.0, 4.0, 1.0]), torch.tensor([1.0, 1.0, 0.0]), 0.5)
    assert found.tolist() == [1.0, 1.0, 1.0]  # one live channel is its own mean
    assert smoothquant_factors(torch.zeros(2), torch.ones(2), 0.5).tolist() == [1.0, 1.0]


@pytest.mark.parametrize("symmetric", [True, False])
def test_mse_range_against_brute_force(symmetric):
    assert_range_is_the_best(lambda histogram: histogram.mse(torch.int8, symmetric), symmetric)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize(
    "fault",
    [
        lambda low, high, h: (h.low, h.high),
        lambda low, high, h: (low / 2, high / 2),
        lambda low, high, h: (low * 1.3, high * 1.3),
    ],
)
def test_a_fault_in_the_range_shows(fault, symmetric):
    with pytest.raises(AssertionError):
        assert_range_is_the_best(lambda h: fault(*h.mse(torch.int8, symmetric), h), symmetric)


def test_weight_scales_against_brute_force():
    assert_weight_scales_are_the_best(weight_scale_mse)


@pytest.mark.parametrize(
    "fault",
    [
        lambda w: w.abs().amax(1) / 127,
        lambda w: weight_scale_mse(w) * 0.97,
        lambda w: weight_scale_mse(w).flip(0),
        lambda w: weight_scale_mse(w).mean().expand(len(w)),
    ],
)
def test_a_fault_in_weight_scales_shows(fault):
    with pytest.raises(AssertionError):
        assert_weight_scales_are_the_best(fault)


def test_bins_are_as_many_as_the_error_needs():
    """A bin is at most a sixteenth of a step of 8 bits over the whole histogram: its middle stands for it."""
    assert BINS >= 16 * 256
