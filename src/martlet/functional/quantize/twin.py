"""Two uniform grids in one tensor: what a softmax or a GELU gives has a dense small part and a sparse large one.

Source: Yuan et al., PTQ4ViT, 2022, arXiv 2111.12293, section 3.2. One bit of the code says which grid, the others are
the place in it, and the steps differ by a power of two, so that integer products only need a shift to be added up.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from martlet.functional.quantize.logarithmic import GELU_SHIFT, check_bits


@dataclass(frozen=True)
class TwinSoftmaxGrid:
    """Codes below 2^(bits - 1) are multiples of `fine`, the others, less 2^(bits - 1), multiples of `coarse`.

    fine = 2^-exponent coarse. Differs: coarse is 1 / (2^(bits - 1) - 1), as in the official code, so that 1 is on the
    grid; the paper's 1 / 2^(bits - 1) clips it. What lies between the greatest fine value and the next coarse one goes
    to the nearer; the paper rounds it to a multiple of coarse, which may be 0, and that code, which adds the values of
    both ranges up, gives x plus the split point.

    Raises:
        ValueError: bits not from 2 to 8, a negative exponent.
    """

    bits: int
    exponent: int

    def __post_init__(self) -> None:
        check_bits(self.bits)
        if self.exponent < 0:
            raise ValueError(f"exponent {self.exponent}; the fine step isn't above the coarse one")

    @property
    def coarse(self) -> float:
        return 1 / (2 ** (self.bits - 1) - 1)

    @property
    def fine(self) -> float:
        return self.coarse * 2.0**-self.exponent

    @property
    def split(self) -> float:
        """In the middle between the greatest fine value and the next coarse one: the end of the fine range."""
        places = 2 ** (self.bits - 1) - 1
        return (places * self.fine + (places // 2**self.exponent + 1) * self.coarse) / 2

    def quantize(self, x: Tensor) -> UInt8[Tensor, "*s"]:
        """Codes of values in [0, 1], of any shape; others saturate."""
        half = 2 ** (self.bits - 1)
        low = torch.round(x / self.fine).clamp(0, half - 1)
        high = torch.round(x / self.coarse).clamp(0, half - 1) + half
        return torch.where(x <= self.split, low, high).to(torch.uint8)

    def dequantize(self, codes: UInt8[Tensor, "*s"], dtype: torch.dtype = torch.float32) -> Tensor:
        """The values that codes stand for."""
        return self.table().to(codes.device, dtype)[codes.long()]

    def table(self) -> Float[Tensor, " levels"]:
        """The value of every code, in float64."""
        steps = torch.arange(2 ** (self.bits - 1), dtype=torch.float64)
        return torch.cat([steps * self.fine, steps * self.coarse])


@dataclass(frozen=True)
class TwinGeluGrid:
    """Codes in two's complement: negative ones are multiples of `fine`, the others of `coarse` = 2^exponent fine.

    fine = GELU_SHIFT / 2^(bits - 1), so that the least code is the least that a GELU gives; the negative exponents are
    for layers whose values stay small. Differs: coarse is a power of two times fine, as the paper asks;
    the official code leaves it free.

    Raises:
        ValueError: bits not from 2 to 8.
    """

    bits: int
    exponent: int

    def __post_init__(self) -> None:
        check_bits(self.bits)

    @property
    def fine(self) -> float:
        return GELU_SHIFT / 2 ** (self.bits - 1)

    @property
    def coarse(self) -> float:
        return self.fine * 2.0**self.exponent

    def quantize(self, x: Tensor) -> UInt8[Tensor, "*s"]:
        """Codes of values of any shape; those beyond [-GELU_SHIFT, (2^(bits - 1) - 1) coarse] saturate."""
        half = 2 ** (self.bits - 1)
        negative = torch.round(x / self.fine).clamp(-half, 0)
        positive = torch.round(x / self.coarse).clamp(0, half - 1)
        return torch.remainder(torch.where(x < 0, negative, positive), 2 * half).to(torch.uint8)

    def dequantize(self, codes: UInt8[Tensor, "*s"], dtype: torch.dtype = torch.float32) -> Tensor:
        """The values that codes stand for."""
        return self.table().to(codes.device, dtype)[codes.long()]

    def table(self) -> Float[Tensor, " levels"]:
        """The value of every code, in float64."""
        half = 2 ** (self.bits - 1)
        steps = torch.arange(half, dtype=torch.float64)
        return torch.cat([steps * self.coarse, (steps - half) * self.fine])


def covering_exponent(bits: int, high: float) -> int:
    """The least exponent of a TwinGeluGrid that reaches `high` without clipping.

    Raises:
        ValueError: bits not from 2 to 8, or high isn't positive and finite.
    """
    if not 0 < high < float("inf"):
        raise ValueError(f"a greatest value of {high}; it has to be positive")
    reach = TwinGeluGrid(bits, 0).coarse * (2 ** (bits - 1) - 1)
    exponent = int(torch.tensor(high / reach, dtype=torch.float64).log2().ceil())
    return exponent + (reach * 2.0**exponent < high)  # the logarithm may round down
