"""Layers of a graph that computes with integers alone. What they know is in integer buffers.

No engine has kernels for all of them, so each says that it is simulated.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor, nn

from martlet.functional.quantize import affine
from martlet.functional.quantize.integer import (
    MAX_SHIFT,
    dyadic,
    integer_layer_norm,
    requantize,
    shift_gelu,
    shiftmax,
)
from martlet.nn.quantizers import WeightQuantizer


class Integer(nn.Module):
    """A layer from integers to integers. bits: of what it gives."""

    simulated: ClassVar[bool] = True
    bits: int


class ImageQuantizer(Integer):
    """The way in: float images to the nearest int8 codes."""

    scale: Tensor
    zero_point: Tensor
    bits = 8

    def __init__(self, scale: float) -> None:
        super().__init__()
        self.register_buffer("scale", torch.tensor(scale))
        self.register_buffer("zero_point", torch.zeros((), dtype=torch.int8))

    def forward(self, images: Tensor) -> Tensor:
        return torch.ops.martlet.quantize(images, self.scale, self.zero_point, -1)


class LogitDequantizer(Integer):
    """The way out: integer logits to float."""

    scale: Tensor
    zero_point: Tensor

    def __init__(self, scale: float, bits: int) -> None:
        super().__init__()
        self.bits = bits
        self.register_buffer("scale", torch.tensor(scale))
        self.register_buffer("zero_point", torch.zeros((), dtype=torch.int32))

    def forward(self, codes: Tensor) -> Tensor:
        return torch.ops.martlet.dequantize(codes, self.scale, self.zero_point, -1)


class IntegerWeight(WeightQuantizer):
    """A weight (I, O) as int8 codes, which it gives as they are. Nothing computes with the scale of each column."""

    simulated: ClassVar[bool] = True

    @classmethod
    def of(cls, weight: Tensor, scale: Tensor) -> IntegerWeight:
        """Rounds a float weight (O, I) to the nearest codes of a grid that mirrors."""
        codes = affine.quantize(weight, scale, torch.zeros_like(scale, dtype=torch.int8), 0).clamp(min=-127)
        return cls(codes.mT.contiguous(), scale.float(), 1)

    def forward(self) -> Tensor:
        return self.values


class Requantize(Integer):
    """Moves codes to another scale: factor · codes + offset, rounded to the nearest, in `bits` bits.

    factor, offset: float64; one number, or of a shape that broadcasts to the codes'.
    """

    multiplier: Tensor
    shift: Tensor
    offset: Tensor

    def __init__(self, factor: Tensor, offset: Tensor, bits: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.bits, self.dtype = bits, dtype
        multiplier, shift = dyadic(factor)
        limit = 2.0 ** (61 - MAX_SHIFT)  # past any code, and within int64 when shifted
        offset, power = torch.broadcast_tensors(offset.double().clamp(-limit, limit) + 0.5, shift)
        shifted = torch.ldexp(offset, power)
        self.register_buffer("multiplier", multiplier)
        self.register_buffer("shift", shift)
        self.register_buffer("offset", shifted.floor().long())

    def forward(self, codes: Tensor) -> Tensor:
        return requantize(codes, self.multiplier, self.shift, self.offset, self.bits).to(self.dtype)


class IntegerLayerNorm(Integer):
    """LayerNorm over the last axis without scale and bias, which go into what rounds its output."""

    epsilon: Tensor

    def __init__(self, epsilon: int, bits: int) -> None:
        super().__init__()
        self.bits = bits
        self.register_buffer("epsilon", torch.tensor(epsilon))

    def forward(self, codes: Tensor) -> Tensor:
        return integer_layer_norm(codes, self.epsilon, self.bits)


class _Powers(Integer):
    """An operation by powers of two, whose codes have a unit: `one` of them."""

    one: Tensor

    def __init__(self, one: int, bits: int) -> None:
        super().__init__()
        self.bits = bits
        self.register_buffer("one", torch.tensor(one))


class Shiftmax(_Powers):
    """Softmax over the last axis; `one` is the code of 1."""

    def forward(self, codes: Tensor) -> Tensor:
        return shiftmax(codes, self.one, self.bits).to(torch.int32)


class ShiftGELU(_Powers):
    """GELU; `one` is the code of 1 / 1.702, `bits` those of the sigmoid."""

    def forward(self, codes: Tensor) -> Tensor:
        return shift_gelu(codes, self.one, self.bits)
