"""What tuning puts beside or around a block that stays as it is: bottlenecks, prompts, and the rungs of a ladder."""

from __future__ import annotations

from typing import Any

import torch
from timm.models.vision_transformer import Block
from torch import Tensor, nn
from torch.nn import functional

TEMPERATURE = 0.1
"""Of the gates of a ladder."""


class Bottleneck(nn.Module):
    """y + up(GELU(down(y))) of what a module gives, (…, C). Begins as the module alone, for `up` begins at zero."""

    def __init__(self, inner: nn.Module, width: int, bottleneck: int) -> None:
        super().__init__()
        self.inner = inner
        self.down, self.up = nn.Linear(width, bottleneck), nn.Linear(bottleneck, width)
        nn.init.zeros_(self.up.weight)
        nn.init.zeros_(self.up.bias)

    def forward(self, *args: Any, **more: Any) -> Tensor:
        y = self.inner(*args, **more)
        return y + self.up(functional.gelu(self.down(y)))


class Prompted(nn.Module):
    """A block that sees P tokens more than it gives back, behind the first `prefix`. prompts: (P, C)."""

    def __init__(self, inner: nn.Module, width: int, prompts: int, prefix: int) -> None:
        super().__init__()
        self.inner, self.prefix = inner, prefix
        self.prompts = nn.Parameter(torch.empty(prompts, width))
        nn.init.trunc_normal_(self.prompts, std=0.02)

    def forward(self, x: Tensor, *args: Any, **more: Any) -> Any:
        prompts = self.prompts.to(x.dtype).expand(x.shape[0], -1, -1)  # no len(), which a trace takes for a constant
        x = torch.cat([x[:, : self.prefix], prompts, x[:, self.prefix :]], 1)  # (B, N + P, C)
        out = self.inner(x, *args, **more)
        y = out[0] if isinstance(out, tuple) else out
        y = torch.cat([y[:, : self.prefix], y[:, self.prefix + len(self.prompts) :]], 1)  # (B, N, C)
        return (y, *out[1:]) if isinstance(out, tuple) else y


class Rung(nn.Module):
    """A block (B, N, C), and beside it one of a narrower network (B, N, S) that sees what it gives.

    The narrow block gets g down(y) + (1 - g) s of the block's output y and the rung before, g = sigmoid(a / T) being
    learned. Tokens carry s behind their C features from the first rung to the last, which gives y + up(s). No gradient
    reaches the block or what comes before it.
    Source: Sung et al., LST, 2022, arXiv 2206.06522.
    """

    def __init__(self, inner: nn.Module, width: int, side: int, num_heads: int, first: bool, last: bool) -> None:
        super().__init__()
        self.inner, self.width = inner, width
        self.down, self.block = nn.Linear(width, side), Block(side, num_heads, qkv_bias=True)
        self.gate = nn.Parameter(torch.zeros(1))
        self.enter = nn.Linear(width, side) if first else None
        self.leave = nn.Linear(side, width) if last else None
        if self.leave is not None:
            nn.init.zeros_(self.leave.weight)
            nn.init.zeros_(self.leave.bias)

    def forward(self, x: Tensor, *args: Any, **more: Any) -> Any:
        x, s = x[..., : self.width].detach(), x[..., self.width :]
        if self.enter is not None:
            s = self.enter(x)  # (B, N, S)
        out = self.inner(x, *args, **more)
        y = (out[0] if isinstance(out, tuple) else out).detach()
        gate = torch.sigmoid(self.gate / TEMPERATURE)
        s = self.block(gate * self.down(y) + (1 - gate) * s)
        y = torch.cat([y, s], -1) if self.leave is None else y + self.leave(s)
        return (y, *out[1:]) if isinstance(out, tuple) else y
