"""FIT: groups of tokens attend inside themselves; a few latents of each group talk to all latents, in turns."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from timm.layers import DropPath, LayerNorm2d, Mlp, trunc_normal_
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from timm.models.swin_transformer import window_partition, window_reverse
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from martlet.models.backbone import (
    Backbone,
    Block,
    SelfAttention,
    cfg,
    drop_path_rates,
    merge_heads,
    pair,
    split_heads,
)
from martlet.models.papers.paper import Paper, Stated

__all__ = ["FIT"]

PAPER = Paper(
    title="FIT: Far-reaching Interleaved Transformers",
    authors="Chen and Li",
    year=2023,
    arxiv="2305.12689",
    code="https://github.com/google-research/pix2seq",
    license="Apache-2.0",
    models={
        "fit_tiny_patch8_224": Stated(params=None, macs=None),
        "fit_small_patch8_224": Stated(params=None, macs=None),
        "fit_small_patch16_896": Stated(params=None, macs=None),
    },
    differs="The paper detects objects and generates images. These classify the mean of the data tokens, with the "
    "widths of DeiT-T and S.",
)

default_cfgs = generate_default_cfgs(
    {name: cfg(input_size=(3, 896, 896)) if name.endswith("896") else cfg() for name in PAPER.models}
)

norm_layer = partial(nn.LayerNorm, eps=1e-6)


class CrossAttention(nn.Module):
    """x + attention of x to what it reads. (B, N, C) and (B, M, D) -> (B, N, C).

    inner: channels of queries, keys and values.
    """

    def __init__(self, dim: int, read_dim: int, inner: int, num_heads: int, drop_path: float = 0.0) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.norm, self.read_norm = norm_layer(dim), norm_layer(read_dim)
        self.q, self.kv, self.proj = nn.Linear(dim, inner), nn.Linear(read_dim, 2 * inner), nn.Linear(inner, dim)
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor, read: Tensor) -> Tensor:
        parts = (self.q(self.norm(x)), *self.kv(self.read_norm(read)).chunk(2, -1))
        q, k, v = (split_heads(one, self.num_heads) for one in parts)
        return x + self.drop_path(self.proj(merge_heads(scaled_dot_product_attention(q, k, v))))


class Interleaved(nn.Module):
    """Local layers, then for each further round: latents read their group, global layers, the group reads its latents,
    local layers. (B, C, H, W) -> the same.

    Args:
        size: H and W.
        group: Side of a group of tokens.
        latents: Of a group.
        local: Layers of each round on the tokens of each group.
        globally: Layers of each but the first round on all latents.
    """

    def __init__(
        self,
        dim: int,
        latent_dim: int,
        size: tuple[int, int],
        group: int,
        latents: int,
        local: Sequence[int],
        globally: Sequence[int],
        num_heads: int,
        latent_heads: int,
        mlp_ratio: float,
        drop_path_rate: float,
    ) -> None:
        super().__init__()
        self.group, self.groups = (group, group), size[0] // group * (size[1] // group)
        self.position = nn.Parameter(trunc_normal_(torch.empty(group, group, dim), std=0.02))
        self.latents = nn.Parameter(trunc_normal_(torch.empty(self.groups * latents, 1, latent_dim), std=0.02))
        order = [n for pair in zip(local, (*globally, 0), strict=True) for n in pair]
        rates = drop_path_rates(drop_path_rate, order)

        def layers(c: int, heads: int, rates: list[float]) -> nn.Sequential:
            blocks = (Block(c, SelfAttention(c, heads), Mlp(c, int(mlp_ratio * c)), r, norm_layer) for r in rates)
            return nn.Sequential(*blocks)

        inner, heads = min(dim, latent_dim), min(num_heads, latent_heads)
        self.local = nn.ModuleList(layers(dim, num_heads, one) for one in rates[::2])
        self.read = nn.ModuleList(CrossAttention(latent_dim, dim, inner, heads) for _ in globally)
        self.globally = nn.ModuleList(layers(latent_dim, latent_heads, one) for one in rates[1:-1:2])
        self.write = nn.ModuleList(CrossAttention(dim, latent_dim, inner, heads) for _ in globally)

    def forward(self, x: Tensor) -> Tensor:
        b, _, h, w = x.shape
        x = window_partition(x.permute(0, 2, 3, 1), self.group)  # (B groups, g, g, C)
        x = self.local[0](x + self.position)
        latents = self.latents.repeat(b, 1, 1, 1)  # (B, groups m, 1, D)
        rounds = zip(self.read, self.globally, self.write, self.local[1:], strict=True)
        for read, globally, write, local in rounds:
            own = read(latents.reshape(b * self.groups, -1, latents.shape[-1]), x.flatten(1, 2))  # (B groups, m, D)
            latents = globally(own.reshape(latents.shape))
            x = write(x.flatten(1, 2), latents.reshape(own.shape)).unflatten(1, self.group)
            x = local(x)
        return window_reverse(x, self.group, h, w).permute(0, 3, 1, 2)


class FIT(Backbone):
    """Chen and Li, "FIT: Far-reaching Interleaved Transformers", arXiv:2305.12689, as an encoder.

    Sides are multiples of `patch` · `group`, as many as `img_size` says. With groups of L^(1/3) of the L tokens
    attention costs L^(4/3).

    Args:
        patch: Side of the patches.
        group, latents, local, globally: As Interleaved's.
        num_heads, latent_heads: Of tokens, and of latents.
    """

    def __init__(
        self,
        *,
        in_chans: int = 3,
        img_size: int | tuple[int, int] = 224,
        patch: int = 8,
        group: int = 7,
        latents: int = 8,
        dim: int = 192,
        latent_dim: int = 192,
        local: tuple[int, ...] = (2, 2, 2),
        globally: tuple[int, ...] = (4, 4),
        num_heads: int = 3,
        latent_heads: int = 3,
        mlp_ratio: float = 4.0,
        drop_path_rate: float = 0.0,
        **kwargs: Any,
    ) -> None:
        h, w = pair(img_size)
        size = (h // patch, w // patch)
        heads = (num_heads, latent_heads, mlp_ratio, drop_path_rate)
        super().__init__(
            stem=nn.Sequential(nn.Conv2d(in_chans, dim, patch, stride=patch), LayerNorm2d(dim)),
            stages=[Interleaved(dim, latent_dim, size, group, latents, local, globally, *heads)],
            dims=[dim],
            norm=LayerNorm2d(dim),
            reduction=patch,
            divisor=patch * group,
            img_size=img_size,
            **kwargs,
        )


def _make(name: str, pretrained: bool, kwargs: dict[str, Any], **dims: Any) -> FIT:
    feature_cfg = {"out_indices": (0,), "feature_cls": "getter"}
    return build_model_with_cfg(FIT, name, pretrained, feature_cfg=feature_cfg, **(dims | kwargs))


@register_model
def fit_tiny_patch8_224(pretrained: bool = False, **kwargs: Any) -> FIT:
    """Widths of DeiT-T; 16 groups of 49 tokens."""
    return _make("fit_tiny_patch8_224", pretrained, kwargs)


@register_model
def fit_small_patch8_224(pretrained: bool = False, **kwargs: Any) -> FIT:
    """Widths of DeiT-S; 16 groups of 49 tokens."""
    dims: dict[str, Any] = {"dim": 384, "latent_dim": 384, "num_heads": 6, "latent_heads": 6}
    return _make("fit_small_patch8_224", pretrained, kwargs, **dims)


@register_model
def fit_small_patch16_896(pretrained: bool = False, **kwargs: Any) -> FIT:
    """Widths of DeiT-S for images of 896 × 896; 64 groups of 49 tokens."""
    dims: dict[str, Any] = {"dim": 384, "latent_dim": 384, "num_heads": 6, "latent_heads": 6}
    return _make("fit_small_patch16_896", pretrained, kwargs, img_size=896, patch=16, **dims)
