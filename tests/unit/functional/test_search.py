"""Searches against trying everything, in float64: FPCS of AdaLog (arXiv 2407.12951), PTQ4ViT's metric (2111.12293)."""

import itertools

import pytest
import torch

from martlet.functional.quantize.logarithmic import ADALOG_DENOMINATOR, GELU_SHIFT, LogarithmicGrid
from martlet.functional.quantize.search import (
    NUMERATORS,
    AffineGrid,
    best_grid,
    linear_error,
    progressive_search,
    search_affine,
    search_logarithmic,
    squared_error,
)
from martlet.functional.quantize.twin import TwinGeluGrid, TwinSoftmaxGrid

GENERATOR = torch.Generator().manual_seed(0)
ROWS = torch.randn(60, 8, generator=GENERATOR).double() * torch.tensor([1, 1, 1, 1, 2, 2, 4, 8.0])
WEIGHT = torch.randn(5, 8, generator=GENERATOR).double()
GRADIENT = torch.randn(60, 5, generator=GENERATOR).double()
SOFTMAX = torch.softmax(torch.randn(40, 30, generator=GENERATOR).double() * 3, -1)
GELU = torch.nn.functional.gelu(torch.randn(800, generator=GENERATOR).double() * 1.5)


def rounded_by(grid, x: torch.Tensor) -> torch.Tensor:
    return grid.dequantize(grid.quantize(x)).double()


def oracle_linear_error(rounded: torch.Tensor, gradient: torch.Tensor | None) -> float:
    """(O' - O)ᵀ diag(g²) (O' - O), over rows and outputs, in plain Python."""
    total = 0.0
    for r in range(len(ROWS)):
        for o in range(len(WEIGHT)):
            off = sum(float((rounded[r, i] - ROWS[r, i]) * WEIGHT[o, i]) for i in range(ROWS.shape[1]))
            total += off**2 * (1.0 if gradient is None else float(gradient[r, o]) ** 2)
    return total / (len(ROWS) * len(WEIGHT))


@pytest.mark.parametrize("gradient", [None, GRADIENT])
def test_linear_error_is_the_hessian_guided_metric(gradient):
    rounded = ROWS + 0.1 * torch.randn(ROWS.shape, generator=torch.Generator().manual_seed(1)).double()
    expected = oracle_linear_error(rounded, gradient)
    assert linear_error(ROWS, WEIGHT, gradient)(rounded) == pytest.approx(expected, rel=1e-9)
    assert linear_error(ROWS, WEIGHT, GRADIENT.abs().sqrt())(rounded) != pytest.approx(expected, rel=1e-2)
    assert linear_error(ROWS, WEIGHT)(ROWS) == 0.0


@pytest.mark.parametrize(
    ("x", "grids"),
    [(SOFTMAX, [TwinSoftmaxGrid(4, m) for m in range(12)]), (GELU, [TwinGeluGrid(4, m) for m in range(-2, 10)])],
)
def test_the_best_twin_grid_has_the_least_error(x, grids):
    errors = [float((rounded_by(grid, x) - x).square().mean()) for grid in grids]
    found = best_grid(squared_error(x), x, grids)
    assert found == grids[errors.index(min(errors))]
    assert errors[0] > 1.2 * min(errors) < errors[-1]  # neither end is the best
    assert best_grid(lambda rounded: -squared_error(x)(rounded), x, grids) != found


def test_progressive_search_tries_as_many_as_it_says_and_finds_the_least():
    tried: list[tuple[float, int]] = []

    def error(first: float, second: int) -> float:
        tried.append((first, second))
        return (first - 0.7312) ** 2 + 0.01 * (second - 3) ** 2 + 0.02 * (first - 0.7312) * (second - 3)

    pairs = [(i / 8, j) for i in range(9) for j in range(6)]
    first, second = progressive_search(error, pairs, 1 / 8, width=4, splits=5, steps=5)
    assert len(tried) == len(pairs) + 4 * 4 * 5
    assert second == 3
    assert first == pytest.approx(0.7312, abs=1 / 8 / 5**4)
    coarse = progressive_search(error, pairs, 1 / 8, width=4, splits=5, steps=1)
    assert coarse == (0.75, 3)  # without progress
    narrow = [pair for pair in tried[len(pairs) : len(pairs) + 20] if pair[1] == 3 and abs(pair[0] - 0.75) < 1 / 16]
    assert [round(p[0], 6) for p in sorted(narrow)] == [0.7, 0.725, 0.75, 0.775, 0.8]  # tiles 1/8 around the best


def test_outliers_are_clipped():
    x = torch.cat(
        [torch.randn(500, generator=torch.Generator().manual_seed(2)).double().abs(), torch.tensor([-3.0, 9])]
    )
    minmax = AffineGrid(4, 12 / 15, 4)
    assert squared_error(x)(rounded_by(search_affine(squared_error(x), x, 4), x)) < 0.9 * squared_error(x)(
        rounded_by(minmax, x)
    )


def assert_nearly_the_best_affine(found: AffineGrid, error, x: torch.Tensor, bits: int) -> None:
    """No pair of a fine grid over all scales and all zero points has a clearly smaller error."""
    span = float(x.max() - x.min())
    scales = [span / (2**bits - 1) * (i / 100) for i in range(10, 121)]
    every = (AffineGrid(bits, s, z) for s, z in itertools.product(scales, range(2**bits)))
    limit = error(rounded_by(found, x)) / 1.03
    assert all(error(rounded_by(grid, x)) >= limit for grid in every)


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("gradient", [None, GRADIENT])
def test_affine_search_against_trying_all(bits, gradient):
    error = linear_error(ROWS, WEIGHT, gradient)
    assert_nearly_the_best_affine(search_affine(error, ROWS, bits, keep=0.6), error, ROWS, bits)


def test_a_fault_in_the_affine_search_shows():
    error = linear_error(ROWS, WEIGHT, GRADIENT)
    found = search_affine(error, ROWS, 3, keep=0.6)
    for fault in (
        AffineGrid(3, found.scale * 1.3, found.zero_point),
        AffineGrid(3, found.scale, found.zero_point + 1),
        search_affine(error, ROWS, 2),
    ):
        with pytest.raises(AssertionError):
            assert_nearly_the_best_affine(fault, error, ROWS, 3)


@pytest.mark.parametrize("bits", [3, 4])
def test_the_base_for_a_softmax_is_the_best_of_all(bits):
    error = squared_error(SOFTMAX)
    found = search_logarithmic(error, SOFTMAX, bits, scale=1.0)
    assert float(found.scale) == 1.0
    one = torch.tensor(1.0, dtype=torch.float64)
    errors = {
        q: error(rounded_by(LogarithmicGrid(bits, one, q, ADALOG_DENOMINATOR, rounded=True), SOFTMAX))
        for q in NUMERATORS
    }
    assert found.numerator == min(errors, key=errors.__getitem__)
    assert errors[found.numerator] < errors[ADALOG_DENOMINATOR] or bits == 3  # log2's; at 3 bits it is the best here


def test_base_and_scale_after_a_gelu_against_trying_all():
    error = squared_error(GELU)
    found = search_logarithmic(error, GELU, 4, shift=GELU_SHIFT)
    assert found.shift == GELU_SHIFT
    assert found.rounded
    least = min(
        error(rounded_by(LogarithmicGrid(4, scale, q, ADALOG_DENOMINATOR, shift=GELU_SHIFT, rounded=True), GELU))
        for q in range(10, 60)
        for scale in (GELU.max() + GELU_SHIFT) * torch.linspace(0.4, 1, 24, dtype=torch.float64)
    )
    assert error(rounded_by(found, GELU)) <= 1.03 * least
    wrong = LogarithmicGrid(4, found.scale, found.numerator + 8, ADALOG_DENOMINATOR, shift=GELU_SHIFT, rounded=True)
    assert error(rounded_by(wrong, GELU)) > 1.03 * least


@pytest.mark.parametrize("sign", [1, -1])
def test_one_sided_tensors_keep_their_zero(sign):
    x = sign * torch.randn(400, generator=torch.Generator().manual_seed(4)).abs()
    found = search_affine(squared_error(x), x, 8)
    assert found.zero_point < 9 if sign > 0 else found.zero_point > 246
    assert squared_error(x)(rounded_by(found, x)) < 2e-5


@pytest.mark.parametrize(
    "call",
    [
        lambda: best_grid(squared_error(GELU), GELU, []),
        lambda: best_grid(lambda rounded: float("nan"), GELU, [TwinGeluGrid(4, 2)]),
        lambda: progressive_search(lambda a, b: a, [], 1.0),
        lambda: progressive_search(lambda a, b: a, [(1.0, 1)], 0.0),
        lambda: progressive_search(lambda a, b: a, [(1.0, 1)], 1.0, splits=0),
        lambda: search_affine(squared_error(GELU), GELU, 1),
        lambda: search_affine(squared_error(GELU), GELU, 4, keep=1.0),
        lambda: search_affine(squared_error(GELU), torch.ones(4), 4),
        lambda: search_logarithmic(squared_error(SOFTMAX), SOFTMAX, 9),
        lambda: search_logarithmic(squared_error(SOFTMAX), SOFTMAX, 4, numerators=[]),
        lambda: search_logarithmic(squared_error(GELU), -GELU.abs() - 1, 4),
        lambda: AffineGrid(4, 0.0, 0),
        lambda: AffineGrid(4, 1.0, 16),
    ],
)
def test_impossible_searches_are_refused(call):
    with pytest.raises(ValueError, match=r"grid|spacing|pair|bits|quantile|one value|base|scale"):
        call()
