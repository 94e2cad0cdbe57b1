"""SpectFormer, hierarchical models: learned filters of the spectrum in the shallow stages, attention in the deep."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from math import pi
from typing import Any

import torch
from timm.layers import LayerNorm2d, Mlp
from timm.models import generate_default_cfgs, register_model
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from martlet.models.backbone import (
    Backbone,
    Block,
    DepthwiseMlp,
    SelfAttention,
    Stage,
    cfg,
    drop_path_rates,
    init_weights_,
    make,
    merge_heads,
    pair,
    split_heads,
)
from martlet.models.papers.paper import Paper, Stated

__all__ = ["SpectFormer"]

SEEN = {"macs": "the paper's counter sees convolutions and Linear layers alone; counted so, it agrees"}

PAPER = Paper(
    title="SpectFormer: Frequency and Attention is what you need in a Vision Transformer",
    authors="Patro et al.",
    year=2023,
    arxiv="2304.06446",
    code="https://github.com/badripatro/SpectFormers",
    license="none",
    models={
        "spectformer_h_small": Stated(params="22.2M", macs="3.9G", top1_pct=84.3, differs=SEEN),
        "spectformer_h_base": Stated(params="33.1M", macs="6.3G", top1_pct=85.0, differs=SEEN),
        "spectformer_h_large": Stated(params="54.7M", macs="12.7G", top1_pct=85.7, differs=SEEN),
    },
    differs="Fourier transforms are products with real matrices, which every engine has and can round to integers.",
)

default_cfgs = generate_default_cfgs({name: cfg(first_conv="stem.0") for name in PAPER.models})

norm_layer = partial(nn.LayerNorm, eps=1e-6)


class Fourier(nn.Module):
    """The 2-D Fourier transform of real images, as two products with real matrices: one over W, one over H.

    Spectra are (B, C, 2 P, Q / 2 + 1): real above imaginary parts.

    Args:
        size: (H, W) of the images.
        period: (P, Q), at least `size`; images are 0 outside. Theirs if None.
    """

    rows: Tensor
    columns: Tensor
    columns_back: Tensor
    rows_back: Tensor

    def __init__(self, size: tuple[int, int], period: tuple[int, int] | None = None) -> None:
        super().__init__()
        (h, w), (p, q) = size, period or size
        kept = q // 2 + 1
        angle = 2 * pi / q * torch.outer(torch.arange(w), torch.arange(kept)).double()  # (W, Q / 2 + 1)
        twice = torch.tensor([1.0 if k in (0, q - k) else 2.0 for k in range(kept)]).double()[:, None]
        back = twice / q * angle.T.cos(), -twice / q * angle.T.sin()
        turn = 2 * pi / p * torch.outer(torch.arange(p), torch.arange(h)).double()
        c, s = turn.cos(), turn.sin()  # (P, H)
        matrices = {
            "rows": torch.cat([angle.cos(), -angle.sin()], 1),  # (W, 2 (Q / 2 + 1))
            "columns": torch.cat([torch.cat([c, s], 1), torch.cat([-s, c], 1)]),  # (2 P, 2 H)
            "columns_back": torch.cat([torch.cat([c.T, -s.T], 1), torch.cat([s.T, c.T], 1)]) / p,  # (2 H, 2 P)
            "rows_back": torch.cat(back),  # (2 (Q / 2 + 1), W)
        }
        for name, matrix in matrices.items():
            self.register_buffer(name, matrix.float(), persistent=False)

    def transform(self, x: Tensor) -> Tensor:
        """Images (B, C, H, W) -> spectra."""
        return self.columns @ torch.cat((x @ self.rows).chunk(2, -1), -2)

    def restore(self, spectrum: Tensor) -> Tensor:
        """Spectra -> images (B, C, H, W), cut out of their period."""
        return torch.cat((self.columns_back @ spectrum).chunk(2, -2), -1) @ self.rows_back

    def multiply(self, spectrum: Tensor, real: Tensor, imaginary: Tensor) -> Tensor:
        """Spectra by (C, P, Q / 2 + 1), complex."""
        a, b = spectrum.chunk(2, -2)
        return torch.cat([a * real - b * imaginary, a * imaginary + b * real], -2)


class SpectralGate(Fourier):
    """F⁻¹(weight ∘ F(x)), F the 2-D Fourier transform of each real channel (section 3.2). (B, H, W, C) -> the same.

    weight: (H, W / 2 + 1, C, 2), real and imaginary part.
    """

    def __init__(self, dim: int, size: tuple[int, int]) -> None:
        super().__init__(size)
        self.weight = nn.Parameter(0.02 * torch.randn(size[0], size[1] // 2 + 1, dim, 2))

    def forward(self, x: Tensor) -> Tensor:
        spectrum = self.transform(x.permute(0, 3, 1, 2))
        return self.restore(self.multiply(spectrum, *self.weight.permute(3, 2, 0, 1))).permute(0, 2, 3, 1)


class ClassBlock(nn.Module):
    """Class attention: one token asks, all answer. (B, 1 + N, C) -> the same, only the first changed."""

    def __init__(self, dim: int, num_heads: int, mlp_ratio: float) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.norm1, self.norm2 = norm_layer(dim), norm_layer(dim)
        self.q, self.kv, self.proj = nn.Linear(dim, dim), nn.Linear(dim, 2 * dim), nn.Linear(dim, dim)
        self.mlp = Mlp(dim, int(mlp_ratio * dim))

    def forward(self, x: Tensor) -> Tensor:
        normal, token = self.norm1(x), x[:, :1]
        q, k, v = (split_heads(o, self.num_heads) for o in (self.q(normal[:, :1]), *self.kv(normal).chunk(2, -1)))
        token = token + self.proj(merge_heads(scaled_dot_product_attention(q, k, v)))
        return torch.cat([token + self.mlp(self.norm2(token)), x[:, 1:]], 1)


class SpectFormer(Backbone):
    """Patro et al., "SpectFormer", arXiv:2304.06446, section 3, with the stages of its Table 2.

    `forward_features` gives tokens (B, 1 + N, C): first a class token, which starts as the mean of the others. The
    logits are the class token's and half of the largest of the other tokens', as token labelling trains them.

    Args:
        spectral: Stages from the first that filter the spectrum: the paper's alpha.
    """

    filter_layer: Callable[[int, tuple[int, int]], nn.Module] = SpectralGate

    def __init__(
        self,
        *,
        in_chans: int = 3,
        img_size: int | tuple[int, int] = 224,
        stem_dim: int = 32,
        dims: tuple[int, ...] = (64, 128, 320, 448),
        depths: tuple[int, ...] = (3, 4, 6, 3),
        num_heads: tuple[int, ...] = (2, 4, 10, 14),
        mlp_ratios: tuple[float, ...] = (8, 8, 4, 4),
        spectral: int = 2,
        drop_path_rate: float = 0.0,
        **kwargs: Any,
    ) -> None:
        h, w = pair(img_size)
        stages = []
        for i, rates in enumerate(drop_path_rates(drop_path_rate, depths)):
            c, size = dims[i], (h // (4 * 2**i), w // (4 * 2**i))
            blocks = []
            for rate in rates:
                mixer = type(self).filter_layer(c, size) if i < spectral else SelfAttention(c, num_heads[i])
                blocks.append(Block(c, mixer, DepthwiseMlp(c, int(mlp_ratios[i] * c)), rate, norm_layer))
            before = dims[i - 1]
            merge = nn.Sequential(LayerNorm2d(before), nn.Conv2d(before, c, 3, 2, 1), LayerNorm2d(c, eps=1e-5))
            stages.append(Stage(merge if i else nn.Identity(), blocks))
        norm = norm_layer(dims[-1])
        stem = make_stem(in_chans, stem_dim, dims[0])
        super().__init__(stem=stem, stages=stages, dims=dims, norm=norm, img_size=img_size, global_pool="", **kwargs)
        self.token = ClassBlock(dims[-1], num_heads[-1], mlp_ratios[-1])
        self.aux_head = nn.Linear(dims[-1], self.num_classes)
        self.token.apply(init_weights_)
        init_weights_(self.aux_head)

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """New, random classifiers of both kinds of token; 0 classes for none."""
        super().reset_classifier(num_classes, global_pool)
        self.aux_head = nn.Linear(self.num_features, num_classes) if num_classes else nn.Identity()

    def forward_features(self, x: Tensor) -> Tensor:
        """Images (B, 3, H, W) -> (B, 1 + N, C), normalized."""
        self.check_size(x)
        x = self.stages(self.stem(x)).flatten(2).transpose(1, 2)
        return self.norm(self.token(torch.cat([x.mean(1, keepdim=True), x], 1)))

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Both tokens' logits (B, K), or the class token (B, C)."""
        if pre_logits or not self.num_classes:
            return x[:, 0]
        return self.head(x[:, 0]) + 0.5 * self.aux_head(x[:, 1:]).amax(1)

    def normalize(self, x: Tensor) -> Tensor:
        return self.norm(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


def make_stem(in_chans: int, hidden: int, dim: int) -> nn.Sequential:
    """Four convolutions, of strides 2, 1, 1 and 2."""
    layers: list[nn.Module] = []
    for i in range(3):
        conv = nn.Conv2d(hidden, hidden, 3, padding=1, bias=False)
        first = nn.Conv2d(in_chans, hidden, 7, stride=2, padding=3, bias=False)
        layers += [conv if i else first, nn.BatchNorm2d(hidden), nn.ReLU(inplace=True)]
    return nn.Sequential(*layers, nn.Conv2d(hidden, dim, 3, stride=2, padding=1), LayerNorm2d(dim, eps=1e-5))


@register_model
def spectformer_h_small(pretrained: bool = False, **kwargs: Any) -> SpectFormer:
    """SpectFormer-H-S."""
    return make(SpectFormer, "spectformer_h_small", pretrained, kwargs, depths=(3, 4, 6, 3))


@register_model
def spectformer_h_base(pretrained: bool = False, **kwargs: Any) -> SpectFormer:
    """SpectFormer-H-B."""
    dims: dict[str, Any] = {"stem_dim": 64, "dims": (64, 128, 320, 512), "num_heads": (2, 4, 10, 16)}
    return make(SpectFormer, "spectformer_h_base", pretrained, kwargs, depths=(3, 4, 12, 3), **dims)


@register_model
def spectformer_h_large(pretrained: bool = False, **kwargs: Any) -> SpectFormer:
    """SpectFormer-H-L."""
    dims: dict[str, Any] = {"stem_dim": 64, "dims": (96, 192, 384, 512), "num_heads": (3, 6, 12, 16)}
    return make(SpectFormer, "spectformer_h_large", pretrained, kwargs, depths=(3, 6, 18, 3), **dims)
