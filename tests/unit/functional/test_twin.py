"""Twin uniform grids against plain Python in float64, from section 3.2 of PTQ4ViT (arXiv 2111.12293)."""

import math
from dataclasses import replace

import pytest
import torch

from martlet.functional.quantize.logarithmic import GELU_SHIFT
from martlet.functional.quantize.twin import TwinGeluGrid, TwinSoftmaxGrid, covering_exponent


def softmax_values() -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    rows = torch.softmax(torch.randn(30, 40, generator=generator) * torch.linspace(0.5, 6, 30)[:, None], -1)
    return torch.cat([rows.flatten().double(), torch.tensor([0.0, 1.0, -0.1, 1.2])])


def gelu_values() -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    x = torch.nn.functional.gelu(torch.randn(1000, generator=generator).double() * 2)
    return torch.cat([x, torch.tensor([0.0, 30.0, -GELU_SHIFT, -1.0])])


def oracle_softmax(x: float, bits: int, exponent: int) -> tuple[int, float]:
    """R1 = [0, (2^(k - 1) - 1) Δ1], R2 the rest of [0, 1]; Δ2 = 2^m Δ1; k - 1 bits in either; between, the nearer."""
    half = 2 ** (bits - 1)
    coarse = 1 / (half - 1)
    fine = coarse / 2**exponent
    last = (half - 1) * fine
    beyond = min(place * coarse for place in range(half + 1) if place * coarse > last * (1 + 1e-12))
    if x <= last or x - last <= beyond - x:
        place = min(max(round(x / fine), 0), half - 1)
        return place, place * fine
    place = min(max(round(x / coarse), 0), half - 1)
    return half + place, place * coarse


def oracle_gelu(x: float, bits: int, exponent: int) -> tuple[int, float]:
    """R1 = [-2^(k - 1) Δ1, 0], which just covers the negative values; R2 = [0, 2^(k - 1) Δ2); Δ2 = 2^m Δ1."""
    half = 2 ** (bits - 1)
    fine = 0.16997121 / half
    if x < 0:
        place = min(max(round(x / fine), -half), 0)
        return place % (2 * half), place * fine
    place = min(max(round(x / (fine * 2**exponent)), 0), half - 1)
    return place, place * fine * 2**exponent


CASES = {TwinSoftmaxGrid: (softmax_values, oracle_softmax), TwinGeluGrid: (gelu_values, oracle_gelu)}


def assert_is_the_papers(kind, grid_of, bits: int, exponent: int) -> None:
    values, oracle = CASES[kind]
    x = values()
    grid = grid_of(kind(bits, exponent))
    codes = grid.quantize(x)
    assert codes.dtype == torch.uint8
    expected = [oracle(v, bits, exponent) for v in x.tolist()]
    assert codes.tolist() == [code for code, _ in expected]
    assert grid.dequantize(codes, torch.float64).tolist() == pytest.approx([v for _, v in expected], rel=1e-12)


@pytest.mark.parametrize("kind", list(CASES))
@pytest.mark.parametrize("bits", [2, 3, 4, 6, 8])
@pytest.mark.parametrize("exponent", [0, 1, 4, 7])
def test_twin_grids_are_the_papers(kind, bits, exponent):
    assert_is_the_papers(kind, lambda grid: grid, bits, exponent)


@pytest.mark.parametrize("kind", list(CASES))
@pytest.mark.parametrize(
    "fault", [lambda g: replace(g, exponent=g.exponent + 1), lambda g: replace(g, bits=g.bits + 1)]
)
def test_a_fault_in_a_twin_grid_shows(kind, fault):
    with pytest.raises(AssertionError):
        assert_is_the_papers(kind, fault, 4, 3)


@pytest.mark.parametrize("kind", list(CASES))
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_a_grid_holds_its_own_values(kind, bits):
    grid = kind(bits, 3)
    values = grid.table()
    assert len(values) == 2**bits
    assert torch.equal(grid.dequantize(grid.quantize(values), torch.float64), values)


def test_the_ends_are_on_the_grid():
    assert float(TwinSoftmaxGrid(4, 5).table().max()) == 1.0
    assert float(TwinGeluGrid(4, 5).table().min()) == -GELU_SHIFT


@pytest.mark.parametrize("kind", list(CASES))
def test_two_steps_err_less_than_one(kind):
    """The reason for the method: exponent 0 is one uniform grid, but for a negative range of its own."""
    x = CASES[kind][0]()
    x = x.clamp(0, 1) if kind is TwinSoftmaxGrid else x.clamp(max=6.0)

    def error(exponent: int) -> float:
        grid = kind(6, exponent)
        return float((grid.dequantize(grid.quantize(x), torch.float64) - x).square().mean())

    assert min(error(m) for m in range(1, 8)) < 0.7 * error(0)


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("high", [0.01, 0.16, 1.0, 7.3, 100.0])
def test_covering_exponent_is_the_least(bits, high):
    exponent = covering_exponent(bits, high)
    reach = (2 ** (bits - 1) - 1) * GELU_SHIFT / 2 ** (bits - 1)
    assert reach * 2.0**exponent >= high > reach * 2.0 ** (exponent - 1)


def test_impossible_grids_are_refused():
    for make in (
        lambda: TwinSoftmaxGrid(1, 3),
        lambda: TwinSoftmaxGrid(9, 3),
        lambda: TwinSoftmaxGrid(4, -1),
        lambda: TwinGeluGrid(1, 3),
        lambda: covering_exponent(4, 0.0),
        lambda: covering_exponent(4, math.inf),
    ):
        with pytest.raises(ValueError, match=r"bits|exponent|greatest"):
            make()
