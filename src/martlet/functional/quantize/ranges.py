"""Which range of a tensor to quantize: from all its values seen, in bounded memory."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from martlet.core.errors import NumericsError
from martlet.functional.quantize.affine import affine_parameters, dequantize, quantize

BINS = 4096
SHRINKS = (1.0, 0.85, 0.72, 0.61, 0.52, 0.44, 0.36)
"""Shares of the full range that `candidates` clips to."""


class Histogram:
    """Counts, or weights, of a tensor's values over [-limit, limit), however many there are.

    The limit doubles when a larger value comes, and neighbouring bins merge: one pass, fixed memory, zero always on an
    edge. The least and the greatest value are kept exactly.
    """

    def __init__(self) -> None:
        self.counts: Float[Tensor, " bins"] = torch.zeros(BINS, dtype=torch.float64)
        self.limit = 0.0
        self.low = float("inf")
        self.high = float("-inf")

    def add(self, x: Tensor, weight: Tensor | None = None) -> None:
        """Counts every value of x, of any shape, once or by a weight of the same shape.

        Raises:
            NumericsError: a value is NaN or infinite.
        """
        low, high = (float(v) for v in torch.aminmax(x.detach()))
        largest = max(-low, high)
        if not largest < float("inf"):
            raise NumericsError("an activation is NaN or infinite")
        self.low, self.high = min(self.low, low), max(self.high, high)
        if self.limit == 0.0:
            self.limit = largest * (1 + 1e-6)
        while largest > self.limit and self.limit > 0:
            quarter = self.counts.reshape(-1, 2).sum(1)  # (BINS / 2)
            self.counts = torch.nn.functional.pad(quarter, (BINS // 4, BINS // 4))
            self.limit *= 2
        if self.limit > 0 and weight is None:
            self.counts += torch.histc(x.detach().float(), BINS, -self.limit, self.limit).double()
        elif self.limit > 0 and weight is not None:
            bins = ((x.detach() + self.limit) * (BINS / (2 * self.limit))).long().clamp_(0, BINS - 1)
            self.counts += torch.bincount(bins.flatten(), weight.flatten(), BINS).double()

    def centers(self) -> Float[Tensor, " bins"]:
        width = 2 * self.limit / BINS
        return (torch.arange(BINS, dtype=torch.float64) + 0.5) * width - self.limit

    def percentile(self, keep_pct: float) -> tuple[float, float]:
        """The range that holds the central `keep_pct` per cent of the values, clipped to those seen."""
        if self.limit == 0.0:
            return 0.0, 0.0
        cumulative = self.counts.cumsum(0) / self.counts.sum()
        tail = (1 - keep_pct / 100) / 2
        edges = torch.linspace(-self.limit, self.limit, BINS + 1, dtype=torch.float64)
        first = int(torch.searchsorted(cumulative, torch.tensor(tail, dtype=torch.float64), right=True))
        last = int(torch.searchsorted(cumulative, torch.tensor(1 - tail, dtype=torch.float64)))
        return max(float(edges[first]), self.low), min(float(edges[min(last + 1, BINS)]), self.high)

    def mse(self, dtype: torch.dtype, symmetric: bool, steps: int = 50) -> tuple[float, float]:
        """The range whose affine grid gives the least weighted mean squared error over the values seen.

        Both ends shrink together first, then each by itself around the best.
        """
        total = float(self.counts.sum())
        if self.limit == 0.0 or total == 0.0:
            return self.low, self.high
        x, weight = self.centers(), self.counts / total
        occupied = weight > 0
        x, weight = x[occupied], weight[occupied]

        def best(lows: Tensor, highs: Tensor) -> tuple[float, float]:
            error = quantization_mse(x, weight, lows, highs, dtype, symmetric)
            i = int(error.argmin())
            return float(lows[i]), float(highs[i])

        shrink = torch.linspace(1.0, 1 / steps, steps, dtype=torch.float64)
        low, high = best(self.low * shrink, self.high * shrink)
        if symmetric:
            return low, high
        around = torch.linspace(1.25, 0.5, steps, dtype=torch.float64)
        low, high = best((low * around).clamp(min=self.low), torch.full_like(around, high))
        return best(torch.full_like(around, low), (high * around).clamp(max=self.high))


def candidates(histogram: Histogram, dtype: torch.dtype, symmetric: bool) -> list[tuple[float, float]]:
    """Ranges to choose among: the least squared error's, and the full one with both ends clipped, or the far one."""
    low, high = histogram.low, histogram.high
    both = [(low * share, high * share) for share in SHRINKS]
    far = [(low, high * share) for share in SHRINKS[1:]] if -high < 2 * low < 0 and not symmetric else []
    return [histogram.mse(dtype, symmetric), *both, *far]


def first_order_error(
    x: Float[Tensor, "b ..."], gradient: Float[Tensor, "b ..."], grid: tuple[Tensor, Tensor]
) -> Float[Tensor, " b"]:
    """(gradient · e)² of each image, for the error e of rounding x to a grid (scale, zero point) of one tensor.

    With the gradient of r · logits for random signs r, its expectation is |J e|²: the squared error of the logits to
    first order, in which errors of one tensor add up or cancel. Source: the Hessian-guided metric of Yuan et al.,
    PTQ4ViT, 2022, arXiv 2111.12293. Differs: theirs takes the Hessian's diagonal alone, which
    misses that clipped values err in one direction together.
    """
    scale, zero = grid
    error = dequantize(quantize(x, scale, zero), scale, zero) - x
    return (gradient * error).flatten(1).sum(1).square()


def quantization_mse(
    x: Float[Tensor, " n"],
    weight: Float[Tensor, " n"],
    lows: Float[Tensor, " k"],
    highs: Float[Tensor, " k"],
    dtype: torch.dtype,
    symmetric: bool,
) -> Float[Tensor, " k"]:
    """Weighted mean squared error of rounding x to each of k grids."""
    scale, zero = affine_parameters(lows, highs, dtype, symmetric)
    rounded = dequantize(quantize(x.expand(len(lows), -1), scale.double(), zero, 0), scale.double(), zero, 0)  # (k, n)
    return ((rounded - x).square() * weight).sum(1)


def weight_scale_mse(
    weight: Float[Tensor, "o n"], dtype: torch.dtype = torch.int8, steps: int = 40, least: float = 0.6
) -> Float[Tensor, " o"]:
    """Per output channel, the symmetric scale with the least squared rounding error.

    Searches `steps` clipping points between `least` and all of the largest magnitude.
    """
    largest = weight.abs().amax(1)  # (o)
    best = torch.full_like(largest, float("inf"))
    chosen = torch.ones_like(largest)
    for shrink in torch.linspace(1.0, least, steps).tolist():
        scale, zero = affine_parameters(-largest * shrink, largest * shrink, dtype, True)
        error = (dequantize(quantize(weight, scale, zero, 0), scale, zero, 0) - weight).square().sum(1)
        better = error < best
        best, chosen = torch.where(better, error, best), torch.where(better, scale, chosen)
    return chosen
