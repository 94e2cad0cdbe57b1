"""ShiftViT: a third of the channels moved by one pixel, in the place of attention."""

from __future__ import annotations

from typing import Any

import torch
from timm.layers import ConvMlp, DropPath, GroupNorm1
from timm.models import generate_default_cfgs, register_model
from torch import Tensor, nn
from torch.nn.functional import pad

from martlet.models.backbone import Backbone, Stage, cfg, drop_path_rates, make
from martlet.models.papers.paper import Paper, Stated

__all__ = ["ShiftViT"]

PAPER = Paper(
    title="When Shift Operation Meets Vision Transformer: An Extremely Simple Alternative to Attention Mechanism",
    authors="Wang et al.",
    year=2022,
    arxiv="2201.10801",
    code="https://github.com/microsoft/SPACH",
    license="MIT",
    models={
        "shiftvit_tiny_light": Stated(params="20M", macs="3.0G", top1_pct=79.4),
        "shiftvit_small_light": Stated(params="34M", macs="5.7G", top1_pct=81.6),
        "shiftvit_base_light": Stated(params="60M", macs="10.2G"),
        "shiftvit_tiny": Stated(params="29M", macs="4.5G", top1_pct=81.7),
        "shiftvit_small": Stated(params="50M", macs="8.8G", top1_pct=82.8),
        "shiftvit_base": Stated(params="89M", macs="15.6G"),
    },
)

default_cfgs = generate_default_cfgs({name: cfg() for name in PAPER.models})


def shift(x: Tensor, parts: int) -> Tensor:
    """Moves four groups of C / parts channels by a pixel, left, right, up and down; the others stay (section 3.1).

    What leaves the image is lost, zeros come in. (B, C, H, W) -> the same; no parameter, no MAC.
    """
    g = x.shape[1] // parts
    left, right, up, down, rest = x.split([g, g, g, g, x.shape[1] - 4 * g], 1)
    return torch.cat(
        [
            pad(left[..., 1:], (0, 1)),
            pad(right[..., :-1], (1, 0)),
            pad(up[..., 1:, :], (0, 0, 0, 1)),
            pad(down[..., :-1, :], (0, 0, 1, 0)),
            rest,
        ],
        1,
    )


class ShiftBlock(nn.Module):
    """The shift, then x + mlp(norm(x)). (B, C, H, W) -> the same."""

    def __init__(self, dim: int, mlp_ratio: float, parts: int, drop_path: float) -> None:
        super().__init__()
        self.parts = parts
        self.norm = GroupNorm1(dim)
        self.mlp = ConvMlp(dim, int(mlp_ratio * dim), act_layer=nn.GELU)
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor) -> Tensor:
        x = shift(x, self.parts)
        return x + self.drop_path(self.mlp(self.norm(x)))


class ShiftViT(Backbone):
    """Wang et al., "When Shift Operation Meets Vision Transformer", arXiv:2201.10801, section 3.

    Sides are multiples of 32.

    Args:
        dim: Channels of the first stage, doubled by each of the others.
        parts: Into which the channels are divided; four of them move.
    """

    def __init__(
        self,
        *,
        in_chans: int = 3,
        dim: int = 96,
        depths: tuple[int, ...] = (6, 8, 18, 6),
        mlp_ratio: float = 2.0,
        parts: int = 12,
        drop_path_rate: float = 0.0,
        **kwargs: Any,
    ) -> None:
        dims = [dim * 2**i for i in range(len(depths))]
        stem = nn.Sequential(nn.Conv2d(in_chans, dim, 4, stride=4), GroupNorm1(dim))
        stages = []
        for i, (c, rates) in enumerate(zip(dims, drop_path_rates(drop_path_rate, depths), strict=True)):
            merge = nn.Conv2d(c // 2, c, 2, stride=2, bias=False)
            blocks = [ShiftBlock(c, mlp_ratio, parts, rate) for rate in rates]
            downsample = nn.Sequential(GroupNorm1(c // 2), merge) if i else nn.Identity()
            stages.append(Stage(downsample, blocks, channels_last=False))
        super().__init__(stem=stem, stages=stages, dims=dims, norm=GroupNorm1(dims[-1]), **kwargs)


@register_model
def shiftvit_tiny_light(pretrained: bool = False, **kwargs: Any) -> ShiftViT:
    """Shift-T/light: Swin-T with shifts in the place of attention."""
    return make(ShiftViT, "shiftvit_tiny_light", pretrained, kwargs, depths=(2, 2, 6, 2), mlp_ratio=4.0)


@register_model
def shiftvit_small_light(pretrained: bool = False, **kwargs: Any) -> ShiftViT:
    """Shift-S/light: Swin-S with shifts in the place of attention."""
    return make(ShiftViT, "shiftvit_small_light", pretrained, kwargs, depths=(2, 2, 18, 2), mlp_ratio=4.0)


@register_model
def shiftvit_base_light(pretrained: bool = False, **kwargs: Any) -> ShiftViT:
    """Shift-B/light: Swin-B with shifts in the place of attention."""
    return make(ShiftViT, "shiftvit_base_light", pretrained, kwargs, dim=128, depths=(2, 2, 18, 2), mlp_ratio=4.0)


@register_model
def shiftvit_tiny(pretrained: bool = False, **kwargs: Any) -> ShiftViT:
    """Shift-T: as deep as the MACs of Swin-T allow."""
    return make(ShiftViT, "shiftvit_tiny", pretrained, kwargs, depths=(6, 8, 18, 6))


@register_model
def shiftvit_small(pretrained: bool = False, **kwargs: Any) -> ShiftViT:
    """Shift-S: as deep as the MACs of Swin-S allow."""
    return make(ShiftViT, "shiftvit_small", pretrained, kwargs, depths=(10, 18, 36, 10))


@register_model
def shiftvit_base(pretrained: bool = False, **kwargs: Any) -> ShiftViT:
    """Shift-B: as deep as the MACs of Swin-B allow."""
    return make(ShiftViT, "shiftvit_base", pretrained, kwargs, dim=128, depths=(10, 18, 36, 10))
