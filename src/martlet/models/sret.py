"""SReT: every block run twice, with attention in slices of the tokens."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from timm.layers import DropPath, Mlp
from timm.models import generate_default_cfgs, register_model
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from martlet.core.errors import SourceError
from martlet.models.backbone import Backbone, cfg, drop_path_rates, make, pair
from martlet.models.papers.paper import Paper, Stated

__all__ = ["SReT"]

PAPER = Paper(
    title="Sliced Recursive Transformer",
    authors="Shen et al.",
    year=2022,
    arxiv="2111.05297",
    code="https://github.com/szq0214/SReT",
    license="MIT",
    models={
        "sret_tiny": Stated(params="4.8M", macs="1.1G", top1_pct=76.0),
        "sret_tiny_unsliced": Stated(params="4.8M", macs="1.4G", top1_pct=76.1),
        "sret_light": Stated(params="5.0M", macs="1.2G", top1_pct=76.7),
        "sret_light_unsliced": Stated(params="5.0M", macs="1.4G", top1_pct=76.8),
        "sret_small": Stated(params="20.9M", macs="4.2G", top1_pct=81.9),
        "sret_small_unsliced": Stated(params="20.9M", macs="4.7G", top1_pct=82.0),
    },
    differs="The second pass slices every G-th token, not tokens permuted at random each time, which no engine can do.",
)

default_cfgs = generate_default_cfgs({name: cfg() for name in PAPER.models})

norm_layer = partial(nn.LayerNorm, eps=1e-6)
UNSLICED = ((1, 1), (1, 1), (1, 1))


class Coefficients(nn.Module):
    """a x + b y, a and b learned (learnable residual connection, eq. 6)."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Parameter(torch.ones(())), nn.Parameter(torch.ones(()))

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return self.a * x + self.b * y


class SlicedAttention(nn.Module):
    """Self-attention inside G groups of tokens (eq. 5). (B, N, C) -> the same.

    Neighbours in raster order make a group in the first pass; in the second, tokens that are G apart.
    """

    def __init__(self, dim: int, num_heads: int, groups: tuple[int, int]) -> None:
        super().__init__()
        self.num_heads, self.groups = num_heads, groups
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor, again: bool) -> Tensor:
        g = self.groups[again]
        x = x.unflatten(1, (-1, g)).transpose(1, 2) if again else x.unflatten(1, (g, -1))  # (B, G, N / G, C)
        qkv = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).permute(3, 0, 1, 4, 2, 5)
        x = scaled_dot_product_attention(*qkv.unbind(0)).transpose(2, 3).flatten(3)
        return self.proj((x.transpose(1, 2) if again else x).flatten(1, 2))


class RecursiveBlock(nn.Module):
    """Attention and MLP with learned residuals; what each pass runs, with the same weights."""

    def __init__(self, dim: int, num_heads: int, groups: tuple[int, int], mlp_ratio: float, drop_path: float) -> None:
        super().__init__()
        self.norm1, self.norm2 = norm_layer(dim), norm_layer(dim)
        self.attn = SlicedAttention(dim, num_heads, groups)
        self.mlp = Mlp(dim, int(mlp_ratio * dim))
        self.residual1, self.residual2 = Coefficients(), Coefficients()
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor, again: bool) -> Tensor:
        x = self.residual1(x, self.drop_path(self.attn(self.norm1(x), again)))
        return self.residual2(x, self.drop_path(self.mlp(self.norm2(x))))


class NonLinearProjection(nn.Module):
    """What follows each pass with weights of its own (eq. 4), so that passes can differ."""

    def __init__(self, dim: int, mlp_ratio: float) -> None:
        super().__init__()
        self.norm = norm_layer(dim)
        self.mlp = Mlp(dim, int(mlp_ratio * dim))
        self.residual = Coefficients()

    def forward(self, x: Tensor) -> Tensor:
        return self.residual(x, self.mlp(self.norm(x)))


class RecursiveStage(nn.Module):
    """Downsampling, then each block twice, a projection after each pass: (B, C, H, W) -> (B, C', H', W')."""

    def __init__(self, downsample: nn.Module, blocks: list[RecursiveBlock], projections: list[nn.Module]) -> None:
        super().__init__()
        self.downsample = downsample
        self.blocks = nn.ModuleList(blocks)
        self.projections = nn.ModuleList(projections)

    def forward(self, x: Tensor) -> Tensor:
        x = self.downsample(x)
        size = x.shape[2:]
        x = x.flatten(2).transpose(1, 2)
        for i, projection in enumerate(self.projections):
            x = projection(self.blocks[i // 2](x, i % 2 == 1))
        return x.transpose(1, 2).unflatten(2, size)


class Position(nn.Module):
    """A learned position embedding. (B, C, H, W) -> the same."""

    def __init__(self, dim: int, size: tuple[int, int]) -> None:
        super().__init__()
        self.embed = nn.Parameter(0.02 * torch.randn(1, dim, *size))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.embed


class SReT(Backbone):
    """Shen et al., "Sliced Recursive Transformer", arXiv:2111.05297, section 3.

    Args:
        depths: Blocks of each stage; twice as many run.
        groups: Slices of the first and the second pass, for each stage; 1 for attention over all tokens.
        projection_ratio: Expansion of the projections' MLP.
    """

    def __init__(
        self,
        *,
        in_chans: int = 3,
        img_size: int | tuple[int, int] = 224,
        dims: tuple[int, ...] = (64, 128, 256),
        depths: tuple[int, ...] = (2, 5, 3),
        num_heads: tuple[int, ...] = (2, 4, 8),
        groups: tuple[tuple[int, int], ...] = ((8, 2), (4, 1), (1, 1)),
        mlp_ratio: float = 3.6,
        projection_ratio: float = 1.0,
        drop_path_rate: float = 0.0,
        **kwargs: Any,
    ) -> None:
        h, w = pair(img_size)
        first, stem = dims[0], []
        for before, after in ((in_chans, first // 2), (first // 2, first), (first, first)):
            stem += [nn.Conv2d(before, after, 3, stride=2, padding=1), nn.BatchNorm2d(after), nn.ReLU(inplace=True)]
        stages = []
        for i, rates in enumerate(drop_path_rates(drop_path_rate, depths)):
            c, tokens = dims[i], (h // (8 * 2**i)) * (w // (8 * 2**i))
            if any(tokens % g for g in groups[i]):
                raise SourceError(f"SReT can't slice {tokens} tokens into groups of {groups[i]} equal parts")
            blocks = [RecursiveBlock(c, num_heads[i], groups[i], mlp_ratio, rate) for rate in rates]
            pool = nn.Conv2d(dims[i - 1], c, 3, stride=2, padding=1, groups=dims[i - 1]) if i else nn.Identity()
            projections: list[nn.Module] = [NonLinearProjection(c, projection_ratio) for _ in range(2 * len(rates))]
            stages.append(RecursiveStage(pool, blocks, projections))
        whole = nn.Sequential(*stem, Position(first, (h // 8, w // 8)))
        super().__init__(stem=whole, stages=stages, dims=dims, norm=None, reduction=8, img_size=img_size, **kwargs)


@register_model
def sret_tiny(pretrained: bool = False, **kwargs: Any) -> SReT:
    """SReT-T."""
    return make(SReT, "sret_tiny", pretrained, kwargs, depths=(2, 5, 3))


@register_model
def sret_tiny_unsliced(pretrained: bool = False, **kwargs: Any) -> SReT:
    """SReT-⋇T: recursion without slices."""
    return make(SReT, "sret_tiny_unsliced", pretrained, kwargs, depths=(2, 5, 3), groups=UNSLICED)


@register_model
def sret_light(pretrained: bool = False, **kwargs: Any) -> SReT:
    """SReT-LT."""
    return make(SReT, "sret_light", pretrained, kwargs, depths=(2, 5, 3), mlp_ratio=4.0)


@register_model
def sret_light_unsliced(pretrained: bool = False, **kwargs: Any) -> SReT:
    """SReT-⋇LT: recursion without slices."""
    return make(SReT, "sret_light_unsliced", pretrained, kwargs, depths=(2, 5, 3), groups=UNSLICED, mlp_ratio=4.0)


@register_model
def sret_small(pretrained: bool = False, **kwargs: Any) -> SReT:
    """SReT-S."""
    dims: dict[str, Any] = {"dims": (126, 252, 504), "num_heads": (3, 6, 12), "mlp_ratio": 3.0, "projection_ratio": 2.0}
    return make(SReT, "sret_small", pretrained, kwargs, depths=(2, 5, 3), **dims)


@register_model
def sret_small_unsliced(pretrained: bool = False, **kwargs: Any) -> SReT:
    """SReT-⋇S: recursion without slices."""
    dims: dict[str, Any] = {"dims": (126, 252, 504), "num_heads": (3, 6, 12), "mlp_ratio": 3.0, "projection_ratio": 2.0}
    return make(SReT, "sret_small_unsliced", pretrained, kwargs, depths=(2, 5, 3), groups=UNSLICED, **dims)
