"""NoisyQuant (arXiv 2211.16056) against its definition: noise tried point by point, in plain Python and float64."""

import pytest
import torch

from martlet.functional.quantize.logarithmic import fold_shift
from martlet.functional.quantize.noise import expected_rounding_error, noisy_bias, search_amplitude

SCALE = 0.3


def oracle(x: float, amplitude: float, points: int = 4000) -> float:
    """The mean over evenly spread noise of the squared error of rounding x + N and taking N away again."""
    total = 0.0
    for i in range(points):
        noise = amplitude * (2 * (i + 0.5) / points - 1)
        total += (round((x + noise) / SCALE) * SCALE - noise - x) ** 2
    return total / points


def assert_expected_error(function) -> None:
    for x in (0.0, 0.02, 0.1, 0.149, 0.151, -0.4, 1.27):
        for amplitude in (0.0, 0.03, 0.15, 0.2, 0.3, 0.77):
            found = float(function(torch.tensor(x, dtype=torch.float64), SCALE, amplitude))
            assert found == pytest.approx(oracle(x, amplitude), rel=2e-3, abs=1e-7)


def test_the_expected_error_is_the_mean_over_noise():
    assert_expected_error(expected_rounding_error)


@pytest.mark.parametrize(
    "fault",
    [
        lambda x, s, n: expected_rounding_error(x, s, n * 1.1),
        lambda x, s, n: expected_rounding_error(x + 0.01, s, n),
        lambda x, s, n: expected_rounding_error(x, s * 1.05, n),
        lambda x, s, n: expected_rounding_error(x, s, 0.0),
    ],
)
def test_a_fault_in_the_expected_error_shows(fault):
    with pytest.raises(AssertionError):
        assert_expected_error(fault)


def test_the_amplitude_found_has_the_least_error():
    x = torch.full((50,), 0.14) + torch.linspace(0, 0.01, 50)  # all near the edge between two values of the grid
    amplitude, ratio = search_amplitude(x, SCALE, 30)
    errors = {n: sum(oracle(v, n, 400) for v in x.tolist()) for n in [SCALE * i / 30 for i in range(31)]}
    assert errors[min(errors, key=lambda n: abs(n - amplitude))] == pytest.approx(min(errors.values()), rel=1e-3)
    assert ratio == pytest.approx(min(errors.values()) / errors[0.0], rel=1e-2)
    assert ratio < 0.5


def test_where_no_noise_helps_there_is_none():
    on_grid = torch.arange(-5, 6) * SCALE
    assert search_amplitude(on_grid, SCALE) == (0.0, 1.0)
    assert search_amplitude(on_grid + 0.01, SCALE) == (0.0, 1.0)


def test_noise_lowers_a_layers_error_where_that_is_predicted():
    """A heavy tail on a coarse grid: most values in the zero's step, none of them near zero."""
    generator = torch.Generator().manual_seed(0)
    tokens, channels, outputs = 40, 256, 12
    x = (torch.rand(tokens, channels, generator=generator) * 0.04 + 0.1).double()
    x[0, :8] = 9.0
    weight = torch.randn(outputs, channels, generator=generator).double()
    bias = torch.randn(outputs, generator=generator).double()
    amplitude, ratio = search_amplitude(x, SCALE)
    noise = noisy_bias(channels, amplitude, generator).double()
    rounded = lambda y: torch.round(y / SCALE) * SCALE  # noqa: E731
    exact = x @ weight.T + bias
    plain = rounded(x) @ weight.T + bias
    noisy = rounded(x + noise) @ weight.T + fold_shift(weight, bias, noise)
    by_hand = (rounded(x + noise) - noise) @ weight.T + bias
    assert torch.allclose(noisy, by_hand, atol=1e-10)
    assert float((rounded(x + noise) - noise - x).square().mean() / (rounded(x) - x).square().mean()) == pytest.approx(
        ratio, rel=0.1
    )
    assert (noisy - exact).square().mean() < 0.5 * (plain - exact).square().mean()


def test_noise_is_even_fixed_and_seeded():
    noise = noisy_bias(20000, 0.5, torch.Generator().manual_seed(3))
    assert torch.equal(noise, noisy_bias(20000, 0.5, torch.Generator().manual_seed(3)))
    assert not torch.equal(noise, noisy_bias(20000, 0.5, torch.Generator().manual_seed(4)))
    assert float(noise.abs().max()) <= 0.5
    assert float(noise.std()) == pytest.approx(0.5 / 3**0.5, rel=0.02)  # a normal one's would be its scale
    assert float(noise.mean()) == pytest.approx(0.0, abs=0.01)


def test_impossible_arguments_are_refused():
    x = torch.ones(3)
    for call in (
        lambda: expected_rounding_error(x, 0.0, 0.1),
        lambda: expected_rounding_error(x, 1.0, -0.1),
        lambda: search_amplitude(x, -1.0),
        lambda: search_amplitude(x, 1.0, 0),
        lambda: noisy_bias(0, 1.0, torch.Generator()),
        lambda: noisy_bias(4, -1.0, torch.Generator()),
    ):
        with pytest.raises(ValueError, match=r"scale|steps|channels"):
            call()
