"""Into how many parts to split the channels of a tensor."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor


@dataclass(frozen=True)
class Split:
    """Parts of each channel (C), and by how much the rounding error of the tensor falls, in dB."""

    counts: Tensor
    gain_db: float


def split_counts(
    low: Float[Tensor, " c"], high: Float[Tensor, " c"], importance: Float[Tensor, " c"], extra: Sequence[int]
) -> Split:
    """Splits the channel that reaches furthest again and again, until exactly one of `extra` channels is added.

    Of these and no split, the one with the least expected rounding error on one grid. A channel in n parts spans 1/n of
    its range. Rounding one part errs by step² / 12, and n parts, which all err alike, by n² times that. The step is the
    span of all parts and zero over 255. importance weights each channel's squared error.
    """

    def error(counts: Tensor) -> float:
        span = float((high / counts).amax().clamp(min=0) - (low / counts).amin().clamp(max=0))
        return span**2 * float((importance * counts.double().square()).sum())

    ones = torch.ones(len(low), dtype=torch.long)
    best, least = ones, error(ones)
    plain = least
    for parts in extra:
        counts = ones.clone()
        for _ in range(parts):
            widest = torch.maximum((high / counts).clamp(min=0), (-low / counts).clamp(min=0))
            counts[int(widest.argmax())] += 1
        if (found := error(counts)) < least:
            best, least = counts, found
    gain = 10 * math.log10(plain / least) if least > 0 else 0.0
    return Split(best, gain)
