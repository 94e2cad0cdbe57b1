"""Affine quantization, as ONNX QuantizeLinear and DequantizeLinear define it: to integers, or to 8-bit floats."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor

from martlet.core.errors import NumericsError


def quantize(x: Tensor, scale: Tensor, zero_point: Tensor, axis: int = -1) -> Tensor:
    """round(x / scale) + zero_point, saturated to zero_point's type, an integer or an 8-bit float; halves go to even.

    scale and zero_point are scalars, or vectors along `axis`. Returns x's shape in zero_point's type. The zero point of
    an 8-bit float is 0.
    """
    scale, zero = _along(scale, x, axis), _along(zero_point, x, axis)
    if zero_point.dtype.is_floating_point:
        limit = torch.finfo(zero_point.dtype).max
        return torch.clamp(x / scale, -limit, limit).to(zero_point.dtype)
    limits = torch.iinfo(zero_point.dtype)
    return torch.clamp(torch.round(x / scale) + zero, limits.min, limits.max).to(zero_point.dtype)


def dequantize(q: Tensor, scale: Tensor, zero_point: Tensor, axis: int = -1) -> Tensor:
    """(q - zero_point) * scale, in scale's type and q's shape."""
    scale, zero = _along(scale, q, axis), _along(zero_point, q, axis)
    return (q.to(scale.dtype) - zero.to(scale.dtype)) * scale


def dequantize_groups(
    values: Int[Tensor, "o i"], scale: Tensor, zero_point: Tensor | None = None
) -> Float[Tensor, "o i"]:
    """(values - zero_point) * scale, in scale's type; both are (o,), or (o, groups) of neighbouring columns."""
    groups = scale.reshape(len(values), -1, 1)  # (o, groups, 1)
    grouped = values.unflatten(1, (groups.shape[1], -1)).to(scale.dtype)
    if zero_point is not None:
        grouped = grouped - zero_point.reshape(groups.shape).to(scale.dtype)
    return (grouped * groups).flatten(1)


def affine_parameters(
    low: Float[Tensor, "*c"], high: Float[Tensor, "*c"], dtype: torch.dtype, symmetric: bool
) -> tuple[Float[Tensor, "*c"], Int[Tensor, "*c"]]:
    """Scale and zero point whose grid covers [low, high]; zero is always on the grid.

    Symmetric grids of a signed type have zero point 0 and leave the most negative code unused, so that they mirror;
    of an unsigned type, they spend one half on each sign. An empty range gives scale 1.

    Raises:
        NumericsError: a bound is NaN or infinite.
    """
    if not bool(torch.isfinite(low).all() and torch.isfinite(high).all()):
        raise NumericsError("a range to quantize is NaN or infinite")
    limits = torch.iinfo(dtype)
    low, high = low.clamp(max=0.0), high.clamp(min=0.0)
    if symmetric:
        scale = torch.maximum(-low, high) / (limits.max // 2 if limits.min == 0 else limits.max)
        zero = torch.full_like(scale, (limits.max + 1) // 2 if limits.min == 0 else 0)
    else:
        scale = (high - low) / (limits.max - limits.min)
        zero = limits.min - low / torch.where(scale > 0, scale, 1.0)
    scale = torch.where(scale > torch.finfo(torch.float32).tiny, scale, 1.0)
    return scale.float(), torch.round(zero).clamp(limits.min, limits.max).to(dtype)


def _along(parameter: Tensor, x: Tensor, axis: int) -> Tensor:
    if parameter.ndim == 0:
        return parameter
    shape = [1] * x.ndim
    shape[axis] = -1
    return parameter.reshape(shape)  # (1, …, C, …, 1)
