"""Hyena N-D: a long implicit filter over both axes of the image, and gates, in the place of attention."""

from __future__ import annotations

from functools import partial
from math import log, pi
from typing import Any

import torch
from timm.layers import LayerNorm2d, Mlp, trunc_normal_
from timm.models import generate_default_cfgs, register_model
from timm.models.swin_transformer import PatchMerging
from torch import Tensor, nn

from martlet.models.backbone import Backbone, Block, SelfAttention, Stage, cfg, drop_path_rates, make, pair
from martlet.models.papers.paper import Paper, Stated
from martlet.models.spectformer import Fourier

__all__ = ["HyenaND"]

PAPER = Paper(
    title="Multi-Dimensional Hyena for Spatial Inductive Bias",
    authors="Zimerman and Wolf",
    year=2024,
    arxiv="2309.13600",
    code="https://github.com/Itamarzimm/HyenaND",
    license="Apache-2.0",
    models={
        "hyena_deit_tiny_patch16_224": Stated(params=None, macs=None),
        "hyena_deit_tiny_hybrid_patch16_224": Stated(params=None, macs=None),
        "hyena_deit_small_patch16_224": Stated(params=None, macs=None),
        "hyena_swin_tiny_patch4_224": Stated(params=None, macs=None),
    },
    differs="The mean of all tokens is classified, the authors' code takes the first. The places that filters are "
    "computed from aren't learned, and filters aren't divided by their length. In Swin a whole stage is filtered, "
    "without windows. Fourier transforms are products with real matrices, which every engine has.",
)

default_cfgs = generate_default_cfgs({name: cfg(first_conv="stem.0") for name in PAPER.models})

norm_layer = partial(nn.LayerNorm, eps=1e-6)

WIDTH = 64
"""Of the network that gives the filter."""


class Sine(nn.Module):
    """sin(frequency ∘ x), frequencies learned. (…, C) -> the same."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.frequency = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        return (self.frequency * x).sin()


class ImplicitFilter(nn.Module):
    """A network's value at each place, in a window that decays along both axes. -> (C, H, W).

    A place is (t, cos 2πt, sin 2πt) along H and along W, t from 0 to 1; the window exp(-d (t_H + t_W)) falls to 0.01 at
    t = 1.5 in the first channel, at 0.3 in the last.
    """

    places: Tensor
    window: Tensor

    def __init__(self, dim: int, size: tuple[int, int]) -> None:
        super().__init__()
        sine = Sine(WIDTH)  # one for all layers
        hidden = [layer for _ in range(2) for layer in (nn.Linear(WIDTH, WIDTH), sine)]
        self.layers = nn.Sequential(nn.Linear(6, WIDTH), sine, *hidden, nn.Linear(WIDTH, dim, bias=False))
        lines = [torch.linspace(0, 1, side) for side in size]
        grid = torch.stack(torch.meshgrid(*lines, indexing="ij"), -1)  # (H, W, 2)
        places = torch.stack([grid, (2 * pi * grid).cos(), (2 * pi * grid).sin()], -1).flatten(-2)
        decay = torch.linspace(log(100) / 1.5, log(100) / 0.3, dim)
        self.register_buffer("places", places, persistent=False)  # (H, W, 6)
        self.register_buffer("window", (-grid.sum(-1) * decay[:, None, None]).exp(), persistent=False)

    def forward(self) -> Tensor:
        return self.layers(self.places).permute(2, 0, 1) * self.window


class HyenaOperator(Fourier):
    """out(a ∘ (k * (b ∘ v) + d ∘ b ∘ v)), Hyena of order 2 over both axes. (B, H, W, C) -> the same.

    a, b and v are a projection of x after a depthwise 3 × 3 convolution; k an implicit filter as large as the image,
    d learned. The long convolution sees what is above and left of a place; `backward`: what is below and right.
    """

    def __init__(self, dim: int, size: tuple[int, int], backward: bool) -> None:
        super().__init__(size, (2 * size[0], 2 * size[1]))  # room for a convolution that doesn't wrap around
        self.backward_filter = backward
        self.project = nn.Linear(dim, 3 * dim)
        self.short = nn.Conv2d(3 * dim, 3 * dim, 3, padding=1, groups=3 * dim)
        self.long = ImplicitFilter(dim, size)
        self.skip = nn.Parameter(torch.randn(dim, 1, 1))
        self.out = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        a, b, v = self.short(self.project(x).permute(0, 3, 1, 2)).chunk(3, 1)
        v = b * v
        v = self.convolve(v, self.long()) + self.skip * v
        return self.out((a * v).permute(0, 2, 3, 1))

    def convolve(self, x: Tensor, k: Tensor) -> Tensor:
        """(B, C, H, W) with filters (C, H, W): y[i] = Σ_j k[j] x[i - j], or x[i + j]."""
        real, imaginary = self.transform(k.unsqueeze(0))[0].chunk(2, -2)
        return self.restore(self.multiply(self.transform(x), real, -imaginary if self.backward_filter else imaginary))


class Position(nn.Module):
    """Adds a learned embedding of the place. (B, C, H, W) -> the same."""

    def __init__(self, dim: int, size: tuple[int, int]) -> None:
        super().__init__()
        self.embedding = nn.Parameter(trunc_normal_(torch.empty(1, dim, *size), std=0.02))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.embedding


class Merge(nn.Module):
    """Swin's patch merging. (B, C, H, W) -> (B, 2 C, H / 2, W / 2)."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.merge = PatchMerging(dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.merge(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class HyenaND(Backbone):
    """Zimerman and Wolf, "Multi-Dimensional Hyena for Spatial Inductive Bias", arXiv:2309.13600.

    With one stage a DeiT without class token, its places embedded; with more a Swin. Every other block of a stage
    filters backwards.

    Args:
        patch: Side of the patches.
        dim: Channels of the first stage, doubled by each of the others.
        attention: The last blocks of the last stage that attend, in the place of filtering: the paper's hybrid.
        num_heads: Theirs.
    """

    def __init__(
        self,
        *,
        in_chans: int = 3,
        img_size: int | tuple[int, int] = 224,
        patch: int = 16,
        dim: int = 192,
        depths: tuple[int, ...] = (12,),
        attention: int = 0,
        num_heads: int = 3,
        mlp_ratio: float = 4.0,
        drop_path_rate: float = 0.0,
        **kwargs: Any,
    ) -> None:
        h, w = pair(img_size)
        dims = [dim * 2**i for i in range(len(depths))]
        embed = nn.Conv2d(in_chans, dim, patch, stride=patch)
        stages, last = [], len(depths) - 1
        for i, rates in enumerate(drop_path_rates(drop_path_rate, depths)):
            c, size = dims[i], (h // (patch * 2**i), w // (patch * 2**i))
            blocks = []
            for j, rate in enumerate(rates):
                attends = i == last and j >= len(rates) - attention
                mixer = SelfAttention(c, num_heads) if attends else HyenaOperator(c, size, backward=j % 2 == 0)
                blocks.append(Block(c, mixer, Mlp(c, int(mlp_ratio * c)), rate, norm_layer))
            first = nn.Identity() if last else Position(c, size)
            stages.append(Stage(Merge(dims[i - 1]) if i else first, blocks))
        super().__init__(
            stem=nn.Sequential(embed, LayerNorm2d(dim)) if last else nn.Sequential(embed),
            stages=stages,
            dims=dims,
            norm=LayerNorm2d(dims[-1]),
            reduction=patch,
            img_size=img_size,
            **kwargs,
        )


@register_model
def hyena_deit_tiny_patch16_224(pretrained: bool = False, **kwargs: Any) -> HyenaND:
    """DeiT-T with Hyena in all blocks."""
    return make(HyenaND, "hyena_deit_tiny_patch16_224", pretrained, kwargs, depths=(12,))


@register_model
def hyena_deit_tiny_hybrid_patch16_224(pretrained: bool = False, **kwargs: Any) -> HyenaND:
    """DeiT-T with Hyena in the first seven blocks, then attention."""
    return make(HyenaND, "hyena_deit_tiny_hybrid_patch16_224", pretrained, kwargs, depths=(12,), attention=5)


@register_model
def hyena_deit_small_patch16_224(pretrained: bool = False, **kwargs: Any) -> HyenaND:
    """DeiT-S with Hyena in all blocks."""
    return make(HyenaND, "hyena_deit_small_patch16_224", pretrained, kwargs, dim=384, depths=(12,), num_heads=6)


@register_model
def hyena_swin_tiny_patch4_224(pretrained: bool = False, **kwargs: Any) -> HyenaND:
    """Swin-T with Hyena in all blocks."""
    return make(HyenaND, "hyena_swin_tiny_patch4_224", pretrained, kwargs, patch=4, dim=96, depths=(2, 2, 6, 2))
