"""Logarithmic quantization of what a softmax or a GELU gives: many small values, few large ones.

A grid is frozen; it turns values into codes (uint8, as many different ones as 2^bits) and codes into values. All the
values of a grid are `table()`, so that an engine can look them up.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int, UInt8
from torch import Tensor

GELU_SHIFT = 0.16997121  # what has to be added to a GELU's output for it to be at least 0, as min x Φ(x) = -0.169971207
ADALOG_DENOMINATOR = 37  # r of AdaLog's base 2^(q/r)
SULQ_SHIFTS = (0.001, 0.005, 0.01, 0.02, 0.03, 0.04, 0.05, 0.1, 0.2, 0.5, 1.0)


def check_bits(bits: int, least: int = 2, most: int = 8) -> None:
    """Raises ValueError if codes of so many bits aren't supported."""
    if not least <= bits <= most:
        raise ValueError(f"{bits} bits; from {least} to {most} are possible")


@dataclass(frozen=True)
class LogarithmicGrid:
    """Code k stands for scale · b^-k - shift, with the base b = 2^(numerator / denominator); the last for -shift.

    log2 is 1/1, log√2 is 1/2; AdaLog chooses any numerator over 37. `scale` is positive, a scalar or broadcastable to
    the values. `shift` is for values that go below 0: GELU_SHIFT after a GELU. `rounded` takes the integer form's
    values, whose fraction of two has `bits` bits.

    Source: Lin et al., FQ-ViT, 2022, arXiv 2111.13824 (log2 of the attention map); Li et al., RepQ-ViT, 2023, arXiv
    2212.08254 (log√2); Wu et al., AdaLog, 2024, arXiv 2407.12951 (any base, its integer form, the shift). Differs: the
    official code of the latter two gives 0 to every value beyond the last code and still keeps that code, which is
    2^bits + 1 values; here the last code is that 0. It can't be left out: what a softmax gives is mostly near 0, and
    hundreds of tokens that are raised to the least power outweigh the few that matter.

    Raises:
        ValueError: bits not from 2 to 8, a scale or a fraction that isn't positive.
    """

    bits: int
    scale: Tensor
    numerator: int = 1
    denominator: int = 1
    shift: float = 0.0
    rounded: bool = False

    def __post_init__(self) -> None:
        check_bits(self.bits)
        if self.numerator < 1 or self.denominator < 1:
            raise ValueError(f"base 2^({self.numerator}/{self.denominator}); it has to be above 1")
        if not bool((self.scale > 0).all()):
            raise ValueError("a scale isn't positive")

    def quantize(self, x: Tensor) -> UInt8[Tensor, "*s"]:
        """Codes round(-log_b((x + shift) / scale)), saturated at both ends; x of any shape."""
        last = 2**self.bits - 1
        ratio = ((x + self.shift) / self.scale).clamp(min=torch.finfo(x.dtype).tiny)
        return torch.round(-torch.log2(ratio) * self.denominator / self.numerator).clamp(0, last).to(torch.uint8)

    def dequantize(self, codes: UInt8[Tensor, "*s"]) -> Tensor:
        """The values that codes stand for, in scale's type."""
        return self.table()[codes.long()] * self.scale - self.shift

    def table(self) -> Float[Tensor, " levels"]:
        """The value of every code, for a scale of 1 and before the shift, in scale's type."""
        codes = torch.arange(2**self.bits, device=self.scale.device)
        if self.rounded:
            shifts, mantissas = self.integers()
            values = mantissas.double() / (2 ** (self.bits + 1) - 2) * torch.exp2(-shifts.double())
        else:
            values = torch.exp2(-codes.double() * self.numerator / self.denominator)
        values[-1] = 0.0
        return values.to(self.scale.dtype)

    def integers(self) -> tuple[Int[Tensor, " levels"], Int[Tensor, " levels"]]:
        """For each code a shift to the right, and a mantissa over 2 (2^bits - 1), from 2^bits - 1 to twice that.

        b^-k = 2^-⌊qk / r⌋ · 2^-((qk mod r) / r): the first factor is the shift; the second, in (1/2, 1], is rounded.
        The last mantissa is 0.
        """
        product = torch.arange(2**self.bits, device=self.scale.device) * self.numerator  # q k
        shifts = product // self.denominator
        fractions = torch.exp2(-(product % self.denominator).double() / self.denominator)
        mantissas = torch.round(fractions * (2 ** (self.bits + 1) - 2)).long()
        mantissas[-1] = 0
        return shifts, mantissas


def sqrt2_as_log2(codes: UInt8[Tensor, "*s"], scale: Tensor, bits: int) -> tuple[UInt8[Tensor, "*s"], Tensor]:
    """Shifts and scales with which a log√2 grid's codes are read as log2: scale · √2^-k = scales · 2^-shifts.

    shifts = ⌈k / 2⌉; odd codes have √2 times the scale, and the last code, which is zero, has none. Source: RepQ-ViT,
    scale reparameterization for softmax.
    """
    odd = codes % 2
    scales = torch.where(odd.bool(), scale * 2**0.5, scale)
    return codes // 2 + odd, torch.where(codes == 2**bits - 1, 0.0, scales)


def fold_shift(
    weight: Float[Tensor, "o i"], bias: Float[Tensor, " o"] | None, shift: float | Float[Tensor, " i"]
) -> Float[Tensor, " o"]:
    """The bias with which a linear layer that is given x + shift answers as to x: b - W shift.

    With the rounded weight the layer runs with, this is exact. Source: AdaLog, bias reparameterization.
    """
    moved = (weight * shift).sum(1)
    return -moved if bias is None else bias - moved


@dataclass(frozen=True)
class ShiftUniformLog2Grid:
    """SULQ: code k stands for 2^round(low + k step) - shift, where low and high bound log2(x + shift).

    Rounding after the uniform steps keeps every value a power of two, so several codes may share one where step < 1.

    Source: Zhong et al., I&S-ViT, 2023, arXiv 2311.10126 (SULQ). Differs: the uniform part starts at `low`, as in
    the official code, and not at an integer zero point. That code, once calibrated, divides the range into one step
    more than bits allow (2^bits + 1 codes); here there are 2^bits.

    Raises:
        ValueError: bits not from 2 to 8, a shift that isn't positive, an empty range.
    """

    bits: int
    shift: float
    low: float
    high: float

    def __post_init__(self) -> None:
        check_bits(self.bits)
        if self.shift <= 0:
            raise ValueError(f"shift {self.shift}; it has to be positive, as zero has no logarithm")
        if not self.low < self.high:
            raise ValueError(f"an empty range of logarithms, from {self.low} to {self.high}")

    @property
    def step(self) -> float:
        return (self.high - self.low) / (2**self.bits - 1)

    def quantize(self, x: Tensor) -> UInt8[Tensor, "*s"]:
        """Codes round((log2(x + shift) - low) / step), saturated at both ends; x of any shape, at least -shift."""
        logarithm = torch.log2((x + self.shift).clamp(min=torch.finfo(x.dtype).tiny))
        return torch.round((logarithm - self.low) / self.step).clamp(0, 2**self.bits - 1).to(torch.uint8)

    def dequantize(self, codes: UInt8[Tensor, "*s"], dtype: torch.dtype = torch.float32) -> Tensor:
        """The values that codes stand for."""
        return self.table().to(codes.device, dtype)[codes.long()]

    def table(self) -> Float[Tensor, " levels"]:
        """The value of every code, in float64."""
        codes = torch.arange(2**self.bits, dtype=torch.float64)
        return torch.exp2(torch.round(self.low + codes * self.step)) - self.shift


def search_shift(x: Tensor, bits: int, shifts: Sequence[float] = SULQ_SHIFTS) -> ShiftUniformLog2Grid:
    """The SULQ grid over x's range whose shift gives the least squared error on x, which is at least 0.

    Source: I&S-ViT; the shifts to choose from are the official code's.

    Raises:
        ValueError: x has a negative value, or only one value.
    """
    low, high = (float(v) for v in torch.aminmax(x))
    if low < 0:
        raise ValueError(f"a value of {low}; a softmax gives none below 0")
    best, least = None, float("inf")
    for shift in shifts:
        ends = torch.log2(torch.tensor([low + shift, high + shift], dtype=torch.float64)).tolist()
        grid = ShiftUniformLog2Grid(bits, shift, *ends)
        error = float((grid.dequantize(grid.quantize(x), x.dtype) - x).square().mean())
        if error < least:
            best, least = grid, error
    if best is None:
        raise ValueError("no shift to choose from, or a value that is NaN")
    return best
