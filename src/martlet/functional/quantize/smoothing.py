"""Moving the difficulty of quantization from activations to weights."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from martlet.functional.quantize.affine import affine_parameters, dequantize, quantize

ALPHAS = (0.25, 0.5, 0.75)
"""Up to where a channel's greatest value, known from a few images, doesn't decide alone."""


def smoothquant_factors(
    activation_amax: Float[Tensor, " c"], weight_amax: Float[Tensor, " c"], alpha: float
) -> Float[Tensor, " c"]:
    """s_j = max|X_j|^alpha / max|W_j|^(1 - alpha), with which X is divided and W multiplied.

    Source: Xiao et al., SmoothQuant, 2023, arXiv 2211.10438, equation 4. Channels that are never active keep s = 1,
    and all are divided by their geometric mean, which the paper leaves free: only ratios between channels matter for
    a per-tensor range.
    """
    dead = (activation_amax <= 0) | (weight_amax <= 0)
    factors = activation_amax.clamp(min=1e-8) ** alpha / weight_amax.clamp(min=1e-8) ** (1 - alpha)
    live = factors[~dead]
    if live.numel():
        factors = factors / live.log().mean().exp()
    return torch.where(dead, 1.0, factors)


@dataclass(frozen=True)
class Smoothing:
    """The chosen alpha (None: leave as it is), its factors (C), and what it gains over leaving, in dB."""

    alpha: float | None
    factors: Tensor
    gain_db: float


def search_smoothing(
    rows: Float[Tensor, "r c"],
    low: Float[Tensor, " c"],
    high: Float[Tensor, " c"],
    weight: Float[Tensor, "o c"],
    importance: Float[Tensor, "r o"],
    alphas: Sequence[float] = ALPHAS,
) -> Smoothing:
    """The alpha whose factors give the least squared error of rows @ weightᵀ in 8 bits, weighted by `importance`.

    rows are samples of the input, low and high its range in each channel over all images. Inputs are rounded to one
    u8 grid, weights to one s8 grid an output channel. SmoothQuant fixes alpha by hand for a whole model; this is the
    grid search of Lin et al., AWQ, 2023, arXiv 2306.00978, section 3.2, over SmoothQuant's factors.
    """
    exact = rows @ weight.T  # (r, o)

    def error(factors: Tensor) -> float:
        scale, zero = affine_parameters((low / factors).amin(), (high / factors).amax(), torch.uint8, False)
        scaled = weight * factors
        steps, zeros = affine_parameters(-scaled.abs().amax(1), scaled.abs().amax(1), torch.int8, True)
        rounded_rows = dequantize(quantize(rows / factors, scale, zero), scale, zero)
        rounded_weight = dequantize(quantize(scaled, steps, zeros, 0), steps, zeros, 0)
        return float(((rounded_rows @ rounded_weight.T - exact).square() * importance).sum())

    ones = torch.ones_like(low)
    best, least = Smoothing(None, ones, 0.0), error(ones)
    plain = least
    activation_amax, weight_amax = torch.maximum(-low, high), weight.abs().amax(0)
    for alpha in alphas:
        factors = smoothquant_factors(activation_amax, weight_amax, alpha)
        if (found := error(factors)) < least:
            least, best = found, Smoothing(alpha, factors, 10 * math.log10(plain / max(found, 1e-30)))
    return best
