"""Dual clipping of RepQuant (arXiv 2402.05628): rounding in plain Python, its gradients, and what learning gains."""

import pytest
import torch
from torch import Tensor

from martlet.functional.quantize.dual_clipping import learn_clipping, rounded_channels
from martlet.functional.quantize.percentile import percentile_scales

BITS, CHANNELS = 4, 6
LAST = 2**BITS - 1


def rows(outliers: bool = True) -> Tensor:
    """Channels of different spread and middle; in the first half, one token reaches far to one side."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(900, CHANNELS, generator=generator) * torch.tensor([1.0, 2.0, 0.5, 1.0, 3.0, 1.0])
    x += torch.tensor([0.0, 1.0, 4.0, -2.0, 0.0, 0.0])
    if outliers:
        x[0, :3] += torch.tensor([7.0, 14.0, -3.5])
    return x


WEIGHT = torch.randn(5, CHANNELS, generator=torch.Generator().manual_seed(1))


def oracle(x: list[list[float]], scales: list[float], zeros: list[float]) -> list[list[float]]:
    codes = [[min(max(round(v / s) + z, 0), LAST) for v, s, z in zip(row, scales, zeros, strict=True)] for row in x]
    return [[(k - z) * s for k, s, z in zip(row, scales, zeros, strict=True)] for row in codes]


def output_error(x: Tensor, scales: Tensor, zeros: Tensor) -> float:
    rounded = torch.tensor(oracle(x.tolist(), scales.tolist(), zeros.tolist()))
    return float(((rounded - x) @ WEIGHT.T).square().mean())


def start(x: Tensor) -> tuple[Tensor, Tensor]:
    return percentile_scales(x.T, BITS)


@pytest.mark.parametrize("fault", [None, "range", "bits", "zero"])
def test_rounding_is_to_each_channels_codes(fault: str | None) -> None:
    x = rows().double()
    low, high = x.amin(0) * 0.8, x.amax(0) * 0.7
    scales = (high - low) / LAST
    zeros = torch.round(-low / scales) + (fault == "zero")
    expected = torch.tensor(oracle(x.tolist(), scales.tolist(), zeros.tolist()), dtype=x.dtype)
    found = rounded_channels(x, low, high * 1.1 if fault == "range" else high, BITS - 1 if fault == "bits" else BITS)
    assert torch.allclose(found, expected, atol=1e-9) == (fault is None)


def test_gradients_pass_within_and_go_to_the_ends_beyond() -> None:
    """d/dx is 1 within and 0 beyond; d/dhigh is 1 above and d/dlow 1 below, where the value is the end itself."""
    x = torch.tensor([[-5.0], [0.3], [7.0]], dtype=torch.float64, requires_grad=True)
    for row, (dx, dlow, dhigh) in enumerate([(0.0, 1.0, 0.0), (1.0, None, None), (0.0, 0.0, 1.0)]):
        low = torch.tensor([-1.0], dtype=torch.float64, requires_grad=True)
        high = torch.tensor([2.0], dtype=torch.float64, requires_grad=True)
        found = rounded_channels(x, low, high, BITS)[row, 0]
        by_x, by_low, by_high = torch.autograd.grad(found, [x, low, high])
        assert float(by_x[row, 0]) == pytest.approx(dx)
        if dlow is not None:
            assert float(by_low) == pytest.approx(dlow)
            assert float(by_high) == pytest.approx(dhigh)


def test_learning_lowers_the_output_error_by_clipping_both_ends() -> None:
    x = rows()
    first, learned = start(x), learn_clipping(x, WEIGHT, BITS, start(x))
    assert output_error(x, *learned) < 0.93 * output_error(x, *first)
    assert torch.equal(learned[1], learned[1].round())
    low, high = -learned[1] * learned[0], (LAST - learned[1]) * learned[0]
    cuts = torch.stack([low - x.amin(0), x.amax(0) - high]) / (x.amax(0) - x.amin(0))
    assert bool((cuts[:, 3:] > 0.01).all())
    assert float(cuts[0, 2]) > 3 * float(cuts[1, 2])  # where a token reaches far down, more is clipped there


def test_it_is_never_worse_than_the_start_and_a_step_can_be_none() -> None:
    for x in (rows(outliers=False), rows()):
        first = start(x)
        assert output_error(x, *learn_clipping(x, WEIGHT, BITS, first)) <= output_error(x, *first) * (1 + 1e-4)
        same = learn_clipping(x, WEIGHT, BITS, first, steps=0)
        assert torch.allclose(same[0], first[0], rtol=1e-5)
        assert torch.equal(same[1], first[1])


def test_the_layer_decides_what_is_clipped() -> None:
    """A channel that the layer doesn't read has no error to lower, and stays as it was."""
    x, weight = rows(), WEIGHT.clone()
    weight[:, 0] = 0.0
    first = start(x)
    learned = learn_clipping(x, weight, BITS, first)
    move = [abs(float(learned[0][c] / first[0][c]) - 1) for c in (0, 1)]
    assert move[0] < 0.1 < move[1]


def test_a_channel_of_one_value_keeps_its_start() -> None:
    x = rows()
    x[:, 4] = 2.5
    first = start(x)
    learned = learn_clipping(x, WEIGHT, BITS, first)
    assert (learned[0][4], learned[1][4]) == (first[0][4], first[1][4])
    assert bool(torch.isfinite(learned[0]).all())


def test_impossible_arguments_are_refused() -> None:
    x = rows()
    for call in (
        lambda: learn_clipping(x, WEIGHT, 1, start(x)),
        lambda: learn_clipping(x, WEIGHT[:, :3], BITS, start(x)),
        lambda: learn_clipping(x[:, :3], WEIGHT, BITS, start(x)),
    ):
        with pytest.raises(ValueError, match=r"bits|weight"):
            call()
