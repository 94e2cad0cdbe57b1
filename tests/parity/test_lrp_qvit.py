"""LRP-QViT (arXiv 2401.11243), clipped channel-wise grids: in plain Python and float64, and what the clipping gains."""

import math
import statistics

import pytest
import torch
from torch import Tensor

from martlet.functional.quantize.channel_clipping import DEVIATIONS, clipped_scales, search_clipping
from martlet.functional.quantize.reparameterize import reparameterize_scales
from martlet.techniques.quantize.lrp_qvit import LRPQViT

BITS, CHANNELS, OUTPUTS = 4, 24, 6


def layer(seed: int = 0, outlier: float = 40.0) -> tuple[Tensor, Tensor]:
    """Rows of which one channel has a far greater range, and the weight that reads them."""
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(200, CHANNELS, generator=generator).double()
    rows[:, 3] *= outlier
    return rows, torch.randn(OUTPUTS, CHANNELS, generator=generator).double()


def oracle_scales(rows: Tensor, deviations: float) -> tuple[list[float], list[float]]:
    columns = rows.T.tolist()
    low, high = [min(c) for c in columns], [max(c) for c in columns]
    floor = statistics.mean(low) - deviations * statistics.pstdev(low)
    ceiling = statistics.mean(high) + deviations * statistics.pstdev(high)
    scales, zeros = [], []
    for a, b in zip(low, high, strict=True):
        ends = (max(a, floor), min(b, ceiling))
        a, b = ends if ends[1] > ends[0] else (a, b)
        scales.append((b - a) / (2**BITS - 1))
        zeros.append(round(-a / scales[-1]))
    return scales, zeros


def assert_scales(function, deviations: float) -> None:
    rows, _ = layer()
    scales, zeros = function(rows.amin(0), rows.amax(0), deviations, BITS)
    expected = oracle_scales(rows, deviations)
    assert scales.tolist() == pytest.approx(expected[0], rel=1e-12)
    assert zeros.tolist() == expected[1]


@pytest.mark.parametrize("deviations", [d for d in DEVIATIONS if d < math.inf] + [1000.0])
def test_ranges_end_where_most_channels_do(deviations: float) -> None:
    assert_scales(clipped_scales, deviations)


@pytest.mark.parametrize(
    "fault",
    [
        lambda low, high, d, bits: clipped_scales(low, high, d + 0.1, bits),
        lambda low, high, d, bits: clipped_scales(low, high, math.inf, bits),
        lambda low, high, d, bits: clipped_scales(low, high, d, bits - 1),
        lambda low, high, d, bits: clipped_scales(low * 1.1, high, d, bits),
    ],
)
def test_a_fault_in_the_ranges_shows(fault) -> None:
    with pytest.raises(AssertionError):
        assert_scales(fault, 2.0)


def test_without_a_limit_nothing_is_clipped() -> None:
    rows, _ = layer()
    scales, _ = clipped_scales(rows.amin(0), rows.amax(0), math.inf, BITS)
    assert torch.allclose(scales * (2**BITS - 1), rows.amax(0) - rows.amin(0))


def test_a_channel_that_lies_beyond_keeps_its_range() -> None:
    low, high = torch.zeros(10), torch.ones(10)
    low[0], high[0] = 50.0, 60.0
    scale, zero = clipped_scales(low, high, 1.0, BITS)
    assert float(scale[0]) == pytest.approx(10 / 15)
    assert float(zero[0]) == round(-50 / (10 / 15))


def test_a_channel_of_one_value_is_represented() -> None:
    values = torch.tensor([0.0, 3.0, -2.0])
    scale, zero = clipped_scales(values, values, math.inf, BITS)
    codes = (torch.round(values / scale) + zero).clamp(0, 15)
    assert torch.allclose((codes - zero) * scale, values)


def to_even_grid(row: list[float], bits: int) -> list[float]:
    low, high = min(*row, 0.0), max(*row, 0.0)
    scale = (high - low) / (2**bits - 1)
    zero = round(-low / scale)
    return [(min(max(round(v / scale) + zero, 0), 2**bits - 1) - zero) * scale for v in row]


def oracle_error(rows: Tensor, weight: Tensor, deviations: float) -> float:
    """Squared error of the outputs once one grid holds all channels, and each row of the changed weight has its own."""
    scales, zeros = oracle_scales(rows, deviations) if deviations < math.inf else oracle_scales(rows, 1e9)
    target, zero = statistics.mean(scales), round(statistics.mean(zeros))
    changed = [[w * s / target for w, s in zip(row, scales, strict=True)] for row in weight.tolist()]
    rounded_weight = [to_even_grid(row, BITS) for row in changed]
    total = 0.0
    for row in rows.tolist():
        moved = [(x + s * (z - zero)) / (s / target) for x, s, z in zip(row, scales, zeros, strict=True)]
        codes = [min(max(round(m / target) + zero, 0), 2**BITS - 1) for m in moved]
        rounded = [(c - zero) * target for c in codes]
        for exact_w, w in zip(changed, rounded_weight, strict=True):
            exact = math.fsum(a * b for a, b in zip(exact_w, moved, strict=True))
            total += (math.fsum(a * b for a, b in zip(w, rounded, strict=True)) - exact) ** 2
    return total


@pytest.mark.parametrize("outlier", [1.0, 5.0, 40.0])
def test_the_limit_is_the_one_of_least_output_error(outlier: float) -> None:
    rows, weight = layer(1, outlier)
    change = search_clipping(rows, weight, BITS, BITS)
    errors = {d: oracle_error(rows, weight, d) for d in DEVIATIONS}
    chosen = [
        d
        for d in DEVIATIONS
        if torch.allclose(
            change.ratio, reparameterize_scales(*clipped_scales(rows.amin(0), rows.amax(0), d, BITS)).ratio
        )
    ]
    assert min(errors.values()) == pytest.approx(min(errors[d] for d in chosen), rel=1e-9)
    assert max(errors.values()) > 1.05 * min(errors.values())


def test_clipping_can_be_left_out_and_lowers_the_error_where_a_channel_stands_out() -> None:
    """On rows other than those it was chosen on."""
    rows, weight = layer(2)
    held_out, _ = layer(3)

    def error(technique: LRPQViT) -> float:
        change = technique.change(rows, [weight])
        moved, (wider, _) = (held_out + change.offset) / change.ratio, change.into_linear(weight, None)
        grid_scale, zero = change.scale, change.zero_point  # type: ignore[attr-defined]
        rounded = (torch.clamp(torch.round(moved / grid_scale) + zero, 0, 15) - zero) * grid_scale
        rounded_weight = torch.tensor([to_even_grid(row, BITS) for row in wider.tolist()]).double()
        return float((rounded @ rounded_weight.T - moved @ wider.T).square().mean())

    assert LRPQViT(clip=False).change(rows, [weight]).ratio.tolist() == pytest.approx(
        [s / statistics.mean(oracle_scales(rows, 1e9)[0]) for s in oracle_scales(rows, 1e9)[0]]
    )
    assert error(LRPQViT()) < 0.9 * error(LRPQViT(clip=False))


def test_an_error_that_is_nan_is_refused() -> None:
    rows, weight = layer()
    with pytest.raises(ValueError, match="an error that is NaN"):
        search_clipping(rows, weight * math.nan, BITS, BITS)
