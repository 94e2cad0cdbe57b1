"""Logarithmic grids against plain Python in float64, written from their papers; and that a fault would show.

Lin et al., FQ-ViT, arXiv 2111.13824; Li et al., RepQ-ViT, arXiv 2212.08254; Wu et al., AdaLog, arXiv 2407.12951;
Zhong et al., I&S-ViT, arXiv 2311.10126.
"""

import math
from dataclasses import replace
from fractions import Fraction

import pytest
import torch

from martlet.functional.quantize.logarithmic import (
    ADALOG_DENOMINATOR,
    GELU_SHIFT,
    SULQ_SHIFTS,
    LogarithmicGrid,
    ShiftUniformLog2Grid,
    fold_shift,
    search_shift,
    sqrt2_as_log2,
)

ONE = torch.tensor(1.0, dtype=torch.float64)
FRACTIONS = [(1, 1), (1, 2), (10, ADALOG_DENOMINATOR), (37, ADALOG_DENOMINATOR), (71, ADALOG_DENOMINATOR)]


def softmax(rows: int = 40, tokens: int = 50, seed: int = 0) -> torch.Tensor:
    """Sharp and flat rows of attention (rows, tokens), in float64."""
    generator = torch.Generator().manual_seed(seed)
    sharpness = torch.linspace(0.3, 6, rows)[:, None]
    return torch.softmax(torch.randn(rows, tokens, generator=generator) * sharpness, -1).double()


def oracle_code(x: float, bits: int, scale: float, base: float, shift: float) -> int:
    """clamp(round(-log_b((x + shift) / s)), 0, 2^bits - 1)."""
    ratio = (x + shift) / scale
    if ratio <= 0:
        return 2**bits - 1
    return min(max(round(-math.log(ratio) / math.log(base)), 0), 2**bits - 1)


def oracle_value(code: int, bits: int, scale: float, base: float, shift: float) -> float:
    return (0.0 if code == 2**bits - 1 else scale * base**-code) - shift


def assert_is_the_papers(grid_of, bits: int, numerator: int, denominator: int, shift: float) -> None:
    scale = 0.83
    grid = grid_of(LogarithmicGrid(bits, scale * ONE, numerator, denominator, shift))
    x = torch.cat([softmax().flatten(), torch.tensor([0.0, 1e-300, 1.0, 2.0, scale, -0.1])]) - shift
    base = 2 ** (numerator / denominator)
    codes = grid.quantize(x)
    assert codes.dtype == torch.uint8
    assert codes.tolist() == [oracle_code(v, bits, scale, base, shift) for v in x.tolist()]
    expected = [oracle_value(k, bits, scale, base, shift) for k in codes.tolist()]
    assert grid.dequantize(codes).tolist() == pytest.approx(expected, rel=1e-12, abs=1e-15)


def assert_integers(integers, bits: int, numerator: int, denominator: int) -> None:
    """The shift and the mantissa of every code, in exact fractions but for the one power of two."""
    shifts, mantissas = integers
    unit = 2 * (2**bits - 1)
    for code in range(2**bits - 1):
        exponent = Fraction(code * numerator, denominator)
        whole = math.floor(exponent)
        assert int(shifts[code]) == whole
        assert int(mantissas[code]) == round(2 ** float(whole - exponent) * unit)
        assert 2**bits - 1 <= int(mantissas[code]) <= unit
    assert int(mantissas[-1]) == 0


@pytest.mark.parametrize(("numerator", "denominator"), FRACTIONS)
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("shift", [0.0, GELU_SHIFT])
def test_codes_and_values_are_the_papers(numerator, denominator, bits, shift):
    assert_is_the_papers(lambda grid: grid, bits, numerator, denominator, shift)


@pytest.mark.parametrize(
    "fault",
    [
        lambda grid: replace(grid, numerator=grid.numerator + 1),
        lambda grid: replace(grid, scale=grid.scale * 1.2),
        lambda grid: replace(grid, bits=grid.bits + 1),
        lambda grid: replace(grid, shift=grid.shift + 0.05),
        lambda grid: replace(grid, rounded=True),
    ],
)
@pytest.mark.parametrize("shift", [0.0, GELU_SHIFT])
def test_a_fault_in_a_grid_shows(fault, shift):
    with pytest.raises(AssertionError):
        assert_is_the_papers(fault, 4, 29, ADALOG_DENOMINATOR, shift)


@pytest.mark.parametrize(("numerator", "denominator"), FRACTIONS)
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_the_integer_form_is_a_shift_and_a_rounded_fraction(numerator, denominator, bits):
    grid = LogarithmicGrid(bits, ONE, numerator, denominator)
    shifts, mantissas = grid.integers()
    assert_integers((shifts, mantissas), bits, numerator, denominator)
    rounded = replace(grid, rounded=True)
    values = (mantissas.double() / (2 * (2**bits - 1)) * 2.0 ** -shifts.double()).tolist()
    assert rounded.dequantize(torch.arange(2**bits).byte()).tolist() == pytest.approx(values, rel=1e-14)
    # a fraction is at least 1/2 and is rounded to a multiple of 1 / (2 (2^bits - 1))
    assert ((rounded.table() - grid.table()) / grid.table())[:-1].abs().max() <= 0.5 / (2**bits - 1) + 1e-12


def test_a_fault_in_the_integer_form_shows():
    grid = LogarithmicGrid(4, ONE, 29, ADALOG_DENOMINATOR)
    shifts, mantissas = grid.integers()
    for fault in [(shifts + 1, mantissas), (shifts, mantissas.roll(1)), (shifts, mantissas - 1), (mantissas, shifts)]:
        with pytest.raises(AssertionError):
            assert_integers(fault, 4, 29, ADALOG_DENOMINATOR)


def test_log2_of_an_integer_form_is_exact():
    grid = LogarithmicGrid(4, ONE)
    assert torch.equal(replace(grid, rounded=True).table(), grid.table())


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_sqrt2_read_as_log2_is_the_same_value(bits):
    """RepQ-ViT: √2^-k = 2^floor(-k / 2) times 1, or √2 where k is odd."""
    scale = 0.7 * ONE
    codes = torch.arange(2**bits).byte()
    shifts, scales = sqrt2_as_log2(codes, scale, bits)
    assert shifts.tolist() == [-math.floor(-k / 2) for k in range(2**bits)]
    expected = LogarithmicGrid(bits, scale, 1, 2).dequantize(codes)
    assert (scales * 2.0 ** -shifts.double()).tolist() == pytest.approx(expected.tolist(), rel=1e-14)
    wrong = scale * 2.0 ** -(codes // 2).double()  # without the parity
    assert wrong[:-1].tolist() != pytest.approx(expected[:-1].tolist(), rel=1e-3)


def test_scales_broadcast_over_heads():
    x = softmax(24, 10).reshape(2, 3, 4, 10)
    scale = torch.tensor([0.2, 0.5, 1.0], dtype=torch.float64).reshape(3, 1, 1)
    grid = LogarithmicGrid(4, scale, 29, ADALOG_DENOMINATOR)
    for head in range(3):
        alone = replace(grid, scale=scale[head, 0, 0])
        codes = grid.quantize(x)[:, head]
        assert torch.equal(codes, alone.quantize(x[:, head]))
        assert torch.equal(grid.dequantize(grid.quantize(x))[:, head], alone.dequantize(codes))


def test_folded_shift_leaves_the_linear_layer_as_it_was():
    generator = torch.Generator().manual_seed(2)
    x, weight, bias = (torch.randn(*s, generator=generator).double() for s in [(5, 6), (4, 6), (4,)])
    per_channel = torch.rand(6, generator=generator).double()
    for shift in (GELU_SHIFT, per_channel):
        exact = x @ weight.T + bias
        assert torch.allclose((x + shift) @ weight.T + fold_shift(weight, bias, shift), exact, atol=1e-12)
        assert torch.allclose((x + shift) @ weight.T + fold_shift(weight, None, shift), exact - bias, atol=1e-12)
        assert not torch.allclose((x + shift) @ weight.T + bias, exact, atol=1e-3)


def test_the_shift_of_a_gelu_is_its_least_value():
    x = torch.linspace(-1, -0.5, 100001, dtype=torch.float64)
    least = torch.nn.functional.gelu(x).min()
    assert 0 <= GELU_SHIFT + least < 1e-8


def oracle_sulq(x: float, bits: int, shift: float, low: float, high: float) -> tuple[int, float]:
    step = (high - low) / (2**bits - 1)
    code = min(max(round((math.log2(x + shift) - low) / step), 0), 2**bits - 1)
    return code, 2.0 ** round(low + code * step) - shift


def assert_sulq(grid_of, bits: int, shift: float) -> None:
    x = softmax()
    low, high = (math.log2(v + shift) for v in (float(x.min()), float(x.max())))
    grid = grid_of(ShiftUniformLog2Grid(bits, shift, low, high))
    codes = grid.quantize(x)
    found = grid.dequantize(codes, torch.float64)
    expected = [oracle_sulq(v, bits, shift, low, high) for v in x.flatten().tolist()]
    assert codes.flatten().tolist() == [code for code, _ in expected]
    assert found.flatten().tolist() == pytest.approx([value for _, value in expected], rel=1e-12)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("shift", [0.001, 0.05, 1.0])
def test_sulq_is_the_papers(bits, shift):
    assert_sulq(lambda grid: grid, bits, shift)


@pytest.mark.parametrize(
    "fault",
    [
        lambda grid: replace(grid, shift=grid.shift * 2),
        lambda grid: replace(grid, low=grid.low - 0.4),
        lambda grid: replace(grid, high=grid.high + 0.6),
        lambda grid: replace(grid, bits=grid.bits - 1),
    ],
)
def test_a_fault_in_sulq_shows(fault):
    with pytest.raises(AssertionError):
        assert_sulq(fault, 4, 0.02)


@pytest.mark.parametrize("bits", [3, 4])
def test_the_shift_found_has_the_least_error(bits):
    x = softmax()
    best = search_shift(x, bits)

    def error(shift: float) -> float:
        low, high = (math.log2(v + shift) for v in (float(x.min()), float(x.max())))
        return sum((oracle_sulq(v, bits, shift, low, high)[1] - v) ** 2 for v in x.flatten().tolist())

    errors = {shift: error(shift) for shift in SULQ_SHIFTS}
    assert best.shift == min(errors, key=errors.__getitem__)
    assert errors[best.shift] < max(errors.values())
    assert 2.0 ** round(best.low) - best.shift <= float(x.min()) + best.shift  # the range reaches down to the least


def test_an_adapted_base_errs_less_than_base_2():
    x = softmax(200)
    errors = {}
    for numerator in range(10, 80):
        grid = LogarithmicGrid(4, x.max(), numerator, ADALOG_DENOMINATOR)
        errors[numerator] = float((grid.dequantize(grid.quantize(x)) - x).square().mean())
    assert min(errors.values()) < 0.7 * errors[ADALOG_DENOMINATOR]


@pytest.mark.parametrize(
    "make",
    [
        lambda: LogarithmicGrid(1, ONE),
        lambda: LogarithmicGrid(9, ONE),
        lambda: LogarithmicGrid(4, 0 * ONE),
        lambda: LogarithmicGrid(4, ONE, 0),
        lambda: LogarithmicGrid(4, ONE, 1, 0),
        lambda: ShiftUniformLog2Grid(4, 0.0, -3.0, 0.0),
        lambda: ShiftUniformLog2Grid(4, 0.1, 0.0, 0.0),
        lambda: ShiftUniformLog2Grid(16, 0.1, -3.0, 0.0),
        lambda: search_shift(torch.tensor([-0.1, 0.5]), 4),
        lambda: search_shift(torch.tensor([0.5, 0.5]), 4),
        lambda: search_shift(torch.tensor([0.1, 0.5]), 4, ()),
    ],
)
def test_impossible_grids_are_refused(make):
    with pytest.raises(ValueError, match=r"bits|scale|base|shift|range|value"):
        make()


def test_float32_agrees_with_float64():
    """Apart from values on the edge between two codes, of which there are hardly any."""
    x = softmax(100)
    for numerator, denominator in FRACTIONS:
        grid = LogarithmicGrid(4, ONE.float(), numerator, denominator)
        assert (grid.quantize(x.float()) != replace(grid, scale=ONE).quantize(x)).float().mean() < 1e-3
        assert grid.dequantize(grid.quantize(x.float())).dtype == torch.float32
