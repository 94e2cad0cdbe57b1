"""Integer arithmetic against the paper's equations, step by step in whole numbers of any size, and against floats."""

import math
from collections.abc import Callable
from fractions import Fraction

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from martlet.core.errors import NumericsError
from martlet.functional.quantize import integer
from martlet.functional.quantize.integer import (
    MAX_SHIFT,
    SIGMOID_SLOPE,
    divide,
    dyadic,
    integer_layer_norm,
    integer_sqrt,
    requantize,
    shift_exp,
    shift_gelu,
    shiftmax,
)

BITS = 16
ONE = 2**10


# the paper, in Python's integers


def exp_oracle(code: int, one: int, terms: int) -> int:
    """ShiftExp of algorithm 1, with I_0 = one."""
    power = code + math.floor(Fraction(code, 2)) - math.floor(Fraction(code, 16))
    power = max(power, -terms * one)
    quotient = math.floor(Fraction(power, -one))
    rest = -(power - quotient * -one)
    base = math.floor(Fraction(-rest, 2)) + one
    return base * 2 ** (terms - quotient)


def divide_oracle(dividend: int, divisor: int, bits: int) -> int:
    """IntDiv."""
    return (2**62 // divisor * dividend) // 2 ** (62 - (bits - 1))


def shiftmax_oracle(row: list[int], one: int, bits: int) -> list[int]:
    powers = [exp_oracle(code - max(row), one, 15) for code in row]
    return [divide_oracle(power, sum(powers), bits) for power in powers]


def shift_gelu_oracle(code: int, one: int, bits: int) -> int:
    """Algorithm 2, with the larger of the value and 0 in the place of the row's maximum."""
    most = max(code, 0)
    first, second = exp_oracle(code - most, one, 23), exp_oracle(-most, one, 23)
    return code * divide_oracle(first, first + second, bits)


def layer_norm_oracle(row: list[int], epsilon: int, bits: int) -> list[int]:
    n = len(row)
    mean = math.floor(Fraction(sum(row), n) + Fraction(n // 2, n))
    root = max(math.isqrt(sum((x - mean) ** 2 for x in row) + epsilon), 1)
    return [(2**62 // root * (x - mean)) // 2 ** (62 - bits) for x in row]


def rows(n: int, spread: float, seed: int = 3, count: int = 40) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(count, n, generator=generator) * spread).round().long().clamp(-32768, 32767)


@pytest.mark.parametrize("spread", [3.0, 700.0, 9000.0])
def test_shiftmax_is_the_algorithm_code_by_code(spread: float) -> None:
    codes = rows(17, spread)
    expected = [shiftmax_oracle(row, ONE, BITS) for row in codes.tolist()]
    assert shiftmax(codes, ONE, BITS).tolist() == expected


@pytest.mark.parametrize("one", [1, 6, 1000, 2048])
def test_shift_gelu_is_the_algorithm_code_by_code(one: int) -> None:
    codes = rows(50, 5.0 * one)
    expected = [[shift_gelu_oracle(code, one, BITS) for code in row] for row in codes.tolist()]
    assert shift_gelu(codes, one, BITS).tolist() == expected


@pytest.mark.parametrize("spread", [0.0, 1.0, 300.0, 12000.0])
def test_layer_norm_is_the_algorithm_code_by_code(spread: float) -> None:
    codes = rows(24, spread) + 77
    expected = [layer_norm_oracle(row, 5, 30) for row in codes.tolist()]
    assert integer_layer_norm(codes, 5, 30).tolist() == expected


# float64


def softmax_error(one: int = ONE) -> tuple[float, float]:
    """Mean and largest error of probabilities, for scores of the spread that attention has."""
    x = torch.randn(200, 197, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) * 3
    found = shiftmax((x * one).round().long(), one, BITS).double() / 2 ** (BITS - 1)
    error = (found - torch.softmax(x, -1)).abs()
    return float(error.mean()), float(error.max())


def gelu_error(exact: Callable[[Tensor], Tensor]) -> tuple[float, float]:
    """Mean and largest error over [-8, 8]."""
    x = torch.linspace(-8, 8, 4001, dtype=torch.float64)
    found = shift_gelu((x * SIGMOID_SLOPE * ONE).round().long(), ONE, BITS)
    error = (found.double() / 2 ** (BITS - 1) / (SIGMOID_SLOPE * ONE) - exact(x)).abs()
    return float(error.mean()), float(error.max())


def layer_norm_error() -> float:
    """Largest error, for channels as unlike each other as those of a residual stream."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(100, 192, dtype=torch.float64, generator=generator)
    x = x + 20 * torch.randn(192, dtype=torch.float64, generator=generator)
    scale = float(x.abs().max()) / 32767
    codes = (x / scale).round().long()
    found = integer_layer_norm(codes, round(192 * 1e-6 / scale**2)).double() * math.sqrt(192) / 2**30
    centred = x - x.mean(-1, keepdim=True)
    return float((found - centred / (centred.square().mean(-1, keepdim=True) + 1e-6).sqrt()).abs().max())


def test_errors_against_floats() -> None:
    """Bounds are the paper's functions' own: 2^-r as a line is off by 6 %, and a sigmoid is no error function."""
    mean, most = softmax_error()
    assert mean < 2e-4
    assert most < 0.018
    mean, most = gelu_error(lambda x: x * torch.sigmoid(SIGMOID_SLOPE * x))
    assert mean < 2e-3
    assert most < 1e-2
    mean, most = gelu_error(torch.nn.functional.gelu)
    assert mean < 1e-2
    assert most < 0.025
    assert layer_norm_error() < 1e-3


@pytest.mark.parametrize("fault", ["no log2 e", "one term", "coarse scale"])
def test_the_comparison_with_floats_can_fail(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    original = integer.shift_exp
    if fault == "coarse scale":  # 1 / scale = 3 where it is 3.5
        x = torch.randn(200, 197, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) * 3
        found = shiftmax((x * 3.5).round().long(), 3, BITS).double() / 2 ** (BITS - 1)
        assert float((found - torch.softmax(x, -1)).abs().mean()) > 2e-4
        return
    faults = {
        "no log2 e": lambda codes, one, terms: original((codes * 11) >> 4, one, terms),
        "one term": lambda codes, one, terms: original(codes, one, 1),
    }
    monkeypatch.setattr(integer, "shift_exp", faults[fault])
    assert softmax_error()[0] > 2e-4
    assert gelu_error(lambda x: x * torch.sigmoid(SIGMOID_SLOPE * x))[1] > 1e-2


def test_the_comparison_code_by_code_can_fail(monkeypatch: pytest.MonkeyPatch) -> None:
    codes = rows(17, 700.0)
    expected = [shiftmax_oracle(row, ONE, BITS) for row in codes.tolist()]
    original = integer.divide
    monkeypatch.setattr(integer, "divide", lambda a, b, bits: original(a, b + 2**20, bits))
    assert shiftmax(codes, ONE, BITS).tolist() != expected


def test_probabilities_are_no_more_than_one_together() -> None:
    found = shiftmax(rows(197, 3000.0), ONE, BITS)
    assert int(found.min()) >= 0
    assert bool((found.sum(-1) <= 2 ** (BITS - 1)).all())
    assert bool((found.sum(-1) > 0.99 * 2 ** (BITS - 1)).all())


def test_gelu_of_a_value_does_not_depend_on_its_row() -> None:
    codes = torch.tensor([[-300, -5, 0, 7, 32767]])
    alone = torch.cat([shift_gelu(codes[:, i : i + 1], ONE, BITS) for i in range(5)], 1)
    assert torch.equal(shift_gelu(codes, ONE, BITS), alone)


@given(st.integers(0, 2**62 - 1))
def test_square_root(value: int) -> None:
    assert int(integer_sqrt(torch.tensor(value))) == max(math.isqrt(value), 1)


def test_square_root_around_squares() -> None:
    roots = torch.cat([torch.arange(2, 3000), torch.randint(2, 2**31 - 1, (3000,))])
    for value, expected in ((roots**2, roots), (roots**2 - 1, roots - 1), (roots**2 + 1, roots)):
        assert torch.equal(integer_sqrt(value), expected)


@given(st.integers(-(2**31) + 1, 2**31 - 1), st.floats(1e-4, 3.0), st.floats(-1e4, 1e4))
def test_requantize_is_a_multiplication_rounded(code: int, factor: float, offset: float) -> None:
    multiplier, shift = dyadic(torch.tensor(factor, dtype=torch.float64))
    shifted = torch.tensor(math.floor((Fraction(offset) + Fraction(1, 2)) * 2 ** int(shift)))
    found = int(requantize(torch.tensor(code), multiplier, shift, shifted, 33))
    exact = Fraction(factor) * code + Fraction(offset)
    expected = min(max(exact, -(2**32)), 2**32 - 1)
    assert abs(found - expected) <= Fraction(1, 2) + Fraction(abs(code)) * Fraction(factor) / 2**29 + Fraction(1, 2**10)


def test_requantize_saturates() -> None:
    multiplier, shift = dyadic(torch.tensor([1.0, 1.0]))
    codes = torch.tensor([-1000, 1000], dtype=torch.int32)
    assert requantize(codes, multiplier, shift, torch.zeros(2).long(), 8).tolist() == [-128, 127]


def test_dyadic_numbers() -> None:
    factors = torch.tensor([0.0, 1.0, -0.3, 1e-3, 1e-9, 1e-40, 5e8], dtype=torch.float64)
    multiplier, shift = dyadic(factors)
    assert int(shift.max()) <= MAX_SHIFT
    assert int(multiplier.abs().max()) <= 2**31
    error = (torch.ldexp(multiplier.double(), -shift) - factors).abs()
    assert bool((error <= torch.maximum(factors.abs() * 2**-30, torch.tensor(2.0 ** -(MAX_SHIFT + 1)))).all())
    for bad in (float("nan"), float("inf"), 2.0**31):
        with pytest.raises(NumericsError, match="a factor between two integer scales is NaN or too large"):
            dyadic(torch.tensor(bad))


def test_all_of_it_is_integers() -> None:
    codes = rows(8, 900.0)
    narrow = codes.to(torch.int32)
    results = [shiftmax(narrow, ONE, BITS), shift_gelu(narrow, ONE, BITS), integer_layer_norm(narrow, 1)]
    results += [integer_sqrt(narrow.abs()), shift_exp(-codes.abs(), ONE, 15), divide(codes * 0 + 1, codes * 0 + 3, 8)]
    assert {result.dtype for result in results} == {torch.int64}
