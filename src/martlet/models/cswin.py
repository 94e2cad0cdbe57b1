"""CSWin Transformer: attention in horizontal and vertical stripes, half of the heads each."""

from __future__ import annotations

from math import lcm
from typing import Any

import torch
from timm.layers import LayerNorm2d, Mlp
from timm.models import generate_default_cfgs, register_model
from timm.models.swin_transformer import window_partition, window_reverse
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from martlet.models.backbone import Backbone, Block, Stage, cfg, drop_path_rates, make, merge_heads, split_heads
from martlet.models.papers.paper import Paper, Stated

__all__ = ["CSWin"]

LARGE = {
    "macs": "33.1 G, and 101.9 G at 384, with the 32 blocks of the third stage that the paper's table and its 173M "
    "parameters say; 30 blocks give 31.5 G, 96.9 G and 165 M, so the paper's MACs seem to be of a shallower model"
}

PAPER = Paper(
    title="CSWin Transformer: A General Vision Transformer Backbone with Cross-Shaped Windows",
    authors="Dong et al.",
    year=2022,
    arxiv="2107.00652",
    code="https://github.com/microsoft/CSWin-Transformer",
    license="MIT",
    models={
        "cswin_tiny": Stated(
            params="23M",
            macs="4.3G",
            top1_pct=82.7,
            differs={"params": "22.3 M, as the authors' code has too: the paper seems to round up"},
        ),
        "cswin_small": Stated(params="35M", macs="6.9G", top1_pct=83.6),
        "cswin_base": Stated(params="78M", macs="15.0G", top1_pct=84.2),
        "cswin_large": Stated(params="173M", macs="31.5G", differs=LARGE),
        "cswin_base_384": Stated(params="78M", macs="47.0G", top1_pct=85.4),
        "cswin_large_384": Stated(params="173M", macs="96.8G", differs=LARGE),
    },
)

default_cfgs = generate_default_cfgs(
    {name: cfg() for name in PAPER.models if not name.endswith("384")}
    | {name: cfg(input_size=(3, 384, 384), crop_pct=1.0) for name in PAPER.models if name.endswith("384")}
)


class CrossShapedAttention(nn.Module):
    """Self-attention in stripes (eq. 2-5), with locally-enhanced positional encoding (eq. 7). (B, H, W, C) -> the same.

    Half of the heads see vertical stripes as wide as `stripe`, the others horizontal ones as high; None makes the whole
    image one window of all heads. The encoding is a depthwise 3 × 3 convolution of the values inside each stripe.
    """

    def __init__(self, dim: int, num_heads: int, stripe: int | None) -> None:
        super().__init__()
        self.stripe = stripe
        self.branches = 1 if stripe is None else 2
        self.num_heads = num_heads // self.branches
        self.qkv = nn.Linear(dim, 3 * dim)
        part = dim // self.branches
        self.lepe = nn.ModuleList(nn.Conv2d(part, part, 3, padding=1, groups=part) for _ in range(self.branches))
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        h, w = x.shape[1:3]
        windows = [(h, w)] if self.stripe is None else [(h, self.stripe), (self.stripe, w)]
        parts = [one.chunk(self.branches, -1) for one in self.qkv(x).chunk(3, -1)]  # q, k, v of each branch
        seen = [self._attend(i, windows[i], *(one[i] for one in parts)) for i in range(self.branches)]
        return self.proj(torch.cat(seen, -1))

    def _attend(self, branch: int, window: tuple[int, int], q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        h, w = q.shape[1:3]
        q, k, v = (window_partition(one, window) for one in (q, k, v))  # (B stripes, h, w, C)
        local = self.lepe[branch](v.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        q, k, v = (split_heads(one.flatten(1, 2), self.num_heads) for one in (q, k, v))
        seen = merge_heads(scaled_dot_product_attention(q, k, v))  # (B stripes, h w, C)
        return window_reverse(seen.unflatten(1, window) + local, window, h, w)


class CSWin(Backbone):
    """Dong et al., "CSWin Transformer", arXiv:2107.00652, section 3.

    Sides are multiples of what the stripes divide: 224 with the paper's stripes of 1, 2 and 7, 192 with 1, 2 and 12.

    Args:
        dim: Channels of the first stage, doubled by each of the others.
        stripes: Widths in all stages but the last, whose window is the whole image.
    """

    def __init__(
        self,
        *,
        in_chans: int = 3,
        dim: int = 64,
        depths: tuple[int, ...] = (1, 2, 21, 1),
        num_heads: tuple[int, ...] = (2, 4, 8, 16),
        stripes: tuple[int, ...] = (1, 2, 7),
        mlp_ratio: float = 4.0,
        drop_path_rate: float = 0.0,
        **kwargs: Any,
    ) -> None:
        dims = [dim * 2**i for i in range(len(depths))]
        stem = nn.Sequential(nn.Conv2d(in_chans, dim, 7, stride=4, padding=2), LayerNorm2d(dim))
        stages, rates = [], drop_path_rates(drop_path_rate, depths)
        for i, (c, heads, stripe) in enumerate(zip(dims, num_heads, (*stripes, None), strict=True)):
            merge = nn.Sequential(nn.Conv2d(c // 2, c, 3, stride=2, padding=1), LayerNorm2d(c)) if i else nn.Identity()
            blocks = [
                Block(c, CrossShapedAttention(c, heads, stripe), Mlp(c, int(mlp_ratio * c)), rate) for rate in rates[i]
            ]
            stages.append(Stage(merge, blocks))
        divisor = lcm(4 * 2 ** len(stripes), *(4 * 2**i * stripe for i, stripe in enumerate(stripes)))
        super().__init__(stem=stem, stages=stages, dims=dims, norm=LayerNorm2d(dims[-1]), divisor=divisor, **kwargs)


@register_model
def cswin_tiny(pretrained: bool = False, **kwargs: Any) -> CSWin:
    """CSWin-T."""
    return make(CSWin, "cswin_tiny", pretrained, kwargs, depths=(1, 2, 21, 1))


@register_model
def cswin_small(pretrained: bool = False, **kwargs: Any) -> CSWin:
    """CSWin-S."""
    return make(CSWin, "cswin_small", pretrained, kwargs, depths=(2, 4, 32, 2))


@register_model
def cswin_base(pretrained: bool = False, **kwargs: Any) -> CSWin:
    """CSWin-B."""
    return make(CSWin, "cswin_base", pretrained, kwargs, dim=96, depths=(2, 4, 32, 2), num_heads=(4, 8, 16, 32))


@register_model
def cswin_large(pretrained: bool = False, **kwargs: Any) -> CSWin:
    """CSWin-L."""
    return make(CSWin, "cswin_large", pretrained, kwargs, dim=144, depths=(2, 4, 32, 2), num_heads=(6, 12, 24, 24))


@register_model
def cswin_base_384(pretrained: bool = False, **kwargs: Any) -> CSWin:
    """CSWin-B for images of 384 × 384, with wider stripes."""
    dims: dict[str, Any] = {"dim": 96, "depths": (2, 4, 32, 2), "num_heads": (4, 8, 16, 32), "stripes": (1, 2, 12)}
    return make(CSWin, "cswin_base_384", pretrained, kwargs, **dims)


@register_model
def cswin_large_384(pretrained: bool = False, **kwargs: Any) -> CSWin:
    """CSWin-L for images of 384 × 384, with wider stripes."""
    dims: dict[str, Any] = {"dim": 144, "depths": (2, 4, 32, 2), "num_heads": (6, 12, 24, 24), "stripes": (1, 2, 12)}
    return make(CSWin, "cswin_large_384", pretrained, kwargs, **dims)
