"""Two thin Linears in the place of a wide one."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn

from martlet.functional.structure.low_rank import Thin


class LowRankLinear(nn.Module):
    """up(down(x)): (…, I) -> (…, r) -> (…, O). down has no bias: whatever it had would go through up into up's own."""

    def __init__(self, in_features: int, rank: int, out_features: int, bias: bool = True) -> None:
        super().__init__()
        self.in_features, self.rank, self.out_features = in_features, rank, out_features
        self.down = nn.Linear(in_features, rank, bias=False)
        self.up = nn.Linear(rank, out_features, bias=bias)

    @property
    def weight(self) -> Tensor:
        """(O, I), the product; what is written into it is lost."""
        return self.up.weight @ self.down.weight

    @property
    def bias(self) -> Tensor | None:
        return self.up.bias

    def forward(self, x: Tensor) -> Tensor:
        return self.up(self.down(x))


@torch.no_grad()
def thin_linear(linear: nn.Linear, thin: Thin) -> LowRankLinear:
    """The layer that computes `thin`, of the type, place and mode of a Linear."""
    layer = empty_like(linear, thin.down.shape[0], thin.bias is not None)
    layer.down.weight.copy_(thin.down)
    layer.up.weight.copy_(thin.up)
    if thin.bias is not None:
        layer.up.bias.copy_(thin.bias)
    return layer


def empty_like(linear: nn.Linear, rank: int, bias: bool) -> LowRankLinear:
    """One of values that mean nothing."""
    sizes = cast(int, linear.in_features), rank, cast(int, linear.out_features)
    return LowRankLinear(*sizes, bias=bias).to(linear.weight).train(linear.training)
