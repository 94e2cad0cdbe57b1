"""A normalization by constants that learns them, and its gradient, from the batches that it sees in training."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from martlet.functional.normalization import geometric_mean, is_outlier

WINDOW = 4
"""Batches whose statistics are smoothed."""
MOMENTUM = 0.9
STEADY = 1000
"""Steps after which the gradient takes in how far a batch is from the running statistics, by this factor at most: """
MOST = 5.0


class UnifiedNorm(nn.Module):
    """y = weight x / √(square + eps) + bias, by feature, over the last dimension.

    In training the square is that of the last batches; in inference it is what has been seen so far, a constant, so
    that the layer is a factor and a shift for each feature, which the Linears around it can take over.

    Source: Yang et al., Unified Normalization, 2022, arXiv 2208.01313, after the official code.
    """

    square: Tensor
    squares: Tensor
    pulls: Tensor
    pull: Tensor
    step: Tensor

    def __init__(self, features: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.eps = eps
        self.weight, self.bias = nn.Parameter(torch.ones(features)), nn.Parameter(torch.zeros(features))
        self.register_buffer("square", torch.ones(features))
        self.register_buffer("squares", torch.ones(WINDOW, features))
        self.register_buffer("pulls", torch.zeros(WINDOW, features))
        self.register_buffer("pull", torch.zeros(features))
        self.register_buffer("step", torch.zeros((), dtype=torch.long))

    @torch.no_grad()
    def set_(self, square: Tensor, factor: Tensor, shift: Tensor) -> None:
        """Takes a mean square of its input (C,), and what it is to do in inference."""
        self.square.copy_(square)
        self.squares.copy_(self.square.expand(WINDOW, -1))
        self.weight.copy_(factor * (square + self.eps).sqrt())
        self.bias.copy_(shift)

    def affine(self) -> tuple[Tensor, Tensor]:
        """Factor and shift of each feature in inference, in float64."""
        factor = self.weight.detach().double() / (self.square.double() + self.eps).sqrt()
        return factor, self.bias.detach().double()

    def forward(self, x: Tensor) -> Tensor:
        """(…, C) -> (…, C)."""
        if self.training:
            return _Normalize.apply(x, self.weight, self.bias, self)  # type: ignore[no-any-return]
        return x * (self.weight / (self.square + self.eps).sqrt()) + self.bias

    @torch.no_grad()
    def observe_(self, x: Tensor) -> tuple[Tensor, Tensor, bool]:
        """Takes in a batch. Returns the square to normalize it by, how far that is from what was seen before, as a
        factor, and whether the batch is an outlier, which leaves no trace in what is smoothed.
        """
        self.step += 1
        now, mean = int(self.step) % WINDOW, x.to(self.square).square().flatten(0, -2).mean(0)
        spread = self.squares.sqrt().var()
        self.squares[now] = mean
        if outlier := is_outlier(self.squares, spread):
            self.squares[now] = self.square
        square = mean if outlier or int(self.step) <= WINDOW else geometric_mean(self.squares)
        ratio = ((square + self.eps) / (self.square + self.eps)).sqrt().clamp(1 / MOST, MOST)
        if outlier or int(self.step) <= STEADY:
            ratio = torch.ones_like(ratio)
        self.square.mul_(MOMENTUM).add_(square, alpha=1 - MOMENTUM)
        return square, ratio, outlier

    @torch.no_grad()
    def pull_(self, found: Tensor, outlier: bool) -> Tensor:
        """Takes in the mean of gradient times normalized input (C,), and returns what is to be taken for it."""
        now = int(self.step) % WINDOW
        self.pulls[now] = self.pull if outlier else found
        mean = found if outlier or int(self.step) <= WINDOW else self.pulls.mean(0)
        self.pull.mul_(MOMENTUM).add_(mean, alpha=1 - MOMENTUM)
        return mean if outlier else self.pull


class _Normalize(torch.autograd.Function):
    """The square's own part in the gradient is what it was on average over the last batches, not this one's alone."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, layer: UnifiedNorm) -> Tensor:
        square, ratio, ctx.outlier = layer.observe_(x)
        ctx.layer, scale = layer, (square + layer.eps).rsqrt()
        z = x * scale
        ctx.save_for_backward(z, weight, scale, ratio)
        return z * weight + bias

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:  # type: ignore[override]
        z, weight, scale, ratio = ctx.saved_tensors
        inner = gradient * weight * ratio
        pull = ctx.layer.pull_((inner * z).flatten(0, -2).mean(0), ctx.outlier)
        others = tuple(range(gradient.ndim - 1))
        return (inner - pull * z) * scale, (gradient * z * ratio).sum(others), gradient.sum(others), None
