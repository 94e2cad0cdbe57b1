"""EfficientVMamba: a selective scan that skips every second row and column, beside a convolution."""

from __future__ import annotations

from math import ceil, log
from typing import Any

import torch
from timm.layers import DropPath, LayerNorm2d, SqueezeExcite
from timm.models import generate_default_cfgs, register_model
from torch import Tensor, nn
from torch.nn.functional import gelu, pad, silu, softplus

from martlet.models.backbone import Backbone, Stage, cfg, drop_path_rates, make
from martlet.models.papers.paper import Paper, Stated

__all__ = ["EfficientVMamba"]

SCAN = {
    "macs": "the paper adds 9 for each state of each token that is scanned, elementwise work here; with it, it agrees"
}

PAPER = Paper(
    title="EfficientVMamba: Atrous Selective Scan for Light Weight Visual Mamba",
    authors="Pei et al.",
    year=2024,
    arxiv="2403.09977",
    code="https://github.com/TerryPei/EfficientVMamba",
    license="none",
    models={
        "efficientvmamba_tiny": Stated(params="6M", macs="0.8G", top1_pct=76.5, differs=SCAN),
        "efficientvmamba_small": Stated(params="11M", macs="1.3G", top1_pct=78.7, differs=SCAN),
        "efficientvmamba_base": Stated(
            params="33M",
            macs="4.0G",
            top1_pct=81.8,
            differs=SCAN | {"params": "33.7 M, as the authors' logs say too: the paper cuts the rest off"},
        ),
    },
)

default_cfgs = generate_default_cfgs({name: cfg() for name in PAPER.models})


FEW = 16
"""Steps that are scanned with all of them at once: of so few, fewer operations are faster than less work."""


def scan(a: Tensor, b: Tensor) -> Tensor:
    """h_t = a_t h_(t-1) + b_t along the last axis but one, h before the first 0. (…, L, N), (…, L, N) -> (…, L, N).

    Two steps are one, with a_t a_(t-1) and a_t b_(t-1) + b_t; these are scanned, and those between follow (Blelloch).
    It is twice the work of a loop, which is slow on every engine, in a few operations for each halving.
    """
    length = b.shape[-2]
    if length <= FEW:
        step = 1
        while step < length:  # Hillis and Steele
            b = b + a * pad(b[..., :-step, :], (0, 0, step, 0))
            a = a * pad(a[..., :-step, :], (0, 0, step, 0), value=1.0)
            step *= 2
        return b
    if length % 2:
        return scan(pad(a, (0, 0, 0, 1)), pad(b, (0, 0, 0, 1)))[..., :-1, :]
    (a_even, a_odd), (b_even, b_odd) = (each.unflatten(-2, (length // 2, 2)).unbind(-2) for each in (a, b))
    odd = scan(a_odd * a_even, a_odd * b_even + b_odd)
    even = a_even * pad(odd[..., :-1, :], (0, 0, 1, 0)) + b_even
    return torch.stack([even, odd], -2).flatten(-3, -2)


def skip(x: Tensor) -> Tensor:
    """Four sequences that cover every position once (section 3.2). (B, C, H, W), H and W even -> (B, 4, C, H W / 4).

    Even rows of even columns and of odd columns, row by row; odd rows of even and of odd columns, column by column.
    """
    turned = x.transpose(2, 3)
    parts = x[..., ::2, ::2], turned[..., ::2, 1::2], x[..., ::2, 1::2], turned[..., 1::2, 1::2]
    return torch.stack([part.flatten(2) for part in parts], 1)


def unskip(parts: Tensor, h: int, w: int) -> Tensor:
    """What `skip` took apart. (B, 4, C, H W / 4) -> (B, C, H, W)."""
    first, second, third, fourth = parts.unbind(1)
    rows, columns = (h // 2, w // 2), (w // 2, h // 2)
    even = torch.stack([first.unflatten(2, rows), third.unflatten(2, rows)], -1)  # (B, C, H / 2, W / 2, column)
    odd = torch.stack([second.unflatten(2, columns), fourth.unflatten(2, columns)], -1).transpose(2, 3)
    return torch.stack([even.flatten(3), odd.flatten(3)], 3).flatten(2, 3)  # rows in turn


class SelectiveScan(nn.Module):
    """Mamba's state space model on the four sequences of `skip` (eq. 5-7). (B, H, W, C) -> the same.

    h_t = exp(Δ_t A) h_(t-1) + Δ_t B_t x_t and y_t = C_t h_t + D x_t, with Δ, B and C from x; then a gate.
    """

    def __init__(self, dim: int, states: int, expand: float) -> None:
        super().__init__()
        inner, self.states, self.rank = int(expand * dim), states, ceil(dim / 16)
        self.in_proj = nn.Linear(dim, 2 * inner, bias=False)
        self.conv = nn.Conv2d(inner, inner, 3, padding=1, groups=inner)
        self.x_proj = nn.Parameter((2 * torch.rand(4, self.rank + 2 * states, inner) - 1) * inner**-0.5)
        self.dt_proj = nn.Parameter((2 * torch.rand(4, inner, self.rank) - 1) * self.rank**-0.5)
        dt = torch.exp(log(1e-3) + (log(1e-1) - log(1e-3)) * torch.rand(4, inner))
        self.dt_bias = nn.Parameter(dt + torch.log(-torch.expm1(-dt)))  # softplus gives dt
        self.a_log = nn.Parameter(torch.arange(1, states + 1).float().log().expand(4, inner, states).clone())
        self.d = nn.Parameter(torch.ones(4, inner))
        self.norm = nn.LayerNorm(inner)
        self.out_proj = nn.Linear(inner, dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        h, w = x.shape[1:3]
        x, gate = self.in_proj(x).chunk(2, -1)
        x = skip(silu(self.conv(x.permute(0, 3, 1, 2))))  # (B, 4, D, L)
        dt, b, c = (self.x_proj @ x).split([self.rank, self.states, self.states], 2)
        dt = softplus(self.dt_proj @ dt + self.dt_bias.unsqueeze(-1))  # (B, 4, D, L)
        b, c = (each.transpose(2, 3).unsqueeze(2) for each in (b, c))  # (B, 4, 1, L, states)
        decay = torch.exp(dt.unsqueeze(-1) * -self.a_log.exp().unsqueeze(2))  # (B, 4, D, L, states)
        state = scan(decay, (dt * x).unsqueeze(-1) * b)
        y = (state * c).sum(-1) + self.d.unsqueeze(-1) * x
        return self.out_proj(self.norm(unskip(y, h, w).permute(0, 2, 3, 1)) * silu(gate))


class ChannelGate(nn.Module):
    """x · sigmoid(MLP(mean(norm(x)))). (B, H, W, C) -> the same."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(dim)
        self.reduce, self.expand = nn.Linear(dim, dim // 8), nn.Linear(dim // 8, dim)

    def forward(self, x: Tensor) -> Tensor:
        return x * self.expand(gelu(self.reduce(self.norm(x).mean((1, 2), keepdim=True)))).sigmoid()


class EvssBlock(nn.Module):
    """x + gate(scan(norm(x))) + gate(conv(norm(x))), one gate for both (section 3.3). (B, H, W, C) -> the same."""

    def __init__(self, dim: int, states: int, expand: float, drop_path: float) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(dim)
        self.scan = SelectiveScan(dim, states, expand)
        depthwise = nn.Conv2d(dim, dim, 3, padding=1, groups=dim)
        self.conv = nn.Sequential(depthwise, nn.BatchNorm2d(dim), nn.GELU(), nn.Conv2d(dim, dim, 1))
        self.gate = ChannelGate(dim)
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor) -> Tensor:
        normal = self.norm(x)
        local = self.conv(normal.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        return x + self.drop_path(self.gate(self.scan(normal)) + self.gate(local))


class InvertedResidual(nn.Module):
    """MobileNetV2's block with squeeze and excitation. (B, C, H, W) -> the same."""

    def __init__(self, dim: int, drop_path: float, expand: int = 4) -> None:
        super().__init__()
        hidden = expand * dim
        self.layers = nn.Sequential(
            nn.Conv2d(dim, hidden, 1, bias=False),
            nn.BatchNorm2d(hidden),
            nn.ReLU(inplace=True),
            nn.Conv2d(hidden, hidden, 3, padding=1, groups=hidden, bias=False),
            nn.BatchNorm2d(hidden),
            nn.ReLU(inplace=True),
            SqueezeExcite(hidden, rd_channels=hidden // 8),
            nn.Conv2d(hidden, dim, 1, bias=False),
            nn.BatchNorm2d(dim),
        )
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.drop_path(self.layers(x))


class PatchMerging(nn.Module):
    """Four neighbours to one token. (B, C, H, W) -> (B, C', H / 2, W / 2)."""

    def __init__(self, dim: int, out: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(4 * dim)
        self.proj = nn.Linear(4 * dim, out, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = (
            x.unflatten(3, (-1, 2)).unflatten(2, (-1, 2)).permute(0, 2, 4, 5, 3, 1).flatten(3)
        )  # (B, h, w, column row C)
        return self.proj(self.norm(x)).permute(0, 3, 1, 2)


class EfficientVMamba(Backbone):
    """Pei et al., "EfficientVMamba", arXiv:2403.09977, section 3. Sides are multiples of 32.

    Args:
        dim: Channels of the first stage, doubled by each of the others.
        scans: Stages from the first that scan; the others are of inverted residuals.
        states: Of each channel's state space model.
    """

    def __init__(
        self,
        *,
        in_chans: int = 3,
        dim: int = 48,
        depths: tuple[int, ...] = (2, 2, 4, 2),
        scans: int = 2,
        states: int = 16,
        expand: float = 2.0,
        drop_path_rate: float = 0.0,
        **kwargs: Any,
    ) -> None:
        dims = [dim * 2**i for i in range(len(depths))]
        stem = nn.Sequential(nn.Conv2d(in_chans, dim, 4, stride=4), LayerNorm2d(dim))
        stages = []
        for i, (c, rates) in enumerate(zip(dims, drop_path_rates(drop_path_rate, depths), strict=True)):
            merge = PatchMerging(c // 2, c) if i else nn.Identity()
            if i < scans:
                stages.append(Stage(merge, [EvssBlock(c, states, expand, rate) for rate in rates]))
            else:
                stages.append(Stage(merge, [InvertedResidual(c, rate) for rate in rates], channels_last=False))
        divisor = 4 * 2 ** max(len(depths) - 1, scans)
        super().__init__(stem=stem, stages=stages, dims=dims, norm=LayerNorm2d(dims[-1]), divisor=divisor, **kwargs)


@register_model
def efficientvmamba_tiny(pretrained: bool = False, **kwargs: Any) -> EfficientVMamba:
    """EfficientVMamba-T."""
    return make(EfficientVMamba, "efficientvmamba_tiny", pretrained, kwargs, dim=48, depths=(2, 2, 4, 2))


@register_model
def efficientvmamba_small(pretrained: bool = False, **kwargs: Any) -> EfficientVMamba:
    """EfficientVMamba-S."""
    return make(EfficientVMamba, "efficientvmamba_small", pretrained, kwargs, dim=64, depths=(2, 2, 4, 2))


@register_model
def efficientvmamba_base(pretrained: bool = False, **kwargs: Any) -> EfficientVMamba:
    """EfficientVMamba-B."""
    return make(EfficientVMamba, "efficientvmamba_base", pretrained, kwargs, dim=96, depths=(2, 2, 9, 2))
