"""What tuning puts beside or around a block that stays as it is: bottlenecks, prompts, rungs, tiers."""

from __future__ import annotations

from typing import Any

import torch
from timm.models.vision_transformer import Block
from torch import Tensor, nn
from torch.nn import functional

from martlet.functional.redundancy import gather

TEMPERATURE = 0.1
"""Of the gates of a ladder."""


class Bottleneck(nn.Module):
    """y + up(GELU(down(y))) of what a module gives, (…, C). Begins as the module alone, for `up` begins at zero."""

    def __init__(self, inner: nn.Module, width: int, bottleneck: int) -> None:
        super().__init__()
        self.inner = inner
        self.down, self.up = nn.Linear(width, bottleneck), _from_nothing(bottleneck, width)

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


class Beside(nn.Module):
    """A block (B, N, C) that no gradient comes through, to it or what is before it, and what stands beside it.

    What that has found rides behind the C features of tokens, from one block to the next.
    """

    def __init__(self, inner: nn.Module, width: int) -> None:
        super().__init__()
        self.inner, self.width = inner, width

    def forward(self, x: Tensor, *args: Any, **more: Any) -> Any:
        x, riding = x[..., : self.width].detach(), x[..., self.width :]
        out = self.inner(x, *args, **more)
        y = self.beside(x, (out[0] if isinstance(out, tuple) else out).detach(), riding)
        return (y, *out[1:]) if isinstance(out, tuple) else y

    def beside(self, x: Tensor, y: Tensor, riding: Tensor) -> Tensor:
        """From what the block gets and gives, and what rides behind it, to what the next gets."""
        raise NotImplementedError


class Rung(Beside):
    """A block (B, N, C), and beside it one of a narrower network (B, N, S) that sees what it gives.

    The narrow block gets g down(y) + (1 - g) s of the block's output y and the rung before, g = sigmoid(a / T) being
    learned. The last rung gives y + up(s).
    Source: Sung et al., LST, 2022, arXiv 2206.06522.
    """

    def __init__(self, inner: nn.Module, width: int, side: int, num_heads: int, first: bool, last: bool) -> None:
        super().__init__(inner, width)
        self.down, self.block = nn.Linear(width, side), Block(side, num_heads, qkv_bias=True)
        self.gate = nn.Parameter(torch.zeros(1))
        self.enter = nn.Linear(width, side) if first else None
        self.leave = _from_nothing(side, width) if last else None

    def beside(self, x: Tensor, y: Tensor, riding: Tensor) -> Tensor:
        s = riding if self.enter is None else self.enter(x)  # (B, N, S)
        gate = torch.sigmoid(self.gate / TEMPERATURE)
        s = self.block(gate * self.down(y) + (1 - gate) * s)
        return torch.cat([y, s], -1) if self.leave is None else y + self.leave(s)


class Tier(Beside):
    """A block (B, N, C), and what it gives in S features behind what those before it gave: (B, N, C + L S) after L.

    The last of them gives y + up(relu(a)) in their place, a being all of it as `gather` has it, by the last's own.
    spreads: those count less that say what others say.
    Source: Diao et al., SHERL, 2024, arXiv 2407.07523.
    """

    def __init__(self, inner: nn.Module, width: int, side: int, first: bool, last: bool, spreads: bool) -> None:
        super().__init__(inner, width)
        self.side, self.spreads = side, spreads
        self.enter = nn.Sequential(nn.Linear(width, side), nn.LayerNorm(side)) if first else None
        self.down = nn.Sequential(nn.Linear(width, side), nn.LayerNorm(side))
        self.attend = nn.Linear(side, 1) if last else None
        self.leave = _from_nothing(side, width) if last else None

    def beside(self, x: Tensor, y: Tensor, riding: Tensor) -> Tensor:
        parts = [riding if self.enter is None else self.enter(x), self.down(y)]
        if self.attend is None or self.leave is None:
            return torch.cat([y, *parts], -1)
        tiers = parts[0].unflatten(-1, (-1, self.side))  # (B, N, L, S)
        return y + self.leave(functional.relu(gather(tiers, parts[1], self.attend, self.spreads)))


def _from_nothing(inputs: int, outputs: int) -> nn.Linear:
    """A Linear that gives zero until it has learned."""
    linear = nn.Linear(inputs, outputs)
    nn.init.zeros_(linear.weight)
    nn.init.zeros_(linear.bias)
    return linear
