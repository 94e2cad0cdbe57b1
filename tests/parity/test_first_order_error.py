"""The squared error of the logits from gradients alone, against a Jacobian written out; and that a fault would show."""

import itertools
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from martlet.functional.quantize.affine import affine_parameters, dequantize, quantize
from martlet.functional.quantize.ranges import Histogram, candidates, first_order_error

LOGITS, SHAPE = 4, (3, 5)


def case() -> tuple[Tensor, Tensor, list[tuple[Tensor, Tensor]]]:
    """x (B, 3, 5), the Jacobian (K, 3, 5) of the logits, and grids that clip more and more of x."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, *SHAPE, generator=generator).abs() * 3
    jacobian = torch.randn(LOGITS, *SHAPE, generator=generator).abs()  # errors to one side add up
    highs = [float(x.max()) * share for share in (1.0, 0.7, 0.4)]
    return x, jacobian, [affine_parameters(torch.tensor(0.0), torch.tensor(h), torch.uint8, False) for h in highs]


def oracle(x: Tensor, jacobian: Tensor, grid: tuple[Tensor, Tensor]) -> Tensor:
    """|J e|² of each image, value by value in float64."""
    scale, zero = grid
    error = (dequantize(quantize(x, scale, zero), scale, zero) - x).double()
    total = torch.zeros(len(x), dtype=torch.float64)
    for image, k in itertools.product(range(len(x)), range(LOGITS)):
        of_logit = sum(
            float(jacobian[k, i, j]) * float(error[image, i, j])
            for i, j in itertools.product(*(range(size) for size in SHAPE))
        )
        total[image] += of_logit**2
    return total


def assert_is_the_error_of_the_logits(function: Callable[..., Tensor]) -> None:
    """The mean over all 2^K signs is the expectation."""
    x, jacobian, grids = case()
    signs = list(itertools.product((-1.0, 1.0), repeat=LOGITS))
    for grid in grids:
        gradients = [torch.einsum("k,kij->ij", torch.tensor(r), jacobian).expand(x.shape) for r in signs]
        found = torch.stack([function(x, gradient, grid) for gradient in gradients]).double().mean(0)
        torch.testing.assert_close(found, oracle(x, jacobian, grid), rtol=1e-4, atol=1e-9)


def test_it_is_the_error_of_the_logits():
    assert_is_the_error_of_the_logits(first_order_error)


def of_the_diagonal(x: Tensor, gradient: Tensor, grid: tuple[Tensor, Tensor]) -> Tensor:
    scale, zero = grid
    return (gradient * (dequantize(quantize(x, scale, zero), scale, zero) - x)).square().flatten(1).sum(1)


@pytest.mark.parametrize(
    "fault",
    [
        of_the_diagonal,
        lambda x, gradient, grid: first_order_error(x, gradient.abs(), grid),
        lambda x, gradient, grid: first_order_error(x, gradient, (grid[0] * 1.1, grid[1])),
        lambda x, gradient, grid: first_order_error(x, gradient, grid).mean().expand(len(x)),
    ],
)
def test_a_fault_shows(fault: Callable[..., Tensor]):
    with pytest.raises(AssertionError):
        assert_is_the_error_of_the_logits(fault)


@pytest.mark.parametrize("symmetric", [True, False])
def test_candidates_begin_with_the_least_squared_error_and_stay_within_what_was_seen(symmetric: bool):
    histogram = Histogram()
    histogram.add(torch.randn(1000, generator=torch.Generator().manual_seed(2)).clamp(min=-0.2))
    dtype = torch.int8 if symmetric else torch.uint8
    found = candidates(histogram, dtype, symmetric)
    assert found[0] == histogram.mse(dtype, symmetric)
    assert (histogram.low, histogram.high) in found
    assert all(histogram.low <= low <= 0 <= high <= histogram.high for low, high in found)
    one_sided = [(low, high) for low, high in found[1:] if low == histogram.low and high != histogram.high]
    assert bool(one_sided) is not symmetric
