"""Quantization of what a softmax gives by a tangent: fine near 0, where most values are, and near 1, what matters."""

from __future__ import annotations

from dataclasses import dataclass
from math import pi, tan

import torch
from jaxtyping import UInt8
from torch import Tensor

from martlet.functional.quantize.logarithmic import check_bits
from martlet.functional.quantize.percentile import QUANTILES
from martlet.functional.quantize.search import RoundingError, best_grid

ANGLES = tuple(pi * (1 - 2 ** (-i / 2)) for i in range(1, 18))
"""From nearly evenly spaced values to nearly all of them at the two ends."""


@dataclass(frozen=True)
class TangentGrid:
    """TanQ: code k stands for scale · (1/2 + arctan((2 k / (2^bits - 1) - 1) tan(angle / 2)) / angle).

    Codes are evenly spaced in tan(angle (x / scale - 1/2)), which is steep at both ends: values are close together near
    0 and near scale, the closer the nearer the angle is to π, and both ends are values.

    Source: Yang et al., DopQ-ViT, 2024, arXiv 2408.03291 (TanQ). Differs: of the paper its abstract and accounts of it
    were at hand, which say that a tangent gives precision to values near 0 and near 1; this form of it is ours.

    Raises:
        ValueError: bits not from 2 to 8, a scale that isn't positive, an angle not between 0 and π.
    """

    bits: int
    scale: float
    angle: float

    def __post_init__(self) -> None:
        check_bits(self.bits)
        if not self.scale > 0 or not 0 < self.angle < pi:
            raise ValueError(f"scale {self.scale}, angle {self.angle}; the one is positive, the other between 0 and pi")

    def quantize(self, x: Tensor) -> UInt8[Tensor, "*s"]:
        """Codes of x, of any shape, saturated at both ends."""
        steep = torch.tan(self.angle * ((x / self.scale).clamp(0, 1) - 0.5)) / tan(self.angle / 2)  # from -1 to 1
        return torch.round((steep + 1) / 2 * (2**self.bits - 1)).to(torch.uint8)

    def dequantize(self, codes: UInt8[Tensor, "*s"], dtype: torch.dtype = torch.float32) -> Tensor:
        """The values that codes stand for."""
        last = 2**self.bits - 1
        ends = torch.arange(last + 1, dtype=torch.float64, device=codes.device) * 2 / last - 1
        values = 0.5 + torch.atan(ends * tan(self.angle / 2)) / self.angle
        return (values * self.scale).to(dtype)[codes.long()]


def search_tangent(error: RoundingError, x: Tensor, bits: int) -> TangentGrid:
    """The TanQ grid with the least error of x: its angle, and as scale x's maximum or one of three percentiles of it.

    Raises:
        ValueError: no value above 0, or every error is NaN.
    """
    ordered = x.flatten().sort().values
    scales = {float(ordered[round(quantile * (len(ordered) - 1))]) for quantile in (*QUANTILES, 1.0)}
    grids = [TangentGrid(bits, scale, angle) for scale in sorted(scales) if scale > 0 for angle in ANGLES]
    return best_grid(error, x, grids)
