"""Number formats for weights: a grid that is fitted to each output row, or to each group of a row's columns.

A grid's parameters are a row of numbers, the first of them the scale. Codes are uint8: indices of `values()`.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from statistics import NormalDist
from typing import Protocol

import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from martlet.functional.quantize.logarithmic import check_bits

CLIP_STEP = 0.01  # between the fractions of the range that a search for the best clipping tries
FLOAT8 = {"fp8_e4m3": torch.float8_e4m3fn, "fp8_e5m2": torch.float8_e5m2}


class WeightGrid(Protocol):
    """What rounding needs of a format: parameters from weights, codes from weights, weights from codes."""

    def fit(self, weight: Float[Tensor, "o n"]) -> Float[Tensor, "o p"]: ...

    def quantize(self, weight: Float[Tensor, "o n"], parameters: Float[Tensor, "o p"]) -> UInt8[Tensor, "o n"]: ...

    def dequantize(self, codes: UInt8[Tensor, "o n"], parameters: Float[Tensor, "o p"]) -> Float[Tensor, "o n"]: ...


@dataclass(frozen=True)
class IntegerGrid:
    """Unsigned integers of `bits` bits; parameters are the scale and the zero point.

    A symmetric grid has its zero point at 2^(bits - 1) and leaves code 0 unused, so that it mirrors; another one covers
    the least and the greatest weight, and zero. `least` below 1 searches, for the least squared error, what fraction of
    that range to cover, from all of it down to `least`, and clips the rest.

    Raises:
        ValueError: bits not from 2 to 8, or least not in (0, 1].
    """

    bits: int
    symmetric: bool = True
    least: float = 1.0

    def __post_init__(self) -> None:
        check_bits(self.bits)
        _check_fraction(self.least)

    def fit(self, weight: Float[Tensor, "o n"]) -> Float[Tensor, "o 2"]:
        low, high = weight.amin(1).clamp(max=0.0), weight.amax(1).clamp(min=0.0)  # (o)
        return _best_clipping(self, weight, [self._cover(low * part, high * part) for part in _fractions(self.least)])

    def _cover(self, low: Tensor, high: Tensor) -> Float[Tensor, "o 2"]:
        if self.symmetric:
            scale = torch.maximum(-low, high) / (2 ** (self.bits - 1) - 1)
            zero = torch.full_like(scale, 2 ** (self.bits - 1))
        else:
            scale = (high - low) / (2**self.bits - 1)
            zero = torch.round(-low / torch.where(scale > 0, scale, 1.0))
        return torch.stack([torch.where(scale > 0, scale, 1.0), zero], 1)

    def quantize(self, weight: Float[Tensor, "o n"], parameters: Float[Tensor, "o 2"]) -> UInt8[Tensor, "o n"]:
        scale, zero = parameters[:, :1], parameters[:, 1:]
        return torch.clamp(torch.round(weight / scale) + zero, int(self.symmetric), 2**self.bits - 1).to(torch.uint8)

    def dequantize(self, codes: UInt8[Tensor, "o n"], parameters: Float[Tensor, "o 2"]) -> Float[Tensor, "o n"]:
        return (codes.to(parameters.dtype) - parameters[:, 1:]) * parameters[:, :1]


@dataclass(frozen=True)
class TableGrid:
    """Multiples of the scale by a fixed, rising table of at most 256 values, with 0 among them.

    Rounds to the nearest value; half way, to the one an even number of places from 0, which is IEEE 754's rule. Beyond
    the ends it saturates. The scale takes a row's greatest magnitude to the table's; `least` as in IntegerGrid.

    Raises:
        ValueError: no such table, or least not in (0, 1].
    """

    values: tuple[float, ...]
    least: float = 1.0

    def __post_init__(self) -> None:
        _check_fraction(self.least)
        if not 2 <= len(self.values) <= 256 or list(self.values) != sorted(set(self.values)) or 0.0 not in self.values:
            raise ValueError("a table of values has to rise, to have at most 256 entries, and a 0 among them")

    def fit(self, weight: Float[Tensor, "o n"]) -> Float[Tensor, "o 1"]:
        scale = weight.abs().amax(1, keepdim=True) / max(-self.values[0], self.values[-1])  # (o, 1)
        scale = torch.where(scale > 0, scale, 1.0)
        return _best_clipping(self, weight, [scale * part for part in _fractions(self.least)])

    def quantize(self, weight: Float[Tensor, "o n"], parameters: Float[Tensor, "o 1"]) -> UInt8[Tensor, "o n"]:
        table = torch.tensor(self.values, dtype=weight.dtype, device=weight.device)
        edges = (table[1:] + table[:-1]) / 2
        scaled = (weight / parameters[:, :1]).contiguous()
        codes = torch.searchsorted(edges, scaled)  # half way: the lower
        halfway = edges[codes.clamp(max=len(edges) - 1)] == scaled
        odd = (codes - self.values.index(0.0)) % 2 == 1
        return (codes + (halfway & odd)).to(torch.uint8)

    def dequantize(self, codes: UInt8[Tensor, "o n"], parameters: Float[Tensor, "o 1"]) -> Float[Tensor, "o n"]:
        table = torch.tensor(self.values, dtype=parameters.dtype, device=parameters.device)
        return table[codes.long()] * parameters[:, :1]


@cache
def float8(exponent_bits: int) -> tuple[float, ...]:
    """The finite values of 8-bit floats with 4 (e4m3) or 5 (e5m2) bits of exponent.

    Source: Micikevicius et al., FP8 formats, 2022, arXiv 2209.05433, table 1. e4m3 spends one code of each sign on NaN;
    e5m2 has infinities and NaN as IEEE 754, so its last exponent isn't used.

    Raises:
        ValueError: another number of bits.
    """
    if exponent_bits not in (4, 5):
        raise ValueError(f"{exponent_bits} bits of exponent; 8-bit floats have 4 (e4m3) or 5 (e5m2)")
    mantissa_bits = 7 - exponent_bits
    bias = 2 ** (exponent_bits - 1) - 1
    codes = 127 if exponent_bits == 4 else 124  # without NaN and infinity
    positive = []
    for code in range(codes):
        exponent, mantissa = divmod(code, 2**mantissa_bits)
        fraction = mantissa / 2**mantissa_bits + (exponent > 0)  # without the leading one where subnormal
        positive.append(fraction * 2.0 ** (max(exponent, 1) - bias))
    return _mirrored(positive[1:])


@cache
def normal_float4() -> tuple[float, ...]:
    """NF4: 16 values that a normal distribution falls between about equally often; -1, 0 and 1 are exact.

    Source: Dettmers et al., QLoRA, 2023, arXiv 2305.14314, section 3 and appendix E: 8 steps from the quantile of
    1 - (1/32 + 1/30) / 2 down to the median, 7 on the negative side, over the greatest.
    """
    end = 1 - (1 / 32 + 1 / 30) / 2

    def side(steps: int) -> list[float]:
        places = [end + (0.5 - end) * i / steps for i in range(steps)]
        quantiles = [NormalDist().inv_cdf(place) for place in places]
        return [quantile / quantiles[0] for quantile in quantiles]

    return (*(-v for v in side(7)), 0.0, *reversed(side(8)))


@cache
def powers_of_two(bits: int) -> tuple[float, ...]:
    """0 and ±2^-k for k from 0 to 2^(bits - 1) - 2: multiplying by a weight is a shift.

    Source: Zhou et al., INQ, 2017, arXiv 1702.03044, section 2.1, which also gives zero one of the codes.

    Raises:
        ValueError: bits not from 2 to 5, beyond which the least powers are no use.
    """
    check_bits(bits, most=5)
    return _mirrored([2.0**-k for k in reversed(range(2 ** (bits - 1) - 1))])


TABLES = {"nf4": normal_float4, "power_of_two": lambda: powers_of_two(4)}
"""Formats of 4 bits that are no integers, by name."""


@cache
def table(name: str) -> tuple[float, ...]:
    """The values of one of TABLES, in the order of their codes.

    Raises:
        KeyError: no such format.
    """
    return TABLES[name]()


def fitting_group_size(columns: int, group_size: int) -> int:
    """The largest size up to `group_size` that divides the columns; 0 and what is larger are all of them.

    Raises:
        ValueError: it is less than half of what was asked for.
    """
    if group_size == 0 or group_size >= columns:
        return columns
    size = next(size for size in range(group_size, 0, -1) if columns % size == 0)
    if 2 * size < group_size:
        raise ValueError(
            f"has {columns} input features, which no groups of {(group_size + 1) // 2} to {group_size} divide; choose "
            "another group_size, or 0 for one scale a row"
        )
    return size


def _mirrored(positive: list[float]) -> tuple[float, ...]:
    return (*(-v for v in reversed(positive)), 0.0, *positive)


def _check_fraction(least: float) -> None:
    if not 0 < least <= 1:
        raise ValueError(f"a fraction of {least}; it's what is left of a range, above 0 and at most 1")


def _fractions(least: float) -> list[float]:
    return [1 - i * CLIP_STEP for i in range(round((1 - least) / CLIP_STEP) + 1)]


def _best_clipping(
    grid: WeightGrid, weight: Float[Tensor, "o n"], candidates: list[Float[Tensor, "o p"]]
) -> Float[Tensor, "o p"]:
    """For each row the candidate with the least squared rounding error; of equal ones the first."""
    if len(candidates) == 1:
        return candidates[0]
    chosen = candidates[0]
    least = torch.full_like(chosen[:, 0], float("inf"))
    for parameters in candidates:
        rounded = grid.dequantize(grid.quantize(weight, parameters), parameters)
        error = (rounded - weight).square().sum(1)  # (o)
        better = error < least
        least, chosen = torch.where(better, error, least), torch.where(better[:, None], parameters, chosen)
    return chosen
