"""A grid for each channel of a LayerNorm's output, where channels whose ranges are far from the others' are clipped.

Source: Ranjan and Savakis, LRP-QViT, 2024, arXiv 2401.11243 (clipped channel-wise quantization). A channel with a great
scale is in nobody's way while each has a grid of its own; but the change to one grid for all multiplies the weights
that read it by its scale, and there it takes the others' room.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from jaxtyping import Float
from torch import Tensor

from martlet.functional.quantize.formats import IntegerGrid
from martlet.functional.quantize.reparameterize import ScaleReparameterization, reparameterize_scales

DEVIATIONS = (1.0, 1.5, 2.0, 3.0, 4.0, 6.0, float("inf"))


def clipped_scales(
    low: Float[Tensor, " c"], high: Float[Tensor, " c"], deviations: float, bits: int
) -> tuple[Float[Tensor, " c"], Float[Tensor, " c"]]:
    """A scale and a whole zero point for each channel, whose range ends where most channels' do at the latest.

    That is at the mean of the channels' ends and so many of their standard deviations. A channel that lies beyond it
    with all its values keeps its range; one of a single value gets a scale that represents it.
    """
    low_end, high_end = low, high
    if deviations != float("inf"):
        low_end = torch.maximum(low, low.mean() - deviations * low.std(correction=0))
        high_end = torch.minimum(high, high.mean() + deviations * high.std(correction=0))
    beyond = high_end <= low_end
    low, high = torch.where(beyond, low, low_end), torch.where(beyond, high, high_end)
    span = torch.where(high > low, high - low, torch.where(high != 0, high.abs(), 1.0))
    scale = span / (2**bits - 1)
    return scale, torch.round(-low / scale)


def search_clipping(
    rows: Float[Tensor, "r c"],
    weight: Float[Tensor, "o c"],
    bits: int,
    weight_bits: int,
    deviations: Iterable[float] = DEVIATIONS,
) -> ScaleReparameterization:
    """The change to one grid for all channels whose clipping gives the linear layer behind the least output error.

    The layer's weight is rounded too, as it is after the change; of equal errors the first.

    Raises:
        ValueError: no deviation to choose from, or every error is NaN.
    """
    low, high = torch.aminmax(rows, dim=0)
    best, least = None, float("inf")
    for number in deviations:
        change = reparameterize_scales(*clipped_scales(low, high, number, bits))
        if (error := _output_error(change, rows, weight, bits, weight_bits)) < least:
            best, least = change, error
    if best is None:
        raise ValueError("no deviation to choose from, or an error that is NaN")
    return best


def _output_error(change: ScaleReparameterization, rows: Tensor, weight: Tensor, bits: int, weight_bits: int) -> float:
    """Mean squared error of the layer after the change, with its input on the one grid and its weight rounded."""
    moved, (wider, _) = (rows + change.offset) / change.ratio, change.into_linear(weight, None)
    codes = (torch.round(moved / change.scale) + change.zero_point).clamp(0, 2**bits - 1)
    rounded = (codes - change.zero_point) * change.scale
    grid = IntegerGrid(weight_bits, symmetric=False)
    parameters = grid.fit(wider)
    rounded_weight = grid.dequantize(grid.quantize(wider, parameters), parameters)
    return float((rounded @ rounded_weight.T - moved @ wider.T).square().mean())
