"""Rotations in plain Python and float64: QuaRot (arXiv 2404.00456), MambaQuant (arXiv 2501.13484)."""

import math

import pytest
import torch
from torch import Tensor

from martlet.functional.quantize.rotation import (
    hadamard,
    klt_basis,
    orthogonality_error,
    rotation,
    spread,
    standard_basis,
    variance_spread,
)

SIZES = (1, 2, 3, 5, 12, 20, 28, 48, 62, 64, 80, 96, 192)
"""Powers of two, Paley's orders, products of them, and some that no construction here has."""


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def rows(channels: int, count: int = 400) -> Tensor:
    """Correlated channels of unlike variances and means."""
    draw = torch.randn(count, channels, generator=generator(1), dtype=torch.float64)
    mixed = draw @ torch.randn(channels, channels, generator=generator(2), dtype=torch.float64)
    return mixed * torch.logspace(-1, 1.5, channels, dtype=torch.float64) + torch.arange(channels)


def covariance(x: Tensor) -> Tensor:
    return torch.atleast_2d(torch.cov(x.T, correction=0))


def layer_norm(x: Tensor) -> Tensor:
    return torch.nn.functional.layer_norm(x, x.shape[-1:])


@pytest.mark.parametrize("n", [1, 2, 4, 8, 12, 20, 24, 28, 36, 44, 48, 60, 64, 76, 192, 384, 768])
def test_hadamard_matrices_are_signs_in_orthogonal_rows(n: int) -> None:
    matrix = hadamard(n)
    assert matrix is not None
    assert set(matrix.flatten().tolist()) <= {1.0, -1.0}
    assert torch.equal(matrix @ matrix.T, n * torch.eye(n, dtype=torch.float64))


@pytest.mark.parametrize("n", [3, 5, 6, 10, 62, 92])
def test_orders_without_a_construction_say_so(n: int) -> None:
    assert hadamard(n) is None


@pytest.mark.parametrize("n", SIZES)
def test_rotations_are_orthogonal_and_keep_the_ones(n: int) -> None:
    x = rows(n)
    for basis in (standard_basis(n), klt_basis(covariance(x), keep_ones=True)):
        turned = rotation(basis, generator())
        assert orthogonality_error(turned) < 1e-5  # and far less
        assert orthogonality_error(turned) < 1e-12
        assert torch.allclose(turned.sum(1), torch.ones(n, dtype=torch.float64))
        assert torch.allclose(layer_norm(x @ turned), layer_norm(x) @ turned, atol=1e-9)
    assert orthogonality_error(2 * turned) > 1


def test_a_rotation_that_does_not_keep_the_ones_changes_a_layer_norm() -> None:
    x = rows(12)
    turned = rotation(torch.eye(12), generator())
    assert orthogonality_error(turned) < 1e-12
    assert not torch.allclose(layer_norm(x @ turned), layer_norm(x) @ turned, atol=0.1)


@pytest.mark.parametrize("n", [8, 12, 48])
def test_every_coordinate_goes_to_all_channels_alike(n: int) -> None:
    matrix = spread(n, generator())
    assert torch.allclose(matrix.abs(), torch.full_like(matrix, 1 / math.sqrt(n)))
    assert torch.allclose(matrix[-1], torch.full_like(matrix[-1], 1 / math.sqrt(n)))
    assert not torch.equal(matrix, spread(n, generator(1)))
    assert torch.equal(matrix, spread(n, generator()))


@pytest.mark.parametrize("n", [6, 7, 62])
def test_without_a_hadamard_matrix_an_outlier_is_spread_all_the_same(n: int) -> None:
    matrix = spread(n, generator())
    assert float(matrix.abs().max()) < 0.95
    assert torch.allclose(matrix[-1], torch.full_like(matrix[-1], 1 / math.sqrt(n)))


@pytest.mark.parametrize("keep_ones", [False, True])
def test_klt_basis_is_what_leaves_rows_uncorrelated_by_falling_variance(keep_ones: bool) -> None:
    x = rows(8)
    x = layer_norm(x) if keep_ones else x
    basis = klt_basis(covariance(x), keep_ones)
    n, turned = len(x), (x @ basis).tolist()
    means = [sum(row[j] for row in turned) / n for j in range(8)]
    found = [[sum((row[i] - means[i]) * (row[j] - means[j]) for row in turned) / n for j in range(8)] for i in range(8)]
    variances = [found[j][j] for j in range(8)]
    assert variances == sorted(variances, reverse=True)
    assert max(abs(found[i][j]) for i in range(8) for j in range(8) if i != j) < 1e-8 * variances[0]
    eigenvalues = torch.linalg.eigvalsh(covariance(x)).flip(0)
    assert variances == pytest.approx(eigenvalues.tolist(), abs=1e-8 * variances[0])


@pytest.mark.parametrize("keep_ones", [False, True])
@pytest.mark.parametrize("n", [12, 20, 48])
def test_klt_enhanced_rotation_gives_every_channel_the_mean_of_the_eigenvalues(n: int, keep_ones: bool) -> None:
    x = rows(n)
    x = layer_norm(x) if keep_ones else x
    before = covariance(x)
    enhanced = rotation(klt_basis(before, keep_ones), generator())
    after = covariance(x @ enhanced).diagonal()
    mean = torch.linalg.eigvalsh(before).mean()
    assert torch.allclose(after, mean.expand(n), rtol=1e-6)
    plain = covariance(x @ rotation(standard_basis(n), generator())).diagonal()
    assert variance_spread(after) < 1.0001 < variance_spread(plain) < variance_spread(before.diagonal())


def test_variance_spread_is_the_greatest_over_the_mean() -> None:
    assert variance_spread(torch.tensor([1.0, 1.0, 4.0])) == 2
    assert variance_spread(torch.tensor([0.0, 0.0, 5.0])) == pytest.approx(3)
    assert variance_spread(torch.zeros(3)) == 1
