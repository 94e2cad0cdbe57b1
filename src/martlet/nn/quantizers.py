"""Layers that round tensors in a traced graph. Their tensors are buffers, so a state dict holds all they know.

A quantizer says of itself whether an engine has a kernel for it (`simulated`).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from martlet.functional import affine
from martlet.functional.packing import pack, unpack

# Operators of our own, because they must export to exactly one ONNX operator each, but for the type of 4-bit values.
_library = torch.library.Library("martlet", "DEF")
_library.define("quantize(Tensor x, Tensor scale, Tensor zero_point, int axis) -> Tensor")
_library.define("dequantize(Tensor q, Tensor scale, Tensor zero_point, int axis) -> Tensor")
_library.define("dequantize_groups(Tensor values, Tensor scale, int bits) -> Tensor")
_library.impl("quantize", affine.quantize, "CompositeExplicitAutograd")
_library.impl("dequantize", affine.dequantize, "CompositeExplicitAutograd")
_library.impl(
    "dequantize_groups", lambda q, scale, bits: affine.dequantize_groups(q, scale), "CompositeExplicitAutograd"
)


@torch.library.register_fake("martlet::quantize")
def _(x: Tensor, scale: Tensor, zero_point: Tensor, axis: int) -> Tensor:
    return torch.empty_like(x, dtype=zero_point.dtype)


@torch.library.register_fake("martlet::dequantize")
def _(q: Tensor, scale: Tensor, zero_point: Tensor, axis: int) -> Tensor:
    return torch.empty_like(q, dtype=scale.dtype)


@torch.library.register_fake("martlet::dequantize_groups")
def _(values: Tensor, scale: Tensor, bits: int) -> Tensor:
    return torch.empty_like(values, dtype=scale.dtype)


class ActivationQuantizer(nn.Module):
    """Rounds an activation of any shape to one affine grid and back."""

    simulated: ClassVar[bool] = False
    scale: Tensor
    zero_point: Tensor

    def __init__(self, scale: Tensor, zero_point: Tensor) -> None:
        super().__init__()
        self.register_buffer("scale", scale)
        self.register_buffer("zero_point", zero_point)

    @property
    def bits(self) -> int:
        return torch.iinfo(self.zero_point.dtype).bits

    def forward(self, x: Tensor) -> Tensor:
        q = torch.ops.martlet.quantize(x, self.scale, self.zero_point, -1)
        return torch.ops.martlet.dequantize(q, self.scale, self.zero_point, -1)


class ChannelScale(nn.Module):
    """Multiplies the last axis, (…, C), by one factor a channel."""

    factor: Tensor

    def __init__(self, factor: Tensor) -> None:
        super().__init__()
        self.register_buffer("factor", factor)

    def forward(self, x: Tensor) -> Tensor:
        return x * self.factor


class WeightQuantizer(nn.Module):
    """Holds a weight as integers with one symmetric scale for each slice along `axis`; gives it back as float."""

    simulated: ClassVar[bool] = False
    values: Tensor
    scale: Tensor
    zero_point: Tensor

    def __init__(self, values: Tensor, scale: Tensor, axis: int = 0) -> None:
        super().__init__()
        self.axis = axis
        self.register_buffer("values", values)
        self.register_buffer("scale", scale)
        self.register_buffer("zero_point", torch.zeros_like(scale, dtype=values.dtype))

    @classmethod
    def round(cls, weight: Tensor, scale: Tensor, axis: int = 0, dtype: torch.dtype = torch.int8) -> WeightQuantizer:
        """Rounds a float weight to the nearest codes of a grid that mirrors: the most negative code isn't used."""
        values = affine.quantize(weight, scale, torch.zeros_like(scale, dtype=dtype), axis)
        return cls(values.clamp(min=-torch.iinfo(dtype).max), scale, axis)

    @property
    def bits(self) -> int:
        return torch.iinfo(self.values.dtype).bits

    @property
    def shape(self) -> torch.Size:
        return self.values.shape

    def forward(self) -> Tensor:
        return torch.ops.martlet.dequantize(self.values, self.scale, self.zero_point, self.axis)


class PackedWeightQuantizer(nn.Module):
    """Holds a Linear's weight (O, I) as packed codes of 2 to 8 bits, with one symmetric scale for each row's group.

    Takes codes as `IntegerGrid` gives them, 2^(bits - 1) for zero, and scales (O, groups) of neighbouring columns.
    """

    codes: Tensor
    scale: Tensor

    def __init__(self, codes: Tensor, scale: Tensor, bits: int) -> None:
        super().__init__()
        self.bits, self.shape = bits, codes.shape
        self.register_buffer("codes", pack(codes, bits))
        self.register_buffer("scale", scale)

    @property
    def simulated(self) -> bool:
        return self.bits not in (4, 8)

    @property
    def group_size(self) -> int:
        return self.shape[1] // self.scale.shape[1]

    def values(self) -> Tensor:
        """Signed integers, int8 (O, I)."""
        return (unpack(self.codes, self.bits, self.shape[1]).to(torch.int16) - 2 ** (self.bits - 1)).to(torch.int8)

    def forward(self) -> Tensor:
        return torch.ops.martlet.dequantize_groups(self.values(), self.scale, self.bits)


def onnx_translations() -> dict[Callable[..., Any], Callable[..., Any]]:
    """How `torch.onnx.export` writes the operators of this file (`custom_translation_table`), opset 21."""
    from onnx import TensorProto
    from onnxscript import opset21 as op

    def quantize(x, scale, zero_point, axis: int):
        return op.QuantizeLinear(x, scale, zero_point, axis=axis)

    def dequantize(q, scale, zero_point, axis: int):
        return op.DequantizeLinear(q, scale, zero_point, axis=axis)

    def dequantize_groups(values, scale, bits: int):
        integers: Any = op.Cast(values, to=TensorProto.INT4) if bits <= 4 else values
        if len(scale.shape) == 1:
            return op.DequantizeLinear(integers, scale, axis=0)
        return op.DequantizeLinear(integers, scale, axis=1, block_size=values.shape[1] // scale.shape[1])

    ours = torch.ops.martlet
    return {
        ours.quantize.default: quantize,
        ours.dequantize.default: dequantize,
        ours.dequantize_groups.default: dequantize_groups,
    }
