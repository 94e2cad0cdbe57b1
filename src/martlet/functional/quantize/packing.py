"""Codes of a few bits each, without gaps, in bytes."""

from __future__ import annotations

import torch
from jaxtyping import UInt8
from torch import Tensor


def pack(codes: UInt8[Tensor, "o i"], bits: int) -> UInt8[Tensor, "o bytes"]:
    """The low `bits` bits of each code, one after the other, low bits first; a row fills ceil(i * bits / 8) bytes."""
    planes = (codes[..., None] >> torch.arange(bits, dtype=torch.uint8)) & 1  # (o, i, bits)
    stream = torch.nn.functional.pad(planes.flatten(1), (0, -codes.shape[1] * bits % 8))
    return _join(stream.unflatten(1, (-1, 8)))


def unpack(packed: UInt8[Tensor, "o bytes"], bits: int, columns: int) -> UInt8[Tensor, "o i"]:
    """The codes that `pack` took, `columns` in each row."""
    stream = ((packed[..., None] >> torch.arange(8, dtype=torch.uint8)) & 1).flatten(1)  # (o, bytes * 8)
    return _join(stream[:, : columns * bits].unflatten(1, (columns, bits)))


def _join(planes: UInt8[Tensor, "o n b"]) -> UInt8[Tensor, "o n"]:
    return (planes << torch.arange(planes.shape[-1], dtype=torch.uint8)).sum(-1, dtype=torch.uint8)
