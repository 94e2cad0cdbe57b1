"""FcaFormer, hybrid models: attention that also sees tokens merged from the earlier blocks of its stage."""

from __future__ import annotations

from math import ceil
from typing import Any

import torch
from timm.layers import ConvNormAct, DropPath, LayerScale, Mlp
from timm.models import generate_default_cfgs, register_model
from timm.models.convnext import ConvNeXtBlock
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from martlet.models.backbone import Backbone, Stage, cfg, drop_path_rates, make, merge_heads, pair, split_heads
from martlet.models.papers.paper import Paper, Stated

__all__ = ["FcaFormer"]

PAPER = Paper(
    title="FcaFormer: Forward Cross Attention in Hybrid Vision Transformer",
    authors="Zhang et al.",
    year=2023,
    arxiv="2211.07198",
    code="https://github.com/hkzhang-git/FcaFormer",
    license="none",
    models={
        "fcaformer_l1": Stated(params="6.2M", macs="1.4G", top1_pct=80.3),
        "fcaformer_l2": Stated(params="16.3M", macs="3.6G", top1_pct=83.1),
    },
)

default_cfgs = generate_default_cfgs({name: cfg(first_conv="stem.0.conv") for name in PAPER.models})


def conv_norm(
    before: int, after: int, kernel: int = 1, stride: int = 1, groups: int = 1, act: bool = False
) -> nn.Module:
    """A convolution without bias, batch norm, and GELU if `act`."""
    return ConvNormAct(before, after, kernel, stride, groups=groups, apply_act=act, act_layer=nn.GELU)


class ForwardCrossBlock(nn.Module):
    """Attention over the tokens and the cross tokens of earlier blocks, then token merge and enhancement, then an MLP.

    Cross tokens are multiplied by learned scale factors, one each, and only answer (section 3.1). Tokens are merged by
    a depthwise 7 × 7 convolution of stride 4, and enhanced by one of 3 × 3 (section 3.2).

    Args:
        size: H and W of the stage.
        cross: How many cross tokens there are.
        merges: False in the last block, whose merged tokens nobody would read.
    """

    offsets: Tensor

    def __init__(
        self, dim: int, num_heads: int, size: tuple[int, int], cross: int, merges: bool, mlp_ratio: float, rate: float
    ) -> None:
        super().__init__()
        self.num_heads, self.size = num_heads, size
        self.norm1 = nn.LayerNorm(dim)
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)
        rows, columns = (place.flatten() for place in torch.meshgrid(*map(torch.arange, size), indexing="ij"))
        away = (rows[:, None] - rows).abs() * size[1] + (columns[:, None] - columns).abs()
        self.register_buffer("offsets", away, persistent=False)  # (N, N), |Δy| W + |Δx|
        self.position = nn.Parameter(torch.zeros(num_heads, size[0] * size[1]))
        if cross:
            self.cross_scale = nn.Parameter(torch.ones(1, cross, 1))
            self.cross_norm = nn.LayerNorm(dim)
            self.cross_bias = nn.Parameter(torch.zeros(num_heads, 1, cross))
        self.merge = nn.Conv2d(dim, dim, 7, stride=4, padding=3, groups=dim, bias=False) if merges else None
        self.enhance = conv_norm(dim, dim, 3, groups=dim)
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = nn.Sequential(
            nn.LayerNorm(dim), Mlp(dim, int(mlp_ratio * dim))
        )  # normalized twice, as the authors do
        self.scale1, self.scale2 = LayerScale(dim, 1e-6), LayerScale(dim, 1e-6)
        self.drop_path = DropPath(rate)

    def attend(self, x: Tensor, cross: Tensor | None) -> Tensor:
        """(B, N, C) and (B, S, C) -> (B, N, C)."""
        q, k, v = self.qkv(self.norm1(x)).chunk(3, -1)
        bias = self.position[:, self.offsets]  # (heads, N, N)
        if cross is not None:
            _, cross_k, cross_v = self.qkv(self.cross_norm(cross * self.cross_scale)).chunk(3, -1)
            k, v = torch.cat([k, cross_k], 1), torch.cat([v, cross_v], 1)
            bias = torch.cat([bias, self.cross_bias.expand(-1, bias.shape[1], -1)], -1)  # (heads, N, N + S)
        q, k, v = (split_heads(one, self.num_heads) for one in (q, k, v))
        return self.proj(merge_heads(scaled_dot_product_attention(q, k, v, attn_mask=bias.unsqueeze(0))))

    def forward(self, x: Tensor, cross: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """(B, N, C), and (B, S, C) or None -> the same, and the merged tokens (B, S', C) or None."""
        x = x + self.drop_path(self.scale1(self.attend(x, cross)))
        image = x.transpose(1, 2).unflatten(2, self.size)
        merged = None if self.merge is None else self.merge(image).flatten(2).transpose(1, 2)
        x = self.enhance(image).flatten(2).transpose(1, 2)
        return x + self.drop_path(self.scale2(self.mlp(self.norm2(x)))), merged


class ForwardCrossStage(nn.Module):
    """Downsampling, then blocks that read what the earlier ones merged: (B, C, H, W) -> (B, C', H', W')."""

    def __init__(
        self,
        downsample: nn.Module,
        dim: int,
        num_heads: int,
        size: tuple[int, int],
        mlp_ratio: float,
        rates: list[float],
        memory: int,
    ) -> None:
        super().__init__()
        self.downsample, self.size, self.memory = downsample, size, memory
        merged = ceil(size[0] / 4) * ceil(size[1] / 4)
        self.blocks = nn.ModuleList(
            ForwardCrossBlock(dim, num_heads, size, min(i, memory) * merged, i < len(rates) - 1, mlp_ratio, rate)
            for i, rate in enumerate(rates)
        )

    def forward(self, x: Tensor) -> Tensor:
        x, kept = self.downsample(x).flatten(2).transpose(1, 2), []
        for block in self.blocks:
            x, merged = block(x, torch.cat(kept[-self.memory :], 1) if kept else None)
            kept.append(merged)
        return x.transpose(1, 2).unflatten(2, self.size)


class FcaFormer(Backbone):
    """Zhang et al., "FcaFormer", arXiv:2211.07198, section 3.

    Args:
        num_heads: 0 for a stage of ConvNeXt blocks.
        memory: Of how many blocks before it a block sees the merged tokens.
    """

    def __init__(
        self,
        *,
        in_chans: int = 3,
        img_size: int | tuple[int, int] = 224,
        dims: tuple[int, ...] = (64, 128, 192, 320),
        depths: tuple[int, ...] = (2, 2, 6, 2),
        num_heads: tuple[int, ...] = (0, 0, 6, 10),
        mlp_ratio: float = 4.0,
        memory: int = 12,
        drop_path_rate: float = 0.0,
        **kwargs: Any,
    ) -> None:
        h, w = pair(img_size)
        first = dims[0]
        stem = nn.Sequential(conv_norm(in_chans, first // 2, 3, 2, act=True), conv_norm(first // 2, first, 3, 2))
        stages = []
        for i, rates in enumerate(drop_path_rates(drop_path_rate, depths)):
            c, size = dims[i], (h // (4 * 2**i), w // (4 * 2**i))
            parts = conv_norm(dims[i - 1], c, act=True), conv_norm(c, c, 3, 2, groups=c, act=True), conv_norm(c, c)
            downsample = nn.Sequential(*parts) if i else nn.Identity()
            if num_heads[i]:
                stages.append(ForwardCrossStage(downsample, c, num_heads[i], size, mlp_ratio, rates, memory))
            else:
                blocks = [ConvNeXtBlock(c, ls_init_value=1e-6, drop_path=rate) for rate in rates]
                stages.append(Stage(downsample, blocks, channels_last=False))
        super().__init__(stem=stem, stages=stages, dims=dims, norm=None, img_size=img_size, **kwargs)


@register_model
def fcaformer_l1(pretrained: bool = False, **kwargs: Any) -> FcaFormer:
    """FcaFormer-L1."""
    return make(FcaFormer, "fcaformer_l1", pretrained, kwargs, depths=(2, 2, 6, 2))


@register_model
def fcaformer_l2(pretrained: bool = False, **kwargs: Any) -> FcaFormer:
    """FcaFormer-L2."""
    dims: dict[str, Any] = {"dims": (96, 192, 320, 480), "depths": (2, 2, 7, 2), "num_heads": (0, 0, 10, 15)}
    return make(FcaFormer, "fcaformer_l2", pretrained, kwargs, **dims)
