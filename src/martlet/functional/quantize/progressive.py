"""Weights of few bits over weights of 8 bits: a kernel widens them with integers alone and multiplies in int8."""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Float, Int, UInt8
from torch import Tensor


def protective_range(bits: int) -> int:
    """The greatest of the 8-bit codes, with which no widened value leaves int8: half a step is added at most.

    With r = 127 (2^bits - 1) / 2^bits a step is at most 2 r / (2^bits - 1); 119 for 4 bits, as in the paper.
    """
    return 127 * (2**bits - 1) // 2**bits


class ProgressiveWeight(NamedTuple):
    """codes (O, I), of so many bits; zero (O, groups), a code; step (O, groups), whole; scale (O, 1), of the 8 bits."""

    codes: UInt8[Tensor, "o i"]
    zero: UInt8[Tensor, "o g"]
    step: Int[Tensor, "o g"]
    scale: Float[Tensor, "o 1"]

    def widened(self) -> Int[Tensor, "o i"]:
        """The int8 values that a kernel multiplies: (code - zero) step."""
        size = self.codes.shape[1] // self.step.shape[1]
        zero, step = (t.repeat_interleave(size, 1).to(torch.int32) for t in (self.zero, self.step))
        return (self.codes.to(torch.int32) - zero) * step


def progressive_weight(weight: Float[Tensor, "o i"], group_size: int, bits: int = 4) -> ProgressiveWeight:
    """First each row to 8 bits, symmetrically; then each group of these to few bits, with a whole step and a zero.

    Source: Lin et al., QServe, 2024, arXiv 2405.04532, section 4.1 (progressive group quantization, protective range).

    Raises:
        ValueError: the groups don't divide the columns.
    """
    if group_size < 1 or weight.shape[1] % group_size:
        raise ValueError(f"groups of {group_size} don't divide {weight.shape[1]} columns")
    last = 2**bits - 1
    greatest = weight.abs().amax(1, keepdim=True)
    scale = torch.where(greatest > 0, greatest, 1.0) / protective_range(bits)  # (O, 1)
    wide = torch.round(weight / scale).unflatten(1, (-1, group_size))  # (O, G, size)
    low, high = wide.amin(2).clamp(max=0), wide.amax(2).clamp(min=0)
    step = torch.round((high - low) / last).clamp(min=1)  # (O, G)
    zero = torch.round(-low / step).clamp(0, last)
    codes = (torch.round(wide / step[..., None]) + zero[..., None]).clamp(0, last)
    return ProgressiveWeight(codes.flatten(1).to(torch.uint8), zero.to(torch.uint8), step.to(torch.int32), scale)
