"""uniform: one evenly spaced grid for each tensor, and nothing else. What every method for few bits has to beat."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from martlet.core.errors import RecipeError
from martlet.functional.quantize.formats import IntegerGrid
from martlet.functional.quantize.percentile import percentile_affine
from martlet.functional.quantize.search import AffineGrid, search_affine, squared_error
from martlet.graph.fit import Call, Operand
from martlet.graph.low_bit import LowBit, affine, percentile_weight, quantized_weight, sample
from martlet.nn.quantizers import Quantizer

RANGES = ("minmax", "percentile", "mse")


@dataclass(frozen=True, kw_only=True)
class Uniform(LowBit):
    """Quantize weights and activations to few bits on evenly spaced grids, with zero on each.

    A grid for each activation tensor, and for each output channel of a weight. With 8 bits engines have kernels for it,
    but `int8` is made for them; fewer are simulated.

    Args:
        ranges: `minmax`, all values seen; `percentile`, of three shares of them the one with the least squared error;
            `mse`, the scale and zero point with the least squared error, searched from coarse to fine.

    Shape: none changes.
    Needs: images, without labels; the first 32 are looked at.
    Cost: one forward pass.
    Paper: Nagel et al., A White Paper on Neural Network Quantization, 2021, arXiv 2106.08295, section 3.1.
    Differs: an image keeps 8 bits. With weight_bits 8, weights have the symmetric grid of the least squared error that
        engines multiply, whatever the ranges.
    Raises: RecipeError for a setting out of range or without images; UsageError if the model multiplies nothing;
        NumericsError for an activation that is NaN.
    """

    name: ClassVar[str] = "uniform"
    summary: ClassVar[str] = "few bits on evenly spaced grids, rounded to nearest: the baseline"
    paper: ClassVar[str] = "Nagel et al., A White Paper on Neural Network Quantization, 2021, arXiv 2106.08295"

    ranges: str = "minmax"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.ranges not in RANGES:
            raise RecipeError(f"uniform: ranges is {self.ranges!r}; it can be {', '.join(RANGES)}")

    def activation(self, operand: Operand) -> Quantizer:
        x, bits = operand.value, self.bits(operand.kind)
        if self.ranges == "percentile":
            return affine(percentile_affine(x, bits))
        if self.ranges == "mse":
            few = sample(x)
            return affine(search_affine(squared_error(few), few, bits, steps=3))
        low, high = (float(v) for v in torch.aminmax(x))
        low, high = min(low, 0.0), max(high, 0.0)
        scale = (high - low) / (2**bits - 1) or 1.0
        return affine(AffineGrid(bits, scale, round(-low / scale)))

    def weight(self, call: Call) -> Quantizer:
        if self.ranges == "percentile":
            return percentile_weight(call, self.weight_bits)
        least = 1.0 if self.ranges == "minmax" else 0.4
        return quantized_weight(call, self.weight_bits, IntegerGrid(self.weight_bits, symmetric=False, least=least).fit)
