"""CvT: queries, keys and values by depthwise convolutions, in the place of position embeddings."""

from __future__ import annotations

from typing import Any

import torch
from timm.layers import DropPath, LayerNorm2d, Mlp, QuickGELU
from timm.models import generate_default_cfgs, register_model
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from martlet.models.backbone import Backbone, cfg, drop_path_rates, make, merge_heads, split_heads
from martlet.models.papers.paper import Paper, Stated

__all__ = ["CvT"]

PAPER = Paper(
    title="CvT: Introducing Convolutions to Vision Transformers",
    authors="Wu et al.",
    year=2021,
    arxiv="2103.15808",
    code="https://github.com/microsoft/CvT",
    license="MIT",
    models={
        "cvt_13": Stated(params="20M", macs="4.5G", top1_pct=81.6),
        "cvt_21": Stated(params="32M", macs="7.1G", top1_pct=82.5),
        "cvt_13_384": Stated(params="20M", macs="16.3G", top1_pct=83.0),
        "cvt_21_384": Stated(params="32M", macs="24.9G", top1_pct=83.3),
        "cvt_w24_384": Stated(params="277M", macs="193.2G"),
    },
)

default_cfgs = generate_default_cfgs(
    {name: cfg(input_size=(3, 384, 384), crop_pct=1.0) if name.endswith("384") else cfg() for name in PAPER.models}
)


class ConvProjection(nn.Module):
    """A depthwise 3 × 3 convolution with batch norm, then a Linear (eq. 2). A class token passes the Linear only."""

    def __init__(self, dim: int, stride: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(dim, dim, 3, stride=stride, padding=1, groups=dim, bias=False)
        self.norm = nn.BatchNorm2d(dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, token: Tensor | None, image: Tensor) -> Tensor:
        x = self.norm(self.conv(image)).flatten(2).transpose(1, 2)  # (B, N, C)
        return self.proj(x if token is None else torch.cat([token, x], 1))


class CvTBlock(nn.Module):
    """Attention whose keys and values are a quarter as many as its queries, and an MLP. (B, T, C) -> the same.

    Scores are divided by the root of all channels, not of those of a head, as the authors do.
    """

    def __init__(self, dim: int, num_heads: int, mlp_ratio: float, drop_path: float) -> None:
        super().__init__()
        self.num_heads, self.scale = num_heads, dim**-0.5
        self.norm1 = nn.LayerNorm(dim)
        self.q, self.k, self.v = ConvProjection(dim, 1), ConvProjection(dim, 2), ConvProjection(dim, 2)
        self.proj = nn.Linear(dim, dim)
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = Mlp(dim, int(mlp_ratio * dim), act_layer=QuickGELU)
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor, size: tuple[int, int]) -> Tensor:
        tokens = size[0] * size[1]
        normal = self.norm1(x)
        token = None if x.shape[1] == tokens else normal[:, :1]
        image = normal[:, -tokens:].transpose(1, 2).unflatten(2, size)  # (B, C, H, W)
        q, k, v = (split_heads(part(token, image), self.num_heads) for part in (self.q, self.k, self.v))
        x = x + self.drop_path(self.proj(merge_heads(scaled_dot_product_attention(q, k, v, scale=self.scale))))
        return x + self.drop_path(self.mlp(self.norm2(x)))


class CvTStage(nn.Module):
    """Convolutional token embedding, then blocks: (B, C, H, W) -> (B, C', H', W').

    class_token: one is put before the tokens; only `tokens` gives it.
    """

    def __init__(self, embed: nn.Module, blocks: list[CvTBlock], dim: int, class_token: bool) -> None:
        super().__init__()
        self.embed = embed
        self.blocks = nn.ModuleList(blocks)
        self.class_token = nn.Parameter(0.02 * torch.randn(1, 1, dim)) if class_token else None

    def tokens(self, x: Tensor) -> tuple[Tensor, tuple[int, int]]:
        """((B, T, C'), (H', W')), the class token first."""
        x = self.embed(x)
        size = (x.shape[2], x.shape[3])
        x = x.flatten(2).transpose(1, 2)
        if self.class_token is not None:
            x = torch.cat([self.class_token.expand(x.shape[0], -1, -1), x], 1)
        for block in self.blocks:
            x = block(x, size)
        return x, size

    def forward(self, x: Tensor) -> Tensor:
        x, size = self.tokens(x)
        return x[:, -size[0] * size[1] :].transpose(1, 2).unflatten(2, size)


class CvT(Backbone):
    """Wu et al., "CvT", arXiv:2103.15808, section 3. Images of any size: there is no position embedding.

    `forward_features` gives tokens (B, 1 + N, C), the class token first.
    """

    def __init__(
        self,
        *,
        in_chans: int = 3,
        dims: tuple[int, ...] = (64, 192, 384),
        depths: tuple[int, ...] = (1, 2, 10),
        num_heads: tuple[int, ...] = (1, 3, 6),
        mlp_ratio: float = 4.0,
        drop_path_rate: float = 0.0,
        **kwargs: Any,
    ) -> None:
        stages = []
        for i, rates in enumerate(drop_path_rates(drop_path_rate, depths)):
            c, last = dims[i], i == len(dims) - 1
            conv = nn.Conv2d(dims[i - 1], c, 3, 2, 1) if i else nn.Conv2d(in_chans, c, 7, 4, 2)
            blocks = [CvTBlock(c, num_heads[i], mlp_ratio, rate) for rate in rates]
            stages.append(CvTStage(nn.Sequential(conv, LayerNorm2d(c)), blocks, c, last))
        norm = nn.LayerNorm(dims[-1])
        super().__init__(stem=nn.Identity(), stages=stages, dims=dims, norm=norm, divisor=1, global_pool="", **kwargs)

    def forward_features(self, x: Tensor) -> Tensor:
        """Images (B, 3, H, W) -> (B, 1 + N, C), normalized."""
        x, last = self.stages[:-1](x), self.stages[-1]
        assert isinstance(last, CvTStage)
        return self.norm(last.tokens(x)[0])

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """The class token's logits (B, K), or itself (B, C)."""
        return self.head(x[:, 0], pre_logits=pre_logits)

    def normalize(self, x: Tensor) -> Tensor:
        return self.norm(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


@register_model
def cvt_13(pretrained: bool = False, **kwargs: Any) -> CvT:
    """CvT-13."""
    return make(CvT, "cvt_13", pretrained, kwargs, depths=(1, 2, 10))


@register_model
def cvt_21(pretrained: bool = False, **kwargs: Any) -> CvT:
    """CvT-21."""
    return make(CvT, "cvt_21", pretrained, kwargs, depths=(1, 4, 16))


@register_model
def cvt_13_384(pretrained: bool = False, **kwargs: Any) -> CvT:
    """CvT-13 for images of 384 × 384."""
    return make(CvT, "cvt_13_384", pretrained, kwargs, depths=(1, 2, 10))


@register_model
def cvt_21_384(pretrained: bool = False, **kwargs: Any) -> CvT:
    """CvT-21 for images of 384 × 384."""
    return make(CvT, "cvt_21_384", pretrained, kwargs, depths=(1, 4, 16))


@register_model
def cvt_w24_384(pretrained: bool = False, **kwargs: Any) -> CvT:
    """CvT-W24 for images of 384 × 384."""
    dims: dict[str, Any] = {"dims": (192, 768, 1024), "depths": (2, 2, 20), "num_heads": (3, 12, 16)}
    return make(CvT, "cvt_w24_384", pretrained, kwargs, **dims)
