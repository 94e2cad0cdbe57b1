"""TanQ of DopQ-ViT (arXiv 2408.03291) against its definition in plain Python, and against log2 on attention maps."""

from math import atan, pi, tan

import pytest
import torch

from martlet.functional.quantize.logarithmic import LogarithmicGrid
from martlet.functional.quantize.search import best_grid, product_error, sample_queries, squared_error
from martlet.functional.quantize.table import lookup, tabulate
from martlet.functional.quantize.tangent import ANGLES, TangentGrid, search_tangent

GENERATOR = torch.Generator().manual_seed(0)
MAPS = torch.softmax(torch.randn(60, 50, generator=GENERATOR) * 3, -1)
"""Attention maps whose rows have one large value or a few, and many small ones."""


def values(bits: int, scale: float, angle: float) -> list[float]:
    last = 2**bits - 1
    return [scale * (0.5 + atan((2 * k / last - 1) * tan(angle / 2)) / angle) for k in range(last + 1)]


def code(x: float, bits: int, scale: float, angle: float) -> int:
    """The code nearest in the tangent, not in value."""
    steep = lambda v: tan(angle * (v - 0.5))  # noqa: E731
    at = steep(min(max(x / scale, 0.0), 1.0))
    return min(range(2**bits), key=lambda k: abs(steep(values(bits, 1.0, angle)[k]) - at))


def assert_is_the_definition(grid: TangentGrid) -> None:
    x = torch.linspace(-0.1, 1.3, 200, dtype=torch.float64)
    expected = [code(v, 3, 0.9, 2.8) for v in x.tolist()]
    assert grid.quantize(x).tolist() == expected
    assert grid.dequantize(grid.quantize(x)).tolist() == pytest.approx([values(3, 0.9, 2.8)[k] for k in expected])


def test_codes_are_evenly_spaced_in_the_tangent() -> None:
    assert_is_the_definition(TangentGrid(3, 0.9, 2.8))


@pytest.mark.parametrize("fault", [TangentGrid(4, 0.9, 2.8), TangentGrid(3, 0.95, 2.8), TangentGrid(3, 0.9, 2.7)])
def test_another_grid_shows(fault: TangentGrid) -> None:
    with pytest.raises(AssertionError):
        assert_is_the_definition(fault)


def test_both_ends_are_values_and_fine() -> None:
    steps = torch.tensor(values(4, 1.0, ANGLES[6])).diff()
    assert float(steps[0]) == pytest.approx(float(steps[-1]), rel=1e-4)
    assert float(steps[0]) < 0.2 * float(steps.max())
    for bits in (2, 4, 8):
        grid = TangentGrid(bits, 0.7, ANGLES[6])
        x = torch.tensor([0.0, 0.7, 0.9])
        assert grid.dequantize(grid.quantize(x)).tolist() == pytest.approx([0.0, 0.7, 0.7], abs=1e-6)


def test_small_angles_are_evenly_spaced() -> None:
    assert torch.tensor(values(4, 1.0, 0.01)).diff().tolist() == pytest.approx([1 / 15] * 15, rel=1e-3)


@pytest.mark.parametrize("angle", [ANGLES[0], ANGLES[6], ANGLES[-1]])
def test_its_table_rounds_alike(angle: float) -> None:
    grid = TangentGrid(4, 0.8, angle)
    table = tabulate(grid)
    expected = grid.dequantize(grid.quantize(MAPS.double()))
    found = lookup(MAPS, table.edges, table.values)
    assert float(((found - expected).abs() < 1e-6).float().mean()) > 0.999  # a value on an edge may go either way


def test_the_search_finds_the_least_error() -> None:
    grid = search_tangent(squared_error(MAPS), MAPS, 4)
    ordered = sorted(MAPS.flatten().tolist())
    scales = [ordered[round(q * (len(ordered) - 1))] for q in (0.999, 0.9999, 0.99999, 1.0)]
    errors = {}
    for scale in scales:
        for angle in ANGLES:
            known = torch.tensor(values(4, scale, angle))
            codes = TangentGrid(4, scale, angle).quantize(MAPS).long()
            errors[scale, angle] = float((known[codes] - MAPS).square().mean())
    assert errors[grid.scale, grid.angle] == pytest.approx(min(errors.values()), rel=1e-4)
    assert max(errors.values()) > 2 * min(errors.values())


def test_it_errs_less_than_log2() -> None:
    tops = [float(torch.quantile(MAPS, q)) for q in (0.999, 0.9999, 1.0)]
    error = squared_error(MAPS)
    log2 = best_grid(error, MAPS, [LogarithmicGrid(4, torch.tensor(top)) for top in tops])
    ours = search_tangent(error, MAPS, 4)
    assert error(ours.dequantize(ours.quantize(MAPS))) < 0.7 * error(log2.dequantize(log2.quantize(MAPS)))


def test_product_error_is_of_the_product() -> None:
    maps, value = MAPS[:6], torch.randn(50, 3, generator=torch.Generator().manual_seed(1))
    rounded, rounded_value = maps.round(decimals=1), value.round()
    total = 0.0
    for row, rounded_row in zip(maps.tolist(), rounded.tolist(), strict=True):
        for column, rounded_column in zip(value.T.tolist(), rounded_value.T.tolist(), strict=True):
            exact = sum(a * b for a, b in zip(row, column, strict=True))
            total += (sum(a * b for a, b in zip(rounded_row, rounded_column, strict=True)) - exact) ** 2
    found = product_error(maps, value, rounded_value)(rounded)
    assert found == pytest.approx(total / (len(maps) * 3), rel=1e-4)
    assert found != pytest.approx(product_error(maps, value, value)(rounded), rel=1e-2)


def test_sampled_queries_are_whole_rows() -> None:
    maps = torch.rand(2, 3, 400, 400, generator=torch.Generator().manual_seed(2))
    rows = sample_queries(maps)
    assert torch.equal(rows, maps[..., ::3, :])
    assert torch.equal(sample_queries(MAPS), MAPS)


def test_impossible_arguments_are_refused() -> None:
    for make in (
        lambda: TangentGrid(1, 1.0, 2.0),
        lambda: TangentGrid(4, 0.0, 2.0),
        lambda: TangentGrid(4, 1.0, pi),
        lambda: search_tangent(squared_error(MAPS), -MAPS, 4),
    ):
        with pytest.raises(ValueError, match=r"bits|scale|grid"):
            make()
