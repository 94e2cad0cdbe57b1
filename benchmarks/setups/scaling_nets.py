"""What `benchmarks/scaling.py` trains: small ViTs in stages, of As-ViT's space of topologies, and MobileViTv2s.

A topology says, for each stage, the kernel by which tokens are made (they overlap where it is larger than the stride),
into how many windows a side is split, and how much wider the MLP is inside; and the number of heads in the last stage.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

SIDE, STRIDE, STAGES = 32, 4, 3
"""Of the images, in pixels; of the first tokens; the paper has 224, 4 and four stages."""
SPACE: Mapping[str, tuple[int, ...]] = {
    "kernel1": (4, 5, 6, 7, 8),
    "kernel2": (2, 3, 4),
    "kernel3": (2, 3, 4),
    "splits1": (1, 2, 4),
    "splits2": (1, 2),
    "expansion1": (2, 3, 4, 5, 6),
    "expansion2": (2, 3, 4, 5, 6),
    "expansion3": (2, 3, 4, 5, 6),
    "heads": (4, 8, 16),
}
"""As in the paper's table of choices, for three stages of 8, 4 and 2 tokens a side: the first isn't split into windows
of one token, and a last stage of four tokens isn't split at all. Heads are a quarter of the paper's, as widths are."""


@dataclass(frozen=True, kw_only=True)
class Topology:
    """kernels, splits, expansions: of each stage. heads: in the last; each stage before has half of the next one's."""

    kernels: tuple[int, ...]
    splits: tuple[int, ...]
    expansions: tuple[int, ...]
    heads: int

    @classmethod
    def of(cls, choices: Mapping[str, int]) -> Topology:
        """From a value for each key of SPACE."""
        kernels, splits, expansions = (
            tuple(choices.get(f"{key}{stage}", 1) for stage in range(1, STAGES + 1))
            for key in ("kernel", "splits", "expansion")
        )
        return cls(kernels=kernels, splits=splits, expansions=expansions, heads=choices["heads"])


def draw(n: int, seed: int) -> Iterator[dict[str, int]]:
    """n different members of SPACE, by chance."""
    rng, seen = np.random.default_rng(seed), set[tuple[int, ...]]()
    while len(seen) < n:
        values = tuple(int(rng.choice(options)) for options in SPACE.values())
        if values not in seen:
            seen.add(values)
            yield dict(zip(SPACE, values, strict=True))


class Staged(nn.Module):
    """A ViT in stages of windows, whose width doubles from stage to stage. (B, 3, S, S) -> logits (B, K).

    num_classes: 0 gives the mean of the last tokens before the norm, (B, C), which untrained measures look at.
    """

    def __init__(self, topology: Topology, width: int, depths: Sequence[int], num_classes: int = 10) -> None:
        super().__init__()
        wide = [width * 2**i for i in range(STAGES)]
        self.stem = Merge(topology.kernels[0], STRIDE, 3, wide[0])
        self.merges = nn.ModuleList(
            Merge(kernel, 2, *pair) for kernel, pair in zip(topology.kernels[1:], pairwise(wide), strict=True)
        )
        self.stages = nn.ModuleList(
            nn.Sequential(
                *(
                    Block(wide[i], max(1, topology.heads // 2 ** (STAGES - 1 - i)), split, expansion)
                    for _ in range(depths[i])
                )
            )
            for i, (split, expansion) in enumerate(zip(topology.splits, topology.expansions, strict=True))
        )
        self.norm = nn.LayerNorm(wide[-1]) if num_classes else nn.Identity()
        self.head = nn.Linear(wide[-1], num_classes) if num_classes else nn.Identity()
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for stage, merge in zip(self.stages, chain(self.merges, [nn.Identity()]), strict=True):
            x = merge(stage(x))
        return self.head(self.norm(x.mean((1, 2))) if not isinstance(self.head, nn.Identity) else x.mean((1, 2)))


class Merge(nn.Module):
    """Each token from a square of those before: (B, 3, S, S) or (B, H, W, C) -> (B, H / stride, W / stride, D)."""

    def __init__(self, kernel: int, stride: int, dim: int, out: int) -> None:
        super().__init__()
        self.kernel, self.stride = kernel, stride
        self.first = dim == 3
        self.norm = nn.LayerNorm(out) if self.first else nn.LayerNorm(kernel**2 * dim)
        self.linear = nn.Linear(kernel**2 * dim, out, bias=self.first)

    def forward(self, x: Tensor) -> Tensor:
        x = x if self.first else x.movedim(-1, 1)
        side = x.shape[-1] // self.stride
        extra = self.kernel - self.stride
        x = functional.pad(x, (extra // 2, -(-extra // 2)) * 2)
        x = functional.unfold(x, self.kernel, stride=self.stride).mT.unflatten(1, (side, side))  # (B, H, W, K K C)
        return self.norm(self.linear(x)) if self.first else self.linear(self.norm(x))


class Block(nn.Module):
    """Attention inside of windows, and an MLP. (B, H, W, C) -> (B, H, W, C).

    splits: how many windows there are along a side; of as many as can be of one size.
    """

    def __init__(self, dim: int, heads: int, splits: int, expansion: int) -> None:
        super().__init__()
        self.heads, self.splits = heads, splits
        inner = dim // heads * heads
        self.norm1, self.qkv, self.proj = nn.LayerNorm(dim), nn.Linear(dim, 3 * inner), nn.Linear(inner, dim)
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = nn.Sequential(nn.Linear(dim, expansion * dim), nn.GELU(), nn.Linear(expansion * dim, dim))

    def forward(self, x: Tensor) -> Tensor:
        b, h, w, _ = x.shape
        s = math.gcd(self.splits, h)
        y = self.qkv(self.norm1(x)).reshape(b, s, h // s, s, w // s, 3, self.heads, -1)
        q, k, v = y.permute(5, 0, 1, 3, 6, 2, 4, 7).flatten(5, 6).flatten(1, 3)  # each (B s s, heads, N, D)
        y = functional.scaled_dot_product_attention(q, k, v).unflatten(0, (b, s, s)).unflatten(-2, (h // s, w // s))
        x = x + self.proj(y.permute(0, 1, 4, 2, 5, 3, 6).reshape(b, h, w, -1))
        return x + self.mlp(self.norm2(x))


def staged(choices: Mapping[str, int], width: int, depths: Sequence[int], seed: int, **kwargs: Any) -> Staged:
    """With weights drawn by the seed."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return Staged(Topology.of(choices), width, depths, **kwargs)
