"""Ranges between percentiles, in plain Python and float64, from RepQ-ViT's official code."""

import pytest
import torch

from martlet.functional.quantize.percentile import QUANTILES, percentile_affine, percentile_grids, percentile_scales


def rows(seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    draw = torch.randn(5, 3000, generator=generator).double()
    draw[1, :2] = torch.tensor([40.0, -25.0])  # outliers that few bits have no room for
    draw[2] = draw[2].abs() + 3  # zero isn't in its range
    draw[3] = draw[3] * 1e-3 - 7
    return draw


def quantile(ordered: list[float], q: float) -> float:
    position = q * (len(ordered) - 1)
    below = int(position)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (position - below) * (ordered[above] - ordered[below])


def oracle(row: list[float], bits: int) -> tuple[float, float]:
    """Of three ranges the one whose grid has the least squared error."""
    best, ordered, last = (float("inf"), 0.0, 0.0), sorted(row), 2**bits - 1
    for q in (0.999, 0.9999, 0.99999):
        low, high = quantile(ordered, 1 - q), quantile(ordered, q)
        scale = (high - low) / last
        zero = round(-low / scale)
        error = sum(((min(max(round(x / scale) + zero, 0), last) - zero) * scale - x) ** 2 for x in row)
        best = min(best, (error, scale, zero))
    return best[1], best[2]


def assert_is_the_papers(function, bits: int) -> None:
    x = rows()
    scale, zero = function(x, bits)
    for i, row in enumerate(x.tolist()):
        expected = oracle(row, bits)
        assert float(scale[i]) == pytest.approx(expected[0], rel=1e-9), i
        assert float(zero[i]) == expected[1], i


@pytest.mark.parametrize("bits", [3, 4, 6, 8])
def test_percentiles_are_the_official_codes(bits: int) -> None:
    assert_is_the_papers(percentile_scales, bits)


@pytest.mark.parametrize(
    "fault",
    [
        lambda x, bits: percentile_scales(x, bits + 1),
        lambda x, bits: (percentile_scales(x, bits)[0] * 1.001, percentile_scales(x, bits)[1]),
        lambda x, bits: (percentile_scales(x, bits)[0], percentile_scales(x, bits)[1] + 1),
        lambda x, bits: percentile_scales(x.clamp(-3, 20), bits),
    ],
)
def test_a_fault_in_percentiles_shows(fault) -> None:
    with pytest.raises(AssertionError):
        assert_is_the_papers(fault, 4)


def test_the_quantiles_are_tried_and_differ() -> None:
    """Few bits clip an outlier that many bits hold."""
    row = rows()[1:2]
    spans = [float(percentile_scales(row, bits)[0]) * (2**bits - 1) for bits in (3, 8)]
    ordered = row[0].sort().values.tolist()
    tried = [quantile(ordered, q) - quantile(ordered, 1 - q) for q in QUANTILES]
    assert spans[0] == pytest.approx(tried[0])
    assert spans[1] == pytest.approx(tried[2])


@pytest.mark.parametrize("value", [0.0, 3.5, -2.0])
def test_a_row_of_one_value_is_represented(value: float) -> None:
    row = torch.full((1, 50), value)
    scale, zero = percentile_scales(row, 4)
    codes = (torch.round(row / scale) + zero).clamp(0, 15)
    assert torch.allclose((codes - zero) * scale, row)


def test_grids_of_weights_hold_zero_and_codes() -> None:
    found = percentile_grids(rows(), 4)
    assert found.shape == (5, 2)
    assert bool((found[:, 0] > 0).all())
    assert bool(((found[:, 1] >= 0) & (found[:, 1] <= 15)).all())
    assert torch.equal(found[:, 1], found[:, 1].round())
    # all of a positive row fits, from zero on
    assert float(found[2, 1]) == 0.0
    assert float(found[2, 0]) * 15 > 0.9 * float(rows()[2].max())


def test_one_grid_for_a_tensor() -> None:
    x = rows()[:1].reshape(3, 10, 100)
    grid = percentile_affine(x, 4)
    scale, zero = oracle(x.flatten().tolist(), 4)
    assert (grid.bits, grid.zero_point) == (4, zero)
    assert grid.scale == pytest.approx(scale)
