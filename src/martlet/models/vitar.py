"""ViTAR: any image's tokens are merged, a few at a time, into a grid of fixed size; places are learned fuzzily."""

from __future__ import annotations

from functools import partial
from itertools import pairwise
from typing import Any

import torch
from timm.layers import DropPath, LayerNorm2d, Mlp, trunc_normal_
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from torch import Tensor, nn
from torch.nn.functional import grid_sample, interpolate

from martlet.core.errors import SourceError
from martlet.models.backbone import Backbone, Block, SelfAttention, cfg, drop_path_rates, merge_heads, split_heads
from martlet.models.papers.paper import Paper, Stated

__all__ = ["ViTAR"]

PAPER = Paper(
    title="ViTAR: Vision Transformer with Any Resolution",
    authors="Fan et al.",
    year=2024,
    arxiv="2403.18361",
    code=None,
    license="none",
    models={
        "vitar_small_patch16_224": Stated(params=None, macs=None),
        "vitar_base_patch16_224": Stated(params=None, macs=None),
    },
    differs="Where a side isn't twice the grid's, cells hold one or two tokens along it, in the place of padding. The "
    "transformer after the merger is DeiT's, without class token.",
)

default_cfgs = generate_default_cfgs({name: cfg() for name in PAPER.models})

norm_layer = partial(nn.LayerNorm, eps=1e-6)

Size = tuple[int, int]


class FuzzyPosition(nn.Module):
    """Adds a learned map of positions, resized to the image. (B, C, H, W) -> the same.

    In training each token's place is off by up to half a token along both axes, uniformly, anew in every call.
    """

    def __init__(self, dim: int, size: Size) -> None:
        super().__init__()
        self.embedding = nn.Parameter(trunc_normal_(torch.empty(1, dim, *size), std=0.02))

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return x + interpolate(self.embedding, x.shape[2:], mode="bilinear", align_corners=False)
        offsets = torch.rand(*x.shape[2:], 2, dtype=x.dtype, device=x.device) - 0.5
        return x + self.sample(offsets)

    def sample(self, offsets: Tensor) -> Tensor:
        """At places that are off by (H, W, 2), in tokens, along H and W: (1, C, H, W)."""
        size = offsets.shape[:2]
        lines = (torch.arange(side, dtype=offsets.dtype, device=offsets.device) for side in size)
        places = torch.stack(torch.meshgrid(*lines, indexing="ij"), -1) + 0.5 + offsets
        grid = (2 * places / offsets.new_tensor(size) - 1).flip(-1).unsqueeze(0)  # (1, H, W, 2), x first
        return grid_sample(self.embedding, grid, mode="bilinear", padding_mode="border", align_corners=False)


class TokenMerger(nn.Module):
    """Adaptive token merger: the mean of each cell attends to the cell's tokens, then an MLP; again with the same
    weights until there are as many cells as wanted. (B, H, W, C) -> (B, *grid, C).

    A side is halved each time, or brought to the grid's if it is less than twice that.
    """

    def __init__(self, dim: int, num_heads: int, grid: Size, mlp_ratio: float, drop_path: float) -> None:
        super().__init__()
        self.num_heads, self.grid = num_heads, grid
        self.norm1, self.norm2 = norm_layer(dim), norm_layer(dim)
        self.q, self.kv, self.proj = nn.Linear(dim, dim), nn.Linear(dim, 2 * dim), nn.Linear(dim, dim)
        self.mlp = Mlp(dim, int(mlp_ratio * dim))
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor) -> Tensor:
        while True:
            x = self.merge(x, *(max(cells, -(-side // 2)) for cells, side in zip(self.grid, x.shape[1:3], strict=True)))
            if x.shape[1:3] == self.grid:
                return x

    def merge(self, x: Tensor, h: int, w: int) -> Tensor:
        """(B, H, W, C) -> (B, h, w, C), at most 2 · 2 tokens into one."""
        rows, columns = cells(x.shape[1], h).to(x.device), cells(x.shape[2], w).to(x.device)
        inside = (rows >= 0)[:, None, :, None] & (columns >= 0)[None, :, None, :]  # (h, w, 2 or 1, 2 or 1)
        parts = x.index_select(1, rows.clamp(min=0).flatten()).index_select(2, columns.clamp(min=0).flatten())
        parts = parts.unflatten(2, columns.shape).unflatten(1, rows.shape).transpose(2, 3)  # (B, h, w, 2, 2, C)
        parts, inside = parts.flatten(3, 4).flatten(1, 2), inside.flatten(2).flatten(0, 1)  # (B, h w, 4, C), (h w, 4)
        share = inside / inside.sum(1, keepdim=True)
        mean = (share.unsqueeze(-1) * parts).sum(2)  # (B, h w, C)
        merged = mean + self.drop_path(self.attend(self.norm1(mean), self.norm1(parts), inside))
        return (merged + self.drop_path(self.mlp(self.norm2(merged)))).unflatten(1, (h, w))

    def attend(self, x: Tensor, parts: Tensor, inside: Tensor) -> Tensor:
        """GridAttention: (B, N, C) asks its own (B, N, P, C), those of them that are inside (N, P)."""
        b, n, p = parts.shape[:3]
        q = split_heads(self.q(x).flatten(0, 1).unsqueeze(1), self.num_heads)  # (B N, heads, 1, D)
        k, v = (split_heads(one, self.num_heads) for one in self.kv(parts).flatten(0, 1).chunk(2, -1))
        q, k, v = (one.unflatten(0, (b, n)) for one in (q, k, v))
        absent = torch.zeros(inside.shape, dtype=x.dtype, device=x.device).masked_fill(~inside, -1e4)
        scores = q * q.shape[-1] ** -0.5 @ k.transpose(-2, -1) + absent.view(n, 1, 1, p)  # (B, N, heads, 1, P)
        return self.proj(merge_heads((scores.softmax(-1) @ v).flatten(0, 1)).view(b, n, -1))


def cells(side: int, count: int) -> Tensor:
    """Which of `side` tokens each of `count` cells holds along one axis, in order, as evenly as can be.

    (count, most in a cell), -1 where a cell holds fewer.
    """
    edges = [i * side // count for i in range(count + 1)]
    most = max(end - start for start, end in pairwise(edges))
    return torch.tensor([[i if i < end else -1 for i in range(start, start + most)] for start, end in pairwise(edges)])


class Merged(nn.Module):
    """Positions, the merger and the transformer's blocks. (B, C, H, W) -> (B, C, *grid)."""

    def __init__(self, position: nn.Module, merger: nn.Module, blocks: nn.Module) -> None:
        super().__init__()
        self.position, self.merger, self.blocks = position, merger, blocks

    def forward(self, x: Tensor) -> Tensor:
        return self.blocks(self.merger(self.position(x).permute(0, 2, 3, 1))).permute(0, 3, 1, 2)


class ViTAR(Backbone):
    """Fan et al., "ViTAR: Vision Transformer with Any Resolution", arXiv:2403.18361.

    Sides are multiples of `patch` with at least `grid` patches.

    Args:
        grid: Tokens along a side that the blocks see, whatever the image's size; as many positions are learned.
    """

    def __init__(
        self,
        *,
        in_chans: int = 3,
        patch: int = 16,
        grid: int = 14,
        dim: int = 384,
        depth: int = 12,
        num_heads: int = 6,
        mlp_ratio: float = 4.0,
        drop_path_rate: float = 0.0,
        **kwargs: Any,
    ) -> None:
        hidden = int(mlp_ratio * dim)
        first, *rates = drop_path_rates(drop_path_rate, (1 + depth,))[0]
        blocks = (Block(dim, SelfAttention(dim, num_heads), Mlp(dim, hidden), rate, norm_layer) for rate in rates)
        merger = TokenMerger(dim, num_heads, (grid, grid), mlp_ratio, first)
        super().__init__(
            stem=nn.Sequential(nn.Conv2d(in_chans, dim, patch, stride=patch)),
            stages=[Merged(FuzzyPosition(dim, (grid, grid)), merger, nn.Sequential(*blocks))],
            dims=[dim],
            norm=LayerNorm2d(dim),
            reduction=patch,
            **kwargs,
        )
        self.least = patch * grid

    def check_size(self, x: Tensor) -> None:
        super().check_size(x)
        h, w = x.shape[-2:]
        if min(h, w) < self.least:
            raise SourceError(f"this ViTAR takes images of at least {self.least} × {self.least}, not {h} × {w}")


def _make(name: str, pretrained: bool, kwargs: dict[str, Any], **dims: Any) -> ViTAR:
    feature_cfg = {"out_indices": (0,), "feature_cls": "getter"}
    return build_model_with_cfg(ViTAR, name, pretrained, feature_cfg=feature_cfg, **(dims | kwargs))


@register_model
def vitar_small_patch16_224(pretrained: bool = False, **kwargs: Any) -> ViTAR:
    """ViTAR-S."""
    return _make("vitar_small_patch16_224", pretrained, kwargs)


@register_model
def vitar_base_patch16_224(pretrained: bool = False, **kwargs: Any) -> ViTAR:
    """ViTAR-B."""
    return _make("vitar_base_patch16_224", pretrained, kwargs, dim=768, num_heads=12)
