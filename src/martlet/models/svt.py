"""SVT, hierarchical models: in the shallow stages a scattering transform, whose bands are mixed; then attention."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from timm.models import generate_default_cfgs, register_model
from torch import Tensor, nn
from torch.nn.functional import relu

from martlet.models.backbone import cfg, make
from martlet.models.papers.paper import Paper, Stated
from martlet.models.spectformer import SpectFormer

__all__ = ["SVT"]

SEEN = {"macs": "the paper's counter sees convolutions and Linear layers alone; counted so, it agrees"}

PAPER = Paper(
    title="Scattering Vision Transformer: Spectral Mixing Matters",
    authors="Patro and Agneeswaran",
    year=2023,
    arxiv="2311.01310",
    code="https://github.com/badripatro/svt",
    license="none",
    models={
        "svt_h_small": Stated(params="22.0M", macs="3.9G", top1_pct=84.2, differs=SEEN),
        "svt_h_base": Stated(params="32.8M", macs="6.3G", top1_pct=85.2, differs=SEEN),
        "svt_h_large": Stated(params="54.0M", macs="12.7G", top1_pct=85.7, differs=SEEN),
    },
    differs="Wavelets are products with real matrices, which every engine has and can round to integers.",
)

default_cfgs = generate_default_cfgs({name: cfg() for name in PAPER.models})

LOW = (0.55546875, 0.296875, -0.0482421875, -0.046875, 0.022265625, 0.0, -0.0017578125)
HIGH = (
    0.5594308035714286,
    -0.29975760323660716,
    -0.05168805803571428,
    0.05564313616071428,
    0.023856026785714284,
    -0.007156808035714285,
    -0.0018833705357142855,
    0.0013419015066964285,
    0.0,
    -7.062639508928571e-05,
)
"""Kingsbury's near-symmetric filters of 13 and 19 taps, from the middle outwards; synthesis alternates their signs."""

BLOCKS = 4


def filtering(side: int, taps: Sequence[float], alternate: bool = False) -> Tensor:
    """The matrix (side, side) that filters the columns of what it multiplies, mirrored at both ends; float64."""
    matrix = torch.zeros(side, side, dtype=torch.float64)
    for i in range(side):
        for offset in range(1 - len(taps), len(taps)):
            j = (i + offset) % (2 * side)
            sign = -1.0 if alternate and offset % 2 else 1.0
            matrix[i, j if j < side else 2 * side - 1 - j] += sign * taps[abs(offset)]
    return matrix


class Scattering(nn.Module):
    """Dual-tree complex wavelets of one level, each kind of band mixed in its own way, and back (section 3.1).

    Half of the channels; the other half goes through a depthwise convolution, and both are interleaved. The low band,
    as large as the image, is multiplied by a weight for each position and channel (eq. 2). The six complex high bands,
    half as large, go through two complex layers with ReLU between them over blocks of channels, then through two over
    each row of the band (eq. 3 and 4). (B, H, W, C), H and W even -> the same.
    """

    rows: Tensor
    columns: Tensor
    columns_back: Tensor
    rows_back: Tensor

    def __init__(self, dim: int, size: tuple[int, int]) -> None:
        super().__init__()
        (h, w), half = size, dim // 2
        self.conv = nn.Conv2d(half, half, 3, padding=1, groups=half)
        self.low = nn.Parameter(0.02 * torch.randn(half, h, w))
        self.channels = ComplexMlp(BLOCKS, half // BLOCKS)
        self.tokens = ComplexMlp(h // 2, w // 2)
        matrices = {
            "rows": torch.cat([filtering(w, LOW).T, filtering(w, HIGH).T], 1),  # (W, 2 W)
            "columns": torch.cat([filtering(h, LOW), filtering(h, HIGH)]),  # (2 H, H)
            "columns_back": torch.cat([filtering(h, HIGH, True), filtering(h, LOW, True)], 1),  # (H, 2 H)
            "rows_back": torch.cat([filtering(w, HIGH, True).T, filtering(w, LOW, True).T]),  # (2 W, W)
        }
        for name, matrix in matrices.items():
            self.register_buffer(name, matrix.float(), persistent=False)

    def analyze(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(B, C, H, W) -> the low band, alike, and six high ones (B, 6, C, H / 2, W / 2), real and imaginary part."""
        bands = self.columns @ (x @ self.rows)  # (B, C, 2 H, 2 W)
        top, bottom = bands.chunk(2, -2)
        low, first = top.chunk(2, -1)
        high = torch.stack([first, *bottom.chunk(2, -1)], 1) * 0.5**0.5  # (B, 3, C, H, W)
        a, b, c, d = high[..., ::2, ::2], high[..., ::2, 1::2], high[..., 1::2, ::2], high[..., 1::2, 1::2]
        return low, torch.cat([a - d, a + d], 1), torch.cat([b + c, b - c], 1)

    def synthesize(self, low: Tensor, real: Tensor, imaginary: Tensor) -> Tensor:
        """What `analyze` took apart: -> (B, C, H, W)."""
        (p1, p2), (q1, q2) = real.chunk(2, 1), imaginary.chunk(2, 1)
        even = torch.stack([p1 + p2, q1 + q2], -1).flatten(-2)  # (B, 3, C, H / 2, W)
        odd = torch.stack([q1 - q2, p2 - p1], -1).flatten(-2)
        first, second, third = (torch.stack([even, odd], -2).flatten(-3, -2) * 0.5**0.5).unbind(1)
        bands = torch.cat([torch.cat([low, first], -1), torch.cat([second, third], -1)], -2)
        return (self.columns_back @ bands) @ self.rows_back

    def forward(self, x: Tensor) -> Tensor:
        local, x = x.permute(0, 3, 1, 2).chunk(2, 1)
        low, *high = self.analyze(x)
        blocks = (part.permute(0, 1, 3, 4, 2).unflatten(-1, (BLOCKS, -1)) for part in high)
        bands = (part.flatten(-2).permute(0, 1, 4, 2, 3) for part in self.channels(*blocks))
        x = self.synthesize(low * self.low, *self.tokens(*bands))
        return torch.stack([self.conv(local), x], 2).flatten(1, 2).permute(0, 2, 3, 1)


class ComplexMlp(nn.Module):
    """Two layers x W + b of complex numbers, weights of their own for each group; ReLU of both parts between them.

    Real and imaginary part (…, G, D) -> the same.
    """

    def __init__(self, groups: int, dim: int) -> None:
        super().__init__()
        self.weight1 = nn.Parameter(0.02 * torch.randn(2, groups, dim, dim))  # real and imaginary part
        self.weight2 = nn.Parameter(0.02 * torch.randn(2, groups, dim, dim))
        self.bias1 = nn.Parameter(0.02 * torch.randn(2, groups, dim))
        self.bias2 = nn.Parameter(0.02 * torch.randn(2, groups, dim))

    def forward(self, real: Tensor, imaginary: Tensor) -> tuple[Tensor, Tensor]:
        real, imaginary = self.layer(real, imaginary, self.weight1, self.bias1)
        return self.layer(relu(real), relu(imaginary), self.weight2, self.bias2)

    def layer(self, real: Tensor, imaginary: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        """One of them: weight (2, G, D, D), bias (2, G, D)."""

        def times(x: Tensor, part: Tensor) -> Tensor:
            return torch.einsum("...gi,gio->...go", x, part)

        return (
            times(real, weight[0]) - times(imaginary, weight[1]) + bias[0],
            times(real, weight[1]) + times(imaginary, weight[0]) + bias[1],
        )


class SVT(SpectFormer):
    """Patro and Agneeswaran, "Scattering Vision Transformer", arXiv:2311.01310: SpectFormer's stages, other filters.

    Sides of the stages that scatter are even.
    """

    filter_layer = Scattering


@register_model
def svt_h_small(pretrained: bool = False, **kwargs: Any) -> SVT:
    """SVT-H-S."""
    return make(SVT, "svt_h_small", pretrained, kwargs, depths=(3, 4, 6, 3))


@register_model
def svt_h_base(pretrained: bool = False, **kwargs: Any) -> SVT:
    """SVT-H-B."""
    dims: dict[str, Any] = {"stem_dim": 64, "dims": (64, 128, 320, 512), "num_heads": (2, 4, 10, 16)}
    return make(SVT, "svt_h_base", pretrained, kwargs, depths=(3, 4, 12, 3), **dims)


@register_model
def svt_h_large(pretrained: bool = False, **kwargs: Any) -> SVT:
    """SVT-H-L."""
    dims: dict[str, Any] = {"stem_dim": 64, "dims": (96, 192, 384, 512), "num_heads": (3, 6, 12, 16)}
    return make(SVT, "svt_h_large", pretrained, kwargs, depths=(3, 6, 18, 3), **dims)
