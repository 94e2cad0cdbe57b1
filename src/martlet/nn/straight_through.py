"""Quantizers with parameters, that stand in for those of a graph while they are learned: gradients pass the rounding.

Source: Esser et al., Learned Step Size Quantization, 2020, arXiv 1902.08153, section 2.1.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from martlet.functional.quantize.lsq import gradient_scale, round_with_step
from martlet.functional.quantize.packing import pack
from martlet.functional.structure.sparsity import pattern_of
from martlet.nn.quantizers import ActivationQuantizer, PackedWeightQuantizer, TableQuantizer

EDGE = 0.499
"""Of a step, how far from its code a weight may begin: nearer than what rounds to the next."""


class LearnedScale(nn.Module):
    """A table whose scale has a gradient, through the rounding as if it weren't there."""

    def __init__(self, quantizer: TableQuantizer) -> None:
        super().__init__()
        self.quantizer = quantizer
        self.factor = nn.Parameter(torch.ones_like(quantizer.scale))

    def forward(self, x: Tensor) -> Tensor:
        scale = self.quantizer.along(self.quantizer.scale * self.factor, x)
        return StraightThrough.apply(x, scale, self.quantizer)

    def finish_(self) -> None:
        self.quantizer.scale.mul_(self.factor.detach())


class Passing(nn.Module):
    """A grid of 8 bits, which engines have kernels for, as it is, with a gradient as if it weren't there."""

    def __init__(self, quantizer: ActivationQuantizer) -> None:
        super().__init__()
        self.quantizer = quantizer

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            y = self.quantizer(x)
            within = ((y - x).abs() <= self.quantizer.scale).to(x.dtype)  # beyond the grid it is farther
        passed = x * within
        return passed + (y - passed).detach()

    def finish_(self) -> None:
        """It is as it was."""


class LearnedWeight(nn.Module):
    """A weight in floating point that is rounded whenever it is used, to a grid whose steps are learned too.

    Begins where it rounds to the codes of the quantizer, as near as that allows to `start`, the weight before it was
    rounded, if there is one. weight: (O, I). factor: (O, groups), of the quantizer's steps.
    """

    low: Tensor
    high: Tensor

    def __init__(self, quantizer: PackedWeightQuantizer, start: Tensor | None = None) -> None:
        super().__init__()
        self.quantizer = quantizer
        values, scale, zero = quantizer.integers()
        zero = torch.zeros_like(scale) if zero is None else zero.to(scale.dtype)
        half = 2 ** (quantizer.bits - 1)
        self.register_buffer("low", self._wide(-half - zero))
        self.register_buffer("high", self._wide(half - 1 - zero))
        steps = values.to(scale.dtype) - self._wide(zero)  # (O, I)
        wide = self._wide(scale)
        if start is not None and start.shape == quantizer.shape:
            was = quantizer.flatten(start.detach().to(wide.device)) / wide
            steps = was.clamp(steps - EDGE, steps + EDGE)
        self.weight = nn.Parameter(steps * wide)
        self.factor = nn.Parameter(torch.ones_like(scale))
        self.damping = gradient_scale(steps.numel() / scale.numel(), half)

    def _wide(self, groups: Tensor) -> Tensor:
        """(O, groups) as (O, I)."""
        return groups.repeat_interleave(self.quantizer.group_size, 1)

    def forward(self) -> Tensor:
        factor = self.factor * self.damping + self.factor.detach() * (1 - self.damping)  # its gradient is damped
        scale = self._wide(self.quantizer.scale * factor)
        return self.quantizer.unflatten(round_with_step(self.weight, scale, self.low, self.high))

    @torch.no_grad()
    def make_zero_(self, zeros: int, of: int, run: int) -> None:
        """Begins at exactly zero where that keeps so many of each so many neighbors zero; else leaves all as it is."""
        values, _, zero = self.quantizer.integers()
        gone = pattern_of(values == (0 if zero is None else self._wide(zero)), self.weight, zeros, of, run)
        if gone is not None:
            self.weight.masked_fill_(gone, 0)

    def finish_(self) -> None:
        quantizer = self.quantizer
        quantizer.scale.mul_(self.factor.detach())
        steps = (self.weight.detach() / self._wide(quantizer.scale)).clamp(self.low, self.high).round()
        quantizer.codes.copy_(pack((steps - self.low).to(torch.uint8), quantizer.bits))


class LearnedSteps(nn.Module):
    """A weight whose codes stay, and whose steps alone are learned. factor: (O, groups), of the quantizer's steps."""

    steps: Tensor

    def __init__(self, quantizer: PackedWeightQuantizer) -> None:
        super().__init__()
        self.quantizer = quantizer
        values, scale, zero = quantizer.integers()
        steps = values.to(scale.dtype)
        if zero is not None:
            steps = steps - zero.to(scale.dtype).repeat_interleave(quantizer.group_size, 1)
        self.register_buffer("steps", steps, persistent=False)
        self.factor = nn.Parameter(torch.ones_like(scale))

    def forward(self) -> Tensor:
        wide = (self.quantizer.scale * self.factor).repeat_interleave(self.quantizer.group_size, 1)
        return self.quantizer.unflatten(self.steps * wide)

    def finish_(self) -> None:
        self.quantizer.scale.mul_(self.factor.detach())


Learned = LearnedScale | LearnedWeight | LearnedSteps | Passing


def learned(quantizer: nn.Module, start: Tensor | None = None) -> Learned | None:
    """What stands in for a quantizer while it is learned; None for what has nothing to learn and hinders no gradient.

    A weight of 8 bits, or of a format whose codes aren't evenly spaced, stays as it is.
    """
    if isinstance(quantizer, PackedWeightQuantizer):
        return LearnedWeight(quantizer, start) if quantizer.format is None else None
    if isinstance(quantizer, ActivationQuantizer):
        return Passing(quantizer)
    return LearnedScale(quantizer) if isinstance(quantizer, TableQuantizer) else None


class StraightThrough(torch.autograd.Function):
    """y = (table(x / s + o) - o) s, with dy/dx = 1 within the table and 0 outside, and dy/ds = (y - x dy/dx) / s."""

    @staticmethod
    def forward(ctx, x: Tensor, scale: Tensor, quantizer: TableQuantizer) -> Tensor:  # type: ignore[override]
        offset = quantizer.along(quantizer.offset, x)
        low, high = (0, 2**quantizer.bits - 1) if quantizer.values is None else quantizer.values[[0, -1]].tolist()
        position = (x / scale).add_(offset)
        within = (position >= low) & (position <= high)
        y = quantizer.look_up(position).sub_(offset).mul_(scale)
        ctx.save_for_backward(x, y, scale, within)
        return y

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, Tensor, None]:  # type: ignore[override]
        x, y, scale, within = ctx.saved_tensors
        passed = gradient * within
        by_scale = torch.addcmul(gradient * y, passed, x, value=-1)
        return passed, by_scale.sum_to_size(scale.shape) / scale, None
