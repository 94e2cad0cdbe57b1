"""What a vision transformer computes, with integers alone: additions, multiplications, integer divisions and shifts.

A tensor of integer codes stands for scale · codes. Codes come in any integer type and are computed with in int64, in
which nothing here overflows for codes of 32 bits; `>>` rounds down, for negative codes too.

Source: Li and Gu, I-ViT: Integer-only Quantization for Efficient Vision Transformer Inference, 2023, arXiv 2207.01405.
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor

from martlet.core.errors import NumericsError

MULTIPLIER_BITS = 31
MAX_SHIFT = 44
"""Of a dyadic number. Leaves an offset of 17 bits room in int64; a factor below 2^-44 is 0."""
DIVISION_BITS = 62
"""Of the dividend in `divide`: int64 holds it, and a quotient of 16 bits keeps all of its own for sums below 2^46."""
SIGMOID_SLOPE = 1.702
"""GELU(x) ≈ x · sigmoid(1.702 x)."""


def dyadic(factor: Float[Tensor, "*c"]) -> tuple[Int[Tensor, "*c"], Int[Tensor, "*c"]]:
    """Multiplier m and shift e, int64, with m / 2^e closest to each factor; |m| ≤ 2^31 and 0 ≤ e ≤ MAX_SHIFT.

    Raises:
        NumericsError: a factor is NaN, or 2^31 or more.
    """
    factor = factor.double()
    exponent = torch.frexp(factor).exponent
    if not bool((factor.isfinite() & (exponent <= MULTIPLIER_BITS)).all()):
        raise NumericsError("a factor between two integer scales is NaN or too large")
    shift = (MULTIPLIER_BITS - exponent).clamp(max=MAX_SHIFT).long()
    return torch.round(torch.ldexp(factor, shift)).long(), shift


def requantize(
    codes: Int[Tensor, "*b"],
    multiplier: Int[Tensor, "*c"],
    shift: Int[Tensor, "*c"],
    offset: Int[Tensor, "*c"],
    bits: int,
) -> Int[Tensor, "*b"]:
    """(codes · multiplier + offset) >> shift, saturated to `bits` bits with a sign: codes on another scale.

    With offset 2^(shift - 1), or that and a constant on the scale before the shift, it rounds to the nearest.
    """
    moved = (codes.to(torch.int64) * multiplier + offset) >> shift
    return moved.clamp(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)


def divide(dividend: Int[Tensor, "*b"], divisor: Int[Tensor, "*b"], bits: int) -> Int[Tensor, "*b"]:
    """dividend / divisor, in units of 2^-(bits - 1), by one reciprocal a divisor. 0 ≤ dividend ≤ divisor.

    The paper's IntDiv: (⌊2^M / divisor⌋ · dividend) >> (M - (bits - 1)).
    """
    reciprocal = torch.full_like(divisor, 2**DIVISION_BITS) // divisor
    return (reciprocal * dividend) >> (DIVISION_BITS - (bits - 1))


def shift_exp(codes: Int[Tensor, "*b"], one: Tensor | int, terms: int) -> Int[Tensor, "*b"]:
    """e^x of x = codes / one ≤ 0, in units of 2^-terms / one; what is below 2^-terms becomes it (ShiftExp).

    e^x = 2^(x · log2 e), with log2 e ≈ 1.0111 in binary; of 2^-(q + r), 2^-q is a shift and 2^-r ≈ 1 - r / 2.
    """
    power = codes + (codes >> 1) - (codes >> 4)
    power = -power.clamp(min=-terms * one)  # (…) ≥ 0
    whole = power // one
    rest = power - whole * one
    return ((-rest >> 1) + one) << (terms - whole)


def shiftmax(codes: Int[Tensor, "*b n"], one: Tensor | int, bits: int, terms: int = 15) -> Int[Tensor, "*b n"]:
    """softmax of codes / one over the last axis, in units of 2^-(bits - 1) (algorithm 1)."""
    codes = codes.to(torch.int64)
    power = shift_exp(codes - codes.amax(-1, keepdim=True), one, terms)
    return divide(power, power.sum(-1, keepdim=True), bits)


def shift_gelu(codes: Int[Tensor, "*b"], one: Tensor | int, bits: int, terms: int = 23) -> Int[Tensor, "*b"]:
    """x · sigmoid(1.702 x) of x = codes / (1.702 one), in units of 2^-(bits - 1) / (1.702 one) (algorithm 2).

    The sigmoid of y is e^(y - m) / (e^(y - m) + e^-m) for any m. The paper takes the largest y of a row, and a value
    far below it falls under 2^-terms; with the larger of y and 0, one power is 1 and the other e^-|y|, in any row.
    """
    codes = codes.to(torch.int64)
    power = shift_exp(-codes.abs(), one, terms)
    unit = torch.full_like(codes, 2**terms) * one
    return codes * divide(torch.where(codes >= 0, unit, power), unit + power, bits)


def integer_sqrt(value: Int[Tensor, "*b"]) -> Int[Tensor, "*b"]:
    """⌊√value⌋ of 0 ≤ value < 2^62, and 1 of 0, so that it can divide; Newton's iteration with a shift for the half.

    Starts above the root, at the power of two that the value's number of bits gives, and never rises again.
    """
    value = value.to(torch.int64).clamp(min=1)
    bits, rest = torch.zeros_like(value), value
    for step in (32, 16, 8, 4, 2, 1):
        above = (rest >= 2**step).to(torch.int64) * step
        bits, rest = bits + above, rest >> above
    root = torch.ones_like(value) << ((bits >> 1) + 1)
    for _ in range(6):  # a start within 2 of the root converges to 62 bits in 5 steps, and rounding may cost one
        root = torch.minimum(root, (root + value // root) >> 1)
    return root


def integer_layer_norm(codes: Int[Tensor, "*b n"], epsilon: Tensor | int, bits: int = 30) -> Int[Tensor, "*b n"]:
    """(x - mean) / √(variance + eps) over the last axis, in units of √n / 2^bits.

    codes: of at most 2^20. epsilon: n · eps, in squared units of the codes.
    """
    codes, n = codes.to(torch.int64), codes.shape[-1]
    centred = codes - (codes.sum(-1, keepdim=True) + n // 2) // n
    deviation = integer_sqrt((centred * centred).sum(-1, keepdim=True) + epsilon)  # √n times the standard deviation
    reciprocal = torch.full_like(deviation, 2**DIVISION_BITS) // deviation
    return (reciprocal * centred) >> (DIVISION_BITS - bits)
