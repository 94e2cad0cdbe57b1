"""UniFormer, image models: local relation aggregation by convolutions in the shallow stages, attention in the deep."""

from __future__ import annotations

from functools import partial
from typing import Any

from timm.layers import ConvMlp, LayerNorm2d, Mlp
from timm.models import generate_default_cfgs, register_model
from torch import Tensor, nn

from martlet.models.backbone import Backbone, Block, SelfAttention, Stage, cfg, drop_path_rates, make
from martlet.models.papers.paper import Paper, Stated

__all__ = ["UniFormer"]

PAPER = Paper(
    title="UniFormer: Unifying Convolution and Self-attention for Visual Recognition",
    authors="Li et al.",
    year=2022,
    arxiv="2201.09450",
    code="https://github.com/Sense-X/UniFormer",
    license="Apache-2.0",
    models={
        "uniformer_small": Stated(params="22M", macs="3.6G", top1_pct=82.9),
        "uniformer_small_plus": Stated(params="24M", macs="4.2G", top1_pct=83.4),
        "uniformer_base": Stated(params="50M", macs="8.3G", top1_pct=83.8),
    },
)

default_cfgs = generate_default_cfgs({name: cfg() for name in PAPER.models})


class LocalMixer(nn.Sequential):
    """Local relation aggregation (eq. 5): a learned affinity of each token with the 5 × 5 around it."""

    def __init__(self, dim: int) -> None:
        super().__init__(nn.Conv2d(dim, dim, 1), nn.Conv2d(dim, dim, 5, padding=2, groups=dim), nn.Conv2d(dim, dim, 1))


class UniFormerBlock(nn.Module):
    """Dynamic position embedding, relation aggregation (local, or global by eq. 6: self-attention), MLP (eq. 1-3).

    (B, C, H, W) -> the same."""

    def __init__(self, dim: int, num_heads: int, mlp_ratio: float, drop_path: float, local: bool) -> None:
        super().__init__()
        self.local = local
        self.position = nn.Conv2d(dim, dim, 3, padding=1, groups=dim)
        hidden = int(mlp_ratio * dim)
        if local:
            mlp = ConvMlp(dim, hidden, act_layer=nn.GELU)
            self.block = Block(dim, LocalMixer(dim), mlp, drop_path, nn.BatchNorm2d)
        else:
            norm = partial(nn.LayerNorm, eps=1e-6)
            self.block = Block(dim, SelfAttention(dim, num_heads), Mlp(dim, hidden), drop_path, norm)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.position(x)
        return self.block(x) if self.local else self.block(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


def overlapping(in_chans: int, dim: int) -> list[nn.Module]:
    """A 3 × 3 convolution of stride 2 and its batch norm."""
    return [nn.Conv2d(in_chans, dim, 3, stride=2, padding=1), nn.BatchNorm2d(dim)]


class UniFormer(Backbone):
    """Li et al., "UniFormer", arXiv:2201.09450, sections 3 and 4. Sides are multiples of 32.

    Args:
        local: Stages from the first that aggregate locally.
        conv_stem: Overlapping convolutions in the place of patches.
    """

    def __init__(
        self,
        *,
        in_chans: int = 3,
        dims: tuple[int, ...] = (64, 128, 320, 512),
        depths: tuple[int, ...] = (3, 4, 8, 3),
        head_dim: int = 64,
        mlp_ratio: float = 4.0,
        local: int = 2,
        conv_stem: bool = False,
        drop_path_rate: float = 0.0,
        **kwargs: Any,
    ) -> None:
        def patches(before: int, c: int, size: int) -> nn.Sequential:
            return nn.Sequential(nn.Conv2d(before, c, size, stride=size), LayerNorm2d(c))

        first = dims[0]
        if conv_stem:
            stem = nn.Sequential(*overlapping(in_chans, first // 2), nn.GELU(), *overlapping(first // 2, first))
        else:
            stem = patches(in_chans, first, 4)
        stages = []
        for i, rates in enumerate(drop_path_rates(drop_path_rate, depths)):
            c, before = dims[i], dims[i - 1]
            merge = nn.Sequential(*overlapping(before, c)) if conv_stem else patches(before, c, 2)
            blocks = [UniFormerBlock(c, c // head_dim, mlp_ratio, rate, i < local) for rate in rates]
            stages.append(Stage(merge if i else nn.Identity(), blocks, channels_last=False))
        super().__init__(stem=stem, stages=stages, dims=dims, norm=nn.BatchNorm2d(dims[-1]), **kwargs)


@register_model
def uniformer_small(pretrained: bool = False, **kwargs: Any) -> UniFormer:
    """UniFormer-S."""
    return make(UniFormer, "uniformer_small", pretrained, kwargs, depths=(3, 4, 8, 3))


@register_model
def uniformer_small_plus(pretrained: bool = False, **kwargs: Any) -> UniFormer:
    """UniFormer-S†: overlapping patches, heads half as wide."""
    dims: dict[str, Any] = {"depths": (3, 5, 9, 3), "head_dim": 32, "conv_stem": True}
    return make(UniFormer, "uniformer_small_plus", pretrained, kwargs, **dims)


@register_model
def uniformer_base(pretrained: bool = False, **kwargs: Any) -> UniFormer:
    """UniFormer-B."""
    return make(UniFormer, "uniformer_base", pretrained, kwargs, depths=(5, 8, 20, 7))
