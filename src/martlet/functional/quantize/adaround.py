"""Learning which way to round each weight, and learning it under activations that are rounded only now and then.

Source: Nagel et al., AdaRound, 2020, arXiv 2004.10568, equations 21 to 24; Wei et al., QDrop, 2022, arXiv 2203.05740.
"""

from __future__ import annotations

import torch
from torch import Tensor

from martlet.functional.quantize.logarithmic import check_bits

STRETCH_LOW, STRETCH_HIGH = -0.1, 1.1  # γ and ζ: the sigmoid reaches 0 and 1, where its gradient ends


def rectified_sigmoid(v: Tensor) -> Tensor:
    """h(V) = clip(σ(V) (ζ - γ) + γ, 0, 1): what is added to a weight rounded down, in steps (equation 23)."""
    return (torch.sigmoid(v) * (STRETCH_HIGH - STRETCH_LOW) + STRETCH_LOW).clamp(0, 1)


def initial_rounding(weight: Tensor, scale: Tensor) -> Tensor:
    """The V with which the soft weight is the weight itself: h(V) = W / s - ⌊W / s⌋.

    scale is positive and broadcastable to the weight, of any shape.
    """
    fraction = weight / scale - torch.floor(weight / scale)
    return -torch.log((STRETCH_HIGH - STRETCH_LOW) / (fraction - STRETCH_LOW) - 1)


def soft_weight(weight: Tensor, v: Tensor, scale: Tensor, zero_point: Tensor, bits: int) -> Tensor:
    """s (clip(⌊W / s⌋ + h(V) + z, 0, 2^bits - 1) - z), which V has a gradient of (equation 22).

    scale and zero point are broadcastable to the weight, of any shape. Differs: the paper has no zero point.

    Raises:
        ValueError: bits not from 2 to 8.
    """
    check_bits(bits)
    steps = torch.floor(weight / scale) + rectified_sigmoid(v) + zero_point
    return (steps.clamp(0, 2**bits - 1) - zero_point) * scale


def learned_codes(weight: Tensor, v: Tensor, scale: Tensor, zero_point: Tensor, bits: int) -> Tensor:
    """Codes (uint8) once V is learned: each weight up where h(V) is at least a half, which is where V is at least 0.

    Raises:
        ValueError: bits not from 2 to 8.
    """
    check_bits(bits)
    steps = torch.floor(weight / scale) + (v >= 0) + zero_point
    return steps.clamp(0, 2**bits - 1).to(torch.uint8)


def rounding_regularizer(v: Tensor, beta: float) -> Tensor:
    """Σ 1 - |2 h(V) - 1|^β: 0 where every weight is decided, 1 a weight that is half way (equation 24).

    Raises:
        ValueError: beta isn't positive.
    """
    if beta <= 0:
        raise ValueError(f"beta {beta}; it has to be positive")
    return (1 - (2 * rectified_sigmoid(v) - 1).abs().pow(beta)).sum()


def annealed_beta(
    step: int, steps: int, warmup_ratio: float = 0.2, first: float = 20.0, last: float = 2.0
) -> float | None:
    """β at a step from 0 to steps - 1, falling from `first` to `last`; None while warming up, without regularizer.

    A large β leaves weights near the middle alone, a small one drives them to the nearer side. Source: AdaRound,
    section 3.2; the fall is linear and the warm-up without regularizer, as in BRECQ's official code.

    Raises:
        ValueError: a step outside, or a warm-up that is the whole.
    """
    if not 0 <= step < steps or not 0 <= warmup_ratio < 1:
        raise ValueError(f"step {step} of {steps} with a warm-up of {warmup_ratio}")
    start = warmup_ratio * steps
    return None if step < start else last + (first - last) * (1 - (step - start) / (steps - start))


def drop_quantization(
    x: Tensor, rounded: Tensor, drop_ratio: float = 0.5, generator: torch.Generator | None = None
) -> Tensor:
    """`rounded`, but each value for itself is x instead with the probability drop_ratio.

    Source: QDrop, element by element. Shapes are the same, and any.

    Raises:
        ValueError: drop_ratio isn't from 0 to 1, or shapes differ.
    """
    if not 0 <= drop_ratio <= 1:
        raise ValueError(f"a drop ratio of {drop_ratio}; it's a probability")
    if x.shape != rounded.shape:
        raise ValueError(f"values {tuple(x.shape)}, rounded ones {tuple(rounded.shape)}")
    dropped = torch.rand(x.shape, generator=generator, device=x.device) < drop_ratio
    return torch.where(dropped, x, rounded)
