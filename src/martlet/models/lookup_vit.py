"""LookupViT: a few compressed tokens are computed in full, and look up many cheap ones in each block."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from timm.data.constants import IMAGENET_INCEPTION_MEAN, IMAGENET_INCEPTION_STD
from timm.layers import DropPath, Mlp, PatchEmbed, trunc_normal_
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from martlet.core.errors import SourceError
from martlet.models.backbone import check_only_size, pair
from martlet.models.papers.paper import Paper, Stated

__all__ = ["LookupViT"]

PAPER = Paper(
    title="LookupViT: Compressing visual information to a limited number of tokens",
    authors="Koner et al.",
    year=2024,
    arxiv="2407.12753",
    code=None,
    license="none",
    models={
        "lookup_vit_small_patch16_224": Stated(params=None, macs=None),
        "lookup_vit_base_patch16_224": Stated(params=None, macs=None),
    },
    differs="The logits are of the mean of both kinds of tokens, each normalized and averaged.",
)

default_cfgs = generate_default_cfgs(
    {
        name: {
            "num_classes": 1000,
            "input_size": (3, 224, 224),
            "crop_pct": 0.9,
            "interpolation": "bicubic",
            "mean": IMAGENET_INCEPTION_MEAN,
            "std": IMAGENET_INCEPTION_STD,
            "first_conv": "patch_embed.proj",
            "classifier": "head",
        }
        for name in PAPER.models
    }
)


class LookupBlock(nn.Module):
    """Lookup tokens (B, N, C) and compressed tokens (B, M, C) to the same.

    1. Gathering: each compressed token attends to all lookup tokens, A = softmax(q kᵀ / sqrt(D)), (B, heads, M, N).
    2. Refinement: a plain block of a vision transformer, on the compressed tokens alone.
    3. Infusion: what was refined goes to the lookup tokens by Aᵀ, which isn't computed anew; then their MLP, whose
       hidden layer is narrower than C.
    (3 N M + 2 M²) C + (4 N + 15 M) C² MACs with the ratios by default, where a plain block has 2 N² C + 12 N C².
    """

    def __init__(
        self, dim: int, num_heads: int, mlp_ratio: float = 4.0, lookup_mlp_ratio: float = 0.5, drop_path: float = 0.0
    ) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.scale = (dim // num_heads) ** -0.5
        self.norm_compressed, self.norm_lookup = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.query, self.key_value, self.gather = nn.Linear(dim, dim), nn.Linear(dim, 2 * dim), nn.Linear(dim, dim)
        self.refine = Block(dim, num_heads, mlp_ratio, qkv_bias=True, drop_path=drop_path)
        self.norm_refined = nn.LayerNorm(dim)
        self.value, self.infuse = nn.Linear(dim, dim), nn.Linear(dim, dim)
        self.norm_mlp = nn.LayerNorm(dim)
        self.mlp = Mlp(dim, int(lookup_mlp_ratio * dim))
        self.drop_path = DropPath(drop_path)

    def forward(self, lookup: Tensor, compressed: Tensor) -> tuple[Tensor, Tensor]:
        key, value = self.key_value(self.norm_lookup(lookup)).chunk(2, -1)
        query = self.query(self.norm_compressed(compressed)) * self.scale
        weights = (self._heads(query) @ self._heads(key).mT).softmax(-1)  # (B, heads, M, N)
        gathered = (weights @ self._heads(value)).transpose(1, 2).flatten(2)  # (B, M, C)
        compressed = self.refine(compressed + self.drop_path(self.gather(gathered)))
        value = self._heads(self.value(self.norm_refined(compressed)))  # (B, heads, M, D)
        infused = (weights.mT @ value).transpose(1, 2).flatten(2)  # (B, N, C)
        lookup = lookup + self.drop_path(self.infuse(infused))
        return lookup + self.drop_path(self.mlp(self.norm_mlp(lookup))), compressed

    def _heads(self, x: Tensor) -> Tensor:
        """(B, N, C) -> (B, heads, N, D)."""
        return x.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)


class LookupViT(nn.Module):
    """Koner et al., "LookupViT: Compressing visual information to a limited number of tokens", arXiv:2407.12753.

    Compressed tokens begin as the grid of patches, positions included, resized to M by M. They have no parameters of
    their own, so one set of weights runs with any number of them: `compressed` is a property that can be set, and
    `forward` takes another for one call, as training with several does.

    The logits are of the mean of both kinds of tokens, each normalized and averaged; the official code isn't public.
    Without training, as it comes here, it tells nothing but its cost.

    Shape: images (B, 3, H, W) of `img_size` -> logits (B, K).

    Args:
        compressed: M, compressed tokens down and across.
    """

    def __init__(
        self,
        *,
        img_size: int | tuple[int, int] = 224,
        patch_size: int = 16,
        in_chans: int = 3,
        num_classes: int = 1000,
        embed_dim: int = 768,
        depth: int = 12,
        num_heads: int = 12,
        mlp_ratio: float = 4.0,
        lookup_mlp_ratio: float = 0.5,
        compressed: int = 5,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
    ) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.num_features = self.head_hidden_size = self.embed_dim = embed_dim
        self.img_size = pair(img_size)
        self.patch_embed = PatchEmbed(img_size, patch_size, in_chans, embed_dim)
        self.grid: tuple[int, int] = self.patch_embed.grid_size  # type: ignore[assignment]
        self.compressed = compressed
        self.pos_embed = nn.Parameter(torch.empty(1, self.grid[0] * self.grid[1], embed_dim))
        rates = [drop_path_rate * i / max(depth - 1, 1) for i in range(depth)]
        self.blocks = nn.ModuleList(
            LookupBlock(embed_dim, num_heads, mlp_ratio, lookup_mlp_ratio, rate) for rate in rates
        )
        self.norm_lookup, self.norm_compressed = nn.LayerNorm(embed_dim), nn.LayerNorm(embed_dim)
        self.head_drop = nn.Dropout(drop_rate)
        self.head = nn.Linear(embed_dim, num_classes) if num_classes else nn.Identity()
        trunc_normal_(self.pos_embed, std=0.02)
        self.apply(_init_weights_)

    @property
    def compressed(self) -> int:
        """M, compressed tokens down and across."""
        return self._compressed

    @compressed.setter
    def compressed(self, side: int) -> None:
        """
        Raises:
            SourceError: none, or more than patches on a side.
        """
        self._compressed = self._checked(side)

    def _checked(self, side: int) -> int:
        most = min(self.grid)
        if not 1 <= side <= most:
            raise SourceError(f"LookupViT: compressed is {side}; with patches {self.grid} it can be 1 to {most}")
        return side

    def get_classifier(self) -> nn.Module:
        """The Linear that gives the logits."""
        return self.head

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """A new, random classifier; 0 classes for none."""
        self.num_classes = num_classes
        self.head = nn.Linear(self.embed_dim, num_classes) if num_classes else nn.Identity()
        _init_weights_(self.head)

    def forward_features(self, x: Tensor, compressed: int | None = None) -> Tensor:
        """Images to normalized tokens (B, N + M², C): lookup tokens in row order, then compressed ones."""
        check_only_size(self, x, self.img_size)
        side = self.compressed if compressed is None else self._checked(compressed)
        lookup = self.patch_embed(x) + self.pos_embed  # (B, N, C)
        few = torch.tensor(_resized(self.grid, side), dtype=lookup.dtype, device=lookup.device) @ lookup  # (B, M², C)
        for block in self.blocks:
            lookup, few = block(lookup, few)
        return torch.cat([self.norm_lookup(lookup), self.norm_compressed(few)], 1)

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """What `forward_features` gives -> logits (B, K), or the pooled (B, C)."""
        patches = self.grid[0] * self.grid[1]
        x = (x[:, :patches].mean(1) + x[:, patches:].mean(1)) / 2
        x = self.head_drop(x)
        return x if pre_logits else self.head(x)

    def forward(self, x: Tensor, compressed: int | None = None) -> Tensor:
        return self.forward_head(self.forward_features(x, compressed))


@cache
def _resized(grid: tuple[int, int], side: int) -> list[list[float]]:
    """The matrix (M², N) that resizes a grid of N tokens in row order to M by M, bilinearly and without aliasing.

    A fixed matrix, because every engine has a product, and not every one this resizing.
    """
    down, across = (_resized_line(n, side) for n in grid)
    return [[a * b for a in row for b in column] for row in down for column in across]


def _resized_line(n: int, m: int) -> list[list[float]]:
    """(M, N): triangles as wide as to reach the neighbouring output, or the neighbouring input if that is further."""
    scale = n / m
    rows = []
    for i in range(m):
        centre, reach = (i + 0.5) * scale, max(scale, 1.0)
        row = [max(0.0, 1 - abs(j + 0.5 - centre) / reach) for j in range(n)]
        rows.append([weight / sum(row) for weight in row])
    return rows


def _init_weights_(module: nn.Module) -> None:
    if isinstance(module, nn.Linear):
        trunc_normal_(module.weight, std=0.02)
        nn.init.zeros_(module.bias)


@register_model
def lookup_vit_small_patch16_224(pretrained: bool = False, **kwargs: Any) -> LookupViT:
    """LookupViT of ViT-S/16's width and depth, with 5 by 5 compressed tokens."""
    dims: dict[str, Any] = {"embed_dim": 384, "num_heads": 6}
    return build_model_with_cfg(LookupViT, "lookup_vit_small_patch16_224", pretrained, **(dims | kwargs))


@register_model
def lookup_vit_base_patch16_224(pretrained: bool = False, **kwargs: Any) -> LookupViT:
    """LookupViT-B/16 with 5 by 5 compressed tokens: 8.5 G MACs, where ViT-B/16 has 17.6 G."""
    return build_model_with_cfg(LookupViT, "lookup_vit_base_patch16_224", pretrained, **kwargs)
