"""Layers that round tensors in a traced graph. Their tensors are buffers, so a state dict holds all they know.

A quantizer says of itself whether any engine has a kernel for it (`simulated`), and what its `format` is if its codes
aren't evenly spaced: then an engine says whether it has a kernel (`Engine.formats`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from math import prod
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from martlet.functional.quantize import affine
from martlet.functional.quantize.formats import FLOAT8, table
from martlet.functional.quantize.packing import pack, unpack
from martlet.functional.quantize.ranges import weight_scale_mse
from martlet.functional.quantize.table import Table, lookup

# Operators of our own, because they must export to exactly one ONNX operator each, but for the type of 4-bit values.
_library = torch.library.Library("martlet", "DEF")
_library.define("quantize(Tensor x, Tensor scale, Tensor zero_point, int axis) -> Tensor")
_library.define("dequantize(Tensor q, Tensor scale, Tensor zero_point, int axis) -> Tensor")
_library.define("dequantize_groups(Tensor values, Tensor scale, Tensor? zero_point, int bits) -> Tensor")
_library.define("dequantize_codes(Tensor codes, Tensor scale, Tensor values) -> Tensor")
_library.define("lookup(Tensor x, Tensor edges, Tensor values) -> Tensor")
_library.impl("quantize", affine.quantize, "CompositeExplicitAutograd")
_library.impl("dequantize", affine.dequantize, "CompositeExplicitAutograd")
_library.impl(
    "dequantize_groups",
    lambda q, scale, zero_point, bits: affine.dequantize_groups(q, scale, zero_point),
    "CompositeExplicitAutograd",
)
_library.impl(
    "dequantize_codes", lambda codes, scale, values: values[codes.long()] * scale, "CompositeExplicitAutograd"
)
_library.impl("lookup", lookup, "CompositeExplicitAutograd")


@torch.library.register_fake("martlet::quantize")
def _(x: Tensor, scale: Tensor, zero_point: Tensor, axis: int) -> Tensor:
    return torch.empty_like(x, dtype=zero_point.dtype)


@torch.library.register_fake("martlet::dequantize")
def _(q: Tensor, scale: Tensor, zero_point: Tensor, axis: int) -> Tensor:
    return torch.empty_like(q, dtype=scale.dtype)


@torch.library.register_fake("martlet::dequantize_groups")
def _(values: Tensor, scale: Tensor, zero_point: Tensor | None, bits: int) -> Tensor:
    return torch.empty_like(values, dtype=scale.dtype)


@torch.library.register_fake("martlet::dequantize_codes")
def _(codes: Tensor, scale: Tensor, values: Tensor) -> Tensor:
    return torch.empty_like(codes, dtype=scale.dtype)


@torch.library.register_fake("martlet::lookup")
def _(x: Tensor, edges: Tensor, values: Tensor) -> Tensor:
    return torch.empty_like(x, dtype=values.dtype)


def _float8(dtype: torch.dtype) -> str | None:
    """The name of an 8-bit float; None of an integer."""
    return next((name for name, its in FLOAT8.items() if its == dtype), None)


class ActivationQuantizer(nn.Module):
    """Rounds an activation of any shape to one affine grid of 8 bits, integers or floats, and back."""

    simulated: ClassVar[bool] = False
    scale: Tensor
    zero_point: Tensor

    def __init__(self, scale: Tensor, zero_point: Tensor) -> None:
        super().__init__()
        self.register_buffer("scale", scale)
        self.register_buffer("zero_point", zero_point)

    @property
    def bits(self) -> int:
        return 8 * self.zero_point.itemsize

    @property
    def format(self) -> str | None:
        return _float8(self.zero_point.dtype)

    def structure(self) -> dict[str, Any]:
        return {"format": self.format} if self.format else {"signed": self.zero_point.dtype == torch.int8}

    @classmethod
    def empty(cls, structure: Mapping[str, Any]) -> ActivationQuantizer:
        integer = torch.int8 if structure.get("signed") else torch.uint8
        dtype = FLOAT8[structure["format"]] if "format" in structure else integer
        return cls(torch.ones(()), torch.zeros((), dtype=dtype))

    def forward(self, x: Tensor) -> Tensor:
        q = torch.ops.martlet.quantize(x, self.scale, self.zero_point, -1)
        return torch.ops.martlet.dequantize(q, self.scale, self.zero_point, -1)


class TableQuantizer(nn.Module):
    """Rounds an activation to the values of a table, (table(x / scale + offset) - offset) · scale.

    The table has a code for each of its values, however they are spaced; without one, codes are the whole numbers from
    0 to 2^bits - 1. Scale and offset are one number, or (n,) numbers along `axis`. Engines have no kernel for it.
    """

    simulated: ClassVar[bool] = True
    edges: Tensor | None
    values: Tensor | None
    scale: Tensor
    offset: Tensor

    def __init__(self, bits: int, scale: Tensor, offset: Tensor, axis: int = 1, table: Table | None = None) -> None:
        super().__init__()
        self.bits, self.axis = bits, axis
        self.register_buffer("edges", None if table is None else table.edges.float())
        self.register_buffer("values", None if table is None else table.values.float())
        self.register_buffer("scale", scale.float())
        self.register_buffer("offset", offset.float())

    def structure(self) -> dict[str, Any]:
        levels = None if self.values is None else len(self.values)
        return {"bits": self.bits, "scales": list(self.scale.shape), "axis": self.axis, "levels": levels}

    @classmethod
    def empty(cls, structure: Mapping[str, Any]) -> TableQuantizer:
        ones, levels = torch.ones(structure["scales"]), structure["levels"]
        table = None if levels is None else Table(torch.zeros(levels - 1), torch.zeros(levels))
        return cls(structure["bits"], ones, torch.zeros_like(ones), structure["axis"], table)

    def forward(self, x: Tensor) -> Tensor:
        scale, offset = self.along(self.scale, x), self.along(self.offset, x)
        return (self.look_up(x / scale + offset) - offset) * scale

    def look_up(self, x: Tensor) -> Tensor:
        """The table's value for each of x, which is of any shape."""
        if self.edges is None or self.values is None:
            return torch.clamp(torch.round(x), 0, 2**self.bits - 1)
        return torch.ops.martlet.lookup(x, self.edges, self.values)

    def along(self, parameter: Tensor, x: Tensor) -> Tensor:
        """A parameter, shaped to go with x."""
        if parameter.ndim == 0:
            return parameter
        shape = [1] * x.ndim
        shape[self.axis] = -1
        return parameter.reshape(shape)


class ChannelScale(nn.Module):
    """Multiplies the last axis, (…, C), by one factor a channel."""

    factor: Tensor

    def __init__(self, factor: Tensor) -> None:
        super().__init__()
        self.register_buffer("factor", factor)

    def forward(self, x: Tensor) -> Tensor:
        return x * self.factor


class WeightQuantizer(nn.Module):
    """Holds a weight as integers, or as 8-bit floats, with one symmetric scale for each slice along `axis`."""

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
        return cls(values if dtype.is_floating_point else values.clamp(min=-torch.iinfo(dtype).max), scale, axis)

    @classmethod
    def fit_float8(cls, weight: Tensor, format: str, axis: int = 0) -> WeightQuantizer:
        """Rounds a float weight to an 8-bit float; the greatest magnitude of each slice becomes the format's."""
        dtype = FLOAT8[format]
        greatest = weight.movedim(axis, 0).flatten(1).abs().amax(1)
        scale = torch.where(greatest > 0, greatest / torch.finfo(dtype).max, 1.0)
        return cls.round(weight, scale, axis, dtype)

    @classmethod
    def fit(cls, weight: Tensor, axis: int = 0) -> WeightQuantizer:
        """Rounds a float weight; each slice along `axis` has the scale with the least squared error."""
        return cls.round(weight, weight_scale_mse(weight.movedim(axis, 0).flatten(1)), axis)

    @property
    def bits(self) -> int:
        return 8 * self.values.itemsize

    @property
    def format(self) -> str | None:
        return _float8(self.values.dtype)

    @property
    def shape(self) -> torch.Size:
        return self.values.shape

    def structure(self) -> dict[str, Any]:
        return {"shape": [*self.shape], "axis": self.axis, **({"format": self.format} if self.format else {})}

    @classmethod
    def empty(cls, structure: Mapping[str, Any]) -> WeightQuantizer:
        shape, axis = structure["shape"], structure["axis"]
        dtype = FLOAT8[structure["format"]] if "format" in structure else torch.int8
        return cls(torch.zeros(shape, dtype=dtype), torch.ones(shape[axis]), axis)

    def forward(self) -> Tensor:
        return torch.ops.martlet.dequantize(self.values, self.scale, self.zero_point, self.axis)


class PackedWeightQuantizer(nn.Module):
    """Holds a weight as packed codes of 2 to 8 bits, with a scale for each group of a row.

    A row is what one output channel, along `axis`, multiplies: the weight moved and flattened to (O, I). Takes codes
    (O, I) and scales (O, groups) of neighbouring columns. Zero points are codes too, (O, groups); without them zero is
    2^(bits - 1), as `IntegerGrid` has it. With a format, codes are places in its table, and zero is in the table.
    """

    codes: Tensor
    scale: Tensor
    zero_point: Tensor | None

    def __init__(
        self,
        codes: Tensor,
        scale: Tensor,
        bits: int,
        zero_point: Tensor | None = None,
        shape: Sequence[int] | None = None,
        axis: int = 0,
        format: str | None = None,
    ) -> None:
        super().__init__()
        self.bits, self.shape, self.axis, self.format = bits, torch.Size(shape or codes.shape), axis, format
        self.register_buffer("codes", pack(codes, bits))
        self.register_buffer("scale", scale)
        self.register_buffer("zero_point", None if zero_point is None else zero_point.to(torch.uint8))

    @property
    def simulated(self) -> bool:
        return self.format is None and self.bits not in (4, 8)

    @property
    def group_size(self) -> int:
        return self.columns // self.scale.shape[1]

    @property
    def columns(self) -> int:
        return prod(self.shape) // self.shape[self.axis]

    def structure(self) -> dict[str, Any]:
        return {
            "bits": self.bits,
            "shape": [*self.shape],
            "axis": self.axis,
            "groups": self.scale.shape[1],
            "zero_point": self.zero_point is not None,
            **({"format": self.format} if self.format else {}),
        }

    @classmethod
    def empty(cls, structure: Mapping[str, Any]) -> PackedWeightQuantizer:
        shape, axis, groups = structure["shape"], structure["axis"], structure["groups"]
        codes = torch.zeros(shape[axis], prod(shape) // shape[axis], dtype=torch.uint8)
        zero_point = torch.zeros(shape[axis], groups) if structure["zero_point"] else None
        scale = torch.ones(shape[axis], groups)
        return cls(codes, scale, structure["bits"], zero_point, shape, axis, structure.get("format"))

    def integers(self) -> tuple[Tensor, Tensor, Tensor | None]:
        """Values (O, I), their scale, and the value of zero: int8, of which `bits` bits are used."""
        half = 2 ** (self.bits - 1)
        values = (unpack(self.codes, self.bits, self.columns).to(torch.int16) - half).to(torch.int8)
        zero = None if self.zero_point is None else (self.zero_point.to(torch.int16) - half).to(torch.int8)
        return values, self.scale, zero

    def operation(self) -> tuple[Callable[..., Tensor], tuple[Any, ...]]:
        """The operator that gives the rows, (O, I) or (O, groups, n), and what it takes; the first of it has the shape.

        With one group a row, the groups have no dimension of their own. What no kernel multiplies as it is stored is a
        lookup, which engines do once, when they open a file.
        """
        one = self.scale.shape[1] == 1
        if self.format is None and (len(self.shape) == 2 or self.zero_point is not None):
            values, *parameters = self.integers()
            parameters = [p.flatten() if one and p is not None else p for p in parameters]
            return torch.ops.martlet.dequantize_groups.default, (values, *parameters, self.bits)
        codes, scale = unpack(self.codes, self.bits, self.columns), self.scale
        if not one:
            codes, scale = codes.unflatten(1, (self.scale.shape[1], -1)), scale[..., None]
        half = 2 ** (self.bits - 1)
        values = scale.new_tensor(table(self.format) if self.format else range(-half, half))
        return torch.ops.martlet.dequantize_codes.default, (codes, scale, values)

    def forward(self) -> Tensor:
        function, operands = self.operation()
        return self.unflatten(function(*operands))

    def flatten(self, weight: Tensor) -> Tensor:
        """A weight of this shape as rows (O, I)."""
        return weight.movedim(self.axis, 0).flatten(1)

    def unflatten(self, rows: Tensor) -> Tensor:
        """Rows (O, I) as a weight of this shape."""
        moved = [self.shape[self.axis], *self.shape[: self.axis], *self.shape[self.axis + 1 :]]
        return rows.reshape(moved).movedim(0, self.axis)


Quantizer = ActivationQuantizer | TableQuantizer | WeightQuantizer | PackedWeightQuantizer
KINDS: dict[str, type[Quantizer]] = {
    kind.__name__: kind for kind in (ActivationQuantizer, TableQuantizer, WeightQuantizer, PackedWeightQuantizer)
}


def structure(quantizer: Quantizer) -> dict[str, Any]:
    """JSON from which `build` makes a quantizer whose tensors a state dict can fill."""
    return {"kind": type(quantizer).__name__, **quantizer.structure()}


def build(structure: Mapping[str, Any]) -> Quantizer:
    """A quantizer with empty tensors.

    Raises:
        KeyError: no such kind, or something is missing.
    """
    return KINDS[structure["kind"]].empty(structure)


def onnx_translations() -> dict[Callable[..., Any], Callable[..., Any]]:
    """How `torch.onnx.export` writes the operators of this file (`custom_translation_table`), opset 21."""
    from onnx import TensorProto
    from onnxscript import opset21

    op: Any = opset21  # its types are those of tensors, which a Python number can stand for

    def quantize(x, scale, zero_point, axis: int):
        if zero_point.dtype.is_floating_point():  # engines fuse what follows a QuantizeLinear into integer kernels
            return op.Cast(op.Div(x, scale), to=zero_point.dtype.value)  # saturates
        return op.QuantizeLinear(x, scale, zero_point, axis=axis)

    def dequantize(q, scale, zero_point, axis: int):
        if zero_point.dtype.is_floating_point():
            shape = [-1 if i == axis else 1 for i in range(len(q.shape))] if len(scale.shape) else []
            return op.Mul(op.Cast(q, to=TensorProto.FLOAT), op.Reshape(scale, shape) if shape else scale)
        return op.DequantizeLinear(q, scale, zero_point, axis=axis)

    def dequantize_groups(values, scale, zero_point, bits: int):
        integers: Any = op.Cast(values, to=TensorProto.INT4) if bits <= 4 else values
        operands = [integers, scale]
        if zero_point is not None:
            operands.append(op.Cast(zero_point, to=TensorProto.INT4) if bits <= 4 else zero_point)
        if len(scale.shape) == 1:
            return op.DequantizeLinear(*operands, axis=0)
        return op.DequantizeLinear(*operands, axis=1, block_size=values.shape[1] // scale.shape[1])

    def dequantize_codes(codes, scale, values):
        if values.shape[0] <= 16:
            codes = op.Cast(codes, to=TensorProto.UINT4)
        return op.Mul(op.Gather(values, op.Cast(codes, to=TensorProto.INT64)), scale)

    def look_up(x, edges, values):
        """A binary search: a step halves the table, and ends at how many edges are below x."""
        position: Any = None
        step = 1 << (int(values.shape[0]) - 1).bit_length() - 1
        while step:
            at = (
                op.Constant(value_int=step - 1)
                if position is None
                else op.Add(position, op.Constant(value_int=step - 1))
            )
            above = op.Cast(op.Greater(x, op.Gather(edges, at)), to=TensorProto.INT64)
            found = op.Mul(above, op.Constant(value_int=step))
            position = found if position is None else op.Add(position, found)
            step //= 2
        return op.Gather(values, position)

    ours = torch.ops.martlet
    return {
        ours.quantize.default: quantize,
        ours.dequantize.default: dequantize,
        ours.dequantize_groups.default: dequantize_groups,
        ours.dequantize_codes.default: dequantize_codes,
        ours.lookup.default: look_up,
    }
