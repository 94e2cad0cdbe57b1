"""A fixed noise, added before activations are rounded and taken away after, with which they err less.

Source: Liu et al., NoisyQuant, 2023, arXiv 2211.16056, section 3. Where most values lie near one edge of a grid's step,
as with a heavy tail, noise spreads them over it. The noise is subtracted in the next layer's bias:
`logarithmic.fold_shift`.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor


def noisy_bias(channels: int, amplitude: float, generator: torch.Generator) -> Float[Tensor, " c"]:
    """Noise drawn once, evenly from -amplitude to amplitude, one number a channel; the same for all tokens and images.

    Differs: the official code draws from a normal distribution.

    Raises:
        ValueError: no channel, or a negative amplitude.
    """
    if channels < 1 or amplitude < 0:
        raise ValueError(f"{channels} channels, an amplitude of {amplitude}")
    return (torch.rand(channels, generator=generator) * 2 - 1) * amplitude


def expected_rounding_error(x: Tensor, scale: float, amplitude: float) -> Tensor:
    """For each value the mean of (round((x + N) / scale) scale - N - x)² over N, even from -amplitude to amplitude.

    Exact, for a grid without ends: with F the integral of the squared error of rounding y, which is
    k scale³ / 12 + u³ / 3 for y = k scale + u with |u| <= scale / 2, the mean is (F(x + n) - F(x - n)) / 2n. A zero
    point doesn't matter. Differs: the paper's theorem 1 is about noise that stays between two values of the grid.

    Raises:
        ValueError: scale isn't positive, or amplitude is negative.
    """
    if not scale > 0 or amplitude < 0:
        raise ValueError(f"scale {scale}, amplitude {amplitude}; the one is positive, the other isn't negative")
    if amplitude == 0:
        return (torch.round(x / scale) * scale - x).square()
    high, low = _integral(x + amplitude, scale), _integral(x - amplitude, scale)
    return (high - low) / (2 * amplitude)


def search_amplitude(x: Tensor, scale: float, steps: int = 50) -> tuple[float, float]:
    """The amplitude up to one step of the grid with the least expected error of x, and that error over the one without.

    0 and 1 where no noise helps. The expectation is over noise: one draw may do otherwise, if channels are few.

    Raises:
        ValueError: scale isn't positive, or steps is below 1.
    """
    if steps < 1:
        raise ValueError(f"{steps} steps")
    x = x.double()
    plain = float(expected_rounding_error(x, scale, 0.0).mean())
    best, least = 0.0, plain
    for i in range(1, steps + 1):
        amplitude = scale * i / steps
        if (error := float(expected_rounding_error(x, scale, amplitude).mean())) < least:
            best, least = amplitude, error
    return best, least / plain if plain > 0 else 1.0


def _integral(y: Tensor, scale: float) -> Tensor:
    whole = torch.round(y / scale)
    return whole * scale**3 / 12 + (y - whole * scale) ** 3 / 3
