"""LITv2: HiLo attention, which gives some heads small windows and the others averaged keys and values."""

from __future__ import annotations

from typing import Any

import torch
from timm.layers import DropPath, LayerNorm2d
from timm.models import generate_default_cfgs, register_model
from timm.models.swin_transformer import window_partition, window_reverse
from torch import Tensor, nn
from torch.nn.functional import avg_pool2d, gelu, grid_sample, pixel_shuffle, scaled_dot_product_attention

from martlet.models.backbone import (
    Backbone,
    Block,
    DepthwiseMlp,
    Stage,
    cfg,
    drop_path_rates,
    make,
    merge_heads,
    split_heads,
)
from martlet.models.papers.paper import Paper, Stated

__all__ = ["LITv2"]

PAPER = Paper(
    title="Fast Vision Transformers with HiLo Attention",
    authors="Pan et al.",
    year=2022,
    arxiv="2205.13213",
    code="https://github.com/ziplab/LITv2",
    license="Apache-2.0",
    models={
        "litv2_small": Stated(params="28M", macs="3.7G", top1_pct=82.0),
        "litv2_medium": Stated(params="49M", macs="7.5G", top1_pct=83.3),
        "litv2_base": Stated(params="87M", macs="13.2G", top1_pct=83.6),
        "litv2_base_384": Stated(params="87M", macs="39.7G", top1_pct=84.7),
    },
)

default_cfgs = generate_default_cfgs(
    {name: cfg(input_size=(3, 384, 384), crop_pct=1.0) if name.endswith("384") else cfg() for name in PAPER.models}
)


class HiLo(nn.Module):
    """Self-attention split by frequency (section 3.2). (B, H, W, C) -> the same.

    The part `alpha` of the heads, Lo-Fi, attends to means of `window` × `window` tokens; the others, Hi-Fi, attend
    inside such windows. Every token asks in both. A window of 1 is plain attention.
    """

    def __init__(self, dim: int, num_heads: int, window: int, alpha: float) -> None:
        super().__init__()
        self.window = window
        self.low_heads = num_heads if window == 1 else int(num_heads * alpha)
        self.high_heads = num_heads - self.low_heads
        low = dim // num_heads * self.low_heads
        high = dim - low
        if low:
            self.low_q = nn.Linear(dim, low)
            self.low_kv = nn.Linear(dim, 2 * low)
            self.low_proj = nn.Linear(low, low)
        if high:
            self.high_qkv = nn.Linear(dim, 3 * high)
            self.high_proj = nn.Linear(high, high)

    def forward(self, x: Tensor) -> Tensor:
        parts = [self.high(x)] if self.high_heads else []
        return torch.cat([*parts, self.low(x)] if self.low_heads else parts, -1)

    def high(self, x: Tensor) -> Tensor:
        """(B, H, W, C) -> (B, H, W, what Hi-Fi heads have)."""
        size = (self.window, self.window)
        inside = window_partition(x, size).flatten(1, 2)  # (B windows, w w, C)
        q, k, v = (split_heads(one, self.high_heads) for one in self.high_qkv(inside).chunk(3, -1))
        seen = self.high_proj(merge_heads(scaled_dot_product_attention(q, k, v)))
        return window_reverse(seen.unflatten(1, size), size, *x.shape[1:3])

    def low(self, x: Tensor) -> Tensor:
        """(B, H, W, C) -> (B, H, W, what Lo-Fi heads have)."""
        mean = x if self.window == 1 else avg_pool2d(x.permute(0, 3, 1, 2), self.window).permute(0, 2, 3, 1)
        q = split_heads(self.low_q(x.flatten(1, 2)), self.low_heads)
        k, v = (split_heads(one, self.low_heads) for one in self.low_kv(mean.flatten(1, 2)).chunk(2, -1))
        return self.low_proj(merge_heads(scaled_dot_product_attention(q, k, v))).unflatten(1, x.shape[1:3])


class ConvMlpBlock(nn.Module):
    """x + mlp(norm(x)): what the stages without attention are made of."""

    def __init__(self, dim: int, mlp: nn.Module, drop_path: float) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(dim)
        self.mlp = mlp
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.drop_path(self.mlp(self.norm(x)))


class DeformableMerging(nn.Module):
    """A 2 × 2 convolution of stride 2 whose four samples lie where learned offsets say; batch norm, GELU.

    (B, C, H, W) -> (B, C', H / 2, W / 2). Written as bilinear sampling and a plain convolution, which engines have. It
    samples zero outside the image.
    """

    def __init__(self, dim: int, out: int) -> None:
        super().__init__()
        self.offset = nn.Conv2d(dim, 8, 2, stride=2)  # (dy, dx) of the samples 00, 01, 10, 11
        self.conv = nn.Conv2d(dim, out, 2, stride=2)
        self.norm = nn.BatchNorm2d(out)
        nn.init.zeros_(self.offset.weight)
        nn.init.zeros_(self.offset.bias)  # type: ignore[arg-type]

    def forward(self, x: Tensor) -> Tensor:
        h, w = x.shape[-2:]
        dy, dx = pixel_shuffle(self.offset(x).unflatten(1, (4, 2)).transpose(1, 2).flatten(1, 2), 2).unbind(1)
        rows = torch.arange(h, dtype=x.dtype, device=x.device)[:, None]
        columns = torch.arange(w, dtype=x.dtype, device=x.device)
        grid = torch.stack([(dx + columns) * (2 / (w - 1)) - 1, (dy + rows) * (2 / (h - 1)) - 1], -1)  # (B, H, W, 2)
        return gelu(self.norm(self.conv(grid_sample(x, grid, align_corners=True))))


class LITv2(Backbone):
    """Pan et al., "Fast Vision Transformers with HiLo Attention", arXiv:2205.13213, section 4. Sides: multiples of 32.

    Args:
        dim: Channels of the first stage, doubled by each of the others.
        windows: HiLo's, for each stage; 0 for no attention, 1 for plain attention.
        alpha: Part of the heads that are Lo-Fi.
    """

    def __init__(
        self,
        *,
        in_chans: int = 3,
        dim: int = 96,
        depths: tuple[int, ...] = (2, 2, 6, 2),
        num_heads: tuple[int, ...] = (3, 6, 12, 24),
        windows: tuple[int, ...] = (0, 0, 2, 1),
        alpha: float = 0.9,
        mlp_ratio: float = 4.0,
        drop_path_rate: float = 0.0,
        **kwargs: Any,
    ) -> None:
        dims = [dim * 2**i for i in range(len(depths))]
        stem = nn.Sequential(nn.Conv2d(in_chans, dim, 4, stride=4), LayerNorm2d(dim))
        stages = []
        for i, (c, rates) in enumerate(zip(dims, drop_path_rates(drop_path_rate, depths), strict=True)):
            blocks: list[nn.Module] = []
            for rate in rates:
                mlp = DepthwiseMlp(c, int(mlp_ratio * c))
                if windows[i]:
                    blocks.append(Block(c, HiLo(c, num_heads[i], windows[i], alpha), mlp, rate))
                else:
                    blocks.append(ConvMlpBlock(c, mlp, rate))
            stages.append(Stage(DeformableMerging(c // 2, c) if i else nn.Identity(), blocks))
        divisor = max(4 * 2**i * max(window, 1) for i, window in enumerate(windows))
        super().__init__(stem=stem, stages=stages, dims=dims, norm=LayerNorm2d(dims[-1]), divisor=divisor, **kwargs)


@register_model
def litv2_small(pretrained: bool = False, **kwargs: Any) -> LITv2:
    """LITv2-S."""
    return make(LITv2, "litv2_small", pretrained, kwargs, depths=(2, 2, 6, 2))


@register_model
def litv2_medium(pretrained: bool = False, **kwargs: Any) -> LITv2:
    """LITv2-M."""
    return make(LITv2, "litv2_medium", pretrained, kwargs, depths=(2, 2, 18, 2))


@register_model
def litv2_base(pretrained: bool = False, **kwargs: Any) -> LITv2:
    """LITv2-B."""
    return make(LITv2, "litv2_base", pretrained, kwargs, dim=128, depths=(2, 2, 18, 2), num_heads=(4, 8, 16, 32))


@register_model
def litv2_base_384(pretrained: bool = False, **kwargs: Any) -> LITv2:
    """LITv2-B for images of 384 × 384."""
    return make(LITv2, "litv2_base_384", pretrained, kwargs, dim=128, depths=(2, 2, 18, 2), num_heads=(4, 8, 16, 32))
