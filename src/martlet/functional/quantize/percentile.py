"""Ranges between percentiles: of a few, the one whose grid has the least squared error."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from martlet.functional.quantize.search import AffineGrid

QUANTILES = (0.999, 0.9999, 0.99999)
"""RepQ-ViT's official code, and I&S-ViT's for activations."""
WEIGHT_QUANTILES = (0.97, 0.98, 0.99, 0.995, 0.9995, 0.9997, 0.9999, 0.99995, 0.99999)
"""I&S-ViT's official code for weights."""


def percentile_scales(
    rows: Float[Tensor, "n r"], bits: int, with_zero: bool = False, quantiles: Sequence[float] = QUANTILES
) -> tuple[Float[Tensor, " n"], Float[Tensor, " n"]]:
    """For each row a scale and a zero point, which is a whole number and may lie outside the codes.

    with_zero: ranges are extended to 0, so that it doesn't. Each quantile cuts as much from both ends; the one with
    the least squared error is taken. A row of one value gets a scale that represents it. Source: Li et al., RepQ-ViT,
    2023, arXiv 2212.08254, official code.
    """
    ordered = rows.sort(1).values
    last = 2**bits - 1
    best = torch.full_like(rows[:, 0], float("inf"))
    scale, zero = torch.ones_like(best), torch.zeros_like(best)
    for quantile in quantiles:
        low, high = _at(ordered, 1 - quantile), _at(ordered, quantile)
        if with_zero:
            low, high = low.clamp(max=0), high.clamp(min=0)
        span = high - low
        step = torch.where(span > 0, span, torch.where(high != 0, high.abs(), 1.0)) / last  # (n)
        origin = torch.round(-low / step)
        codes = (torch.round(rows / step[:, None]) + origin[:, None]).clamp(0, last)
        error = ((codes - origin[:, None]) * step[:, None] - rows).square().mean(1)
        better = error < best
        best = torch.where(better, error, best)
        scale, zero = torch.where(better, step, scale), torch.where(better, origin, zero)
    return scale, zero


def percentile_grids(
    rows: Float[Tensor, "n r"], bits: int, quantiles: Sequence[float] = QUANTILES
) -> Float[Tensor, "n 2"]:
    """As `percentile_scales`, with zero on every grid: what a format for weights stores."""
    return torch.stack(percentile_scales(rows, bits, True, quantiles), 1)


def percentile_affine(x: Tensor, bits: int) -> AffineGrid:
    """One grid for a tensor of any shape, with zero on it."""
    scale, zero = percentile_scales(x.reshape(1, -1), bits, with_zero=True)
    return AffineGrid(bits, float(scale), int(zero))


def _at(ordered: Float[Tensor, "n r"], quantile: float) -> Float[Tensor, " n"]:
    """The quantile of sorted rows, between its two neighbours in proportion."""
    position = quantile * (ordered.shape[1] - 1)
    below = int(position)
    above = min(below + 1, ordered.shape[1] - 1)
    return torch.lerp(ordered[:, below], ordered[:, above], position - below)
