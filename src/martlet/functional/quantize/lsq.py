"""Rounding whose steps have a gradient.

Source: Esser et al., Learned Step Size Quantization, 2020, arXiv 1902.08153.
"""

from __future__ import annotations

import torch
from torch import Tensor


def round_with_step(x: Tensor, step: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """round(clip(x / s, low, high)) s, of any shape, with LSQ's gradients.

    dy/dx is 1 within the grid and 0 outside; dy/ds is round(x / s) - x / s within, and low or high outside
    (equations 1 to 5). step, low, high are broadcastable to x.
    """
    ratio = torch.minimum(torch.maximum(x / step, low), high)
    return (ratio + (ratio.round() - ratio).detach()) * step


def gradient_scale(numbers: float, highest: int) -> float:
    """1 / √(n q), which the gradient of a step is multiplied by: n numbers share it, q is the highest code (2.2)."""
    return (numbers * highest) ** -0.5
