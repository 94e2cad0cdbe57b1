"""MedViTV2: attention to a token's neighbourhood, then to all, with Kolmogorov-Arnold layers in the place of MLPs."""

from __future__ import annotations

from functools import cache
from typing import Any, NamedTuple

import torch
from timm.layers import DropPath, SqueezeExcite, make_divisible
from timm.models import generate_default_cfgs, register_model
from torch import Tensor, nn
from torch.nn.functional import pad, scaled_dot_product_attention

from martlet.core.errors import SourceError
from martlet.models.backbone import Backbone, Stage, cfg, drop_path_rates, make, merge_heads, split_heads
from martlet.models.papers.paper import Paper, Stated

__all__ = ["MedViTV2"]

TINY = {
    "params": "10.7 M here and in the authors' code, which makes a further 1.0 M that it never uses",
    "macs": "the paper counts multiplications and additions, those of neighbourhood attention not at all",
}

PAPER = Paper(
    title="Medical Image Classification with KAN-Integrated Transformers and Dilated Neighborhood Attention",
    authors="Manzari et al.",
    year=2025,
    arxiv="2502.13693",
    code="https://github.com/Omid-Nejati/MedViTV2",
    license="MIT",
    models={
        "medvit_v2_tiny": Stated(params="12.3M", macs="5.1G", differs=TINY),
        "medvit_v2_small": Stated(params=None, macs=None),
        "medvit_v2_base": Stated(params=None, macs=None),
        "medvit_v2_large": Stated(params=None, macs=None),
    },
    differs="The authors' code mixes channels with places by a reshape, before neighbourhood attention and before the "
    "Kolmogorov-Arnold layers; here both work on tokens, as the paper says.",
)

default_cfgs = generate_default_cfgs({name: cfg(first_conv="stem.0") for name in PAPER.models})

HEAD_DIM = 32


class NeighborhoodAttention(nn.Module):
    """Every token attends to the `kernel` × `kernel` nearest, `dilation` apart, with a bias of their distance.

    At the border the neighbourhood moves inwards, so that it is always full. (B, H, W, C) -> the same.

    Raises:
        SourceError: images too small for it.
    """

    def __init__(self, dim: int, num_heads: int, kernel: int = 7, dilation: int = 1) -> None:
        super().__init__()
        self.num_heads, self.kernel, self.dilation = num_heads, kernel, dilation
        self.qkv = nn.Linear(dim, 3 * dim)
        self.bias = nn.Parameter(0.02 * torch.randn(num_heads, 2 * kernel - 1, 2 * kernel - 1))
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        b, h, w, c = x.shape
        if min(h, w) < self.kernel * self.dilation:
            raise SourceError(
                f"a neighbourhood of {self.kernel} × {self.kernel}, {self.dilation} apart, is larger than the feature "
                f"map of {h} × {w}; give larger images"
            )
        of = ([torch.tensor(each, device=x.device) for each in tiles(n, self.kernel, self.dilation)] for n in (h, w))
        rows, columns = (Axis(*each) for each in of)
        q, *kv = self.qkv(x).chunk(3, -1)
        q, k, v = tiled(q, rows.places, columns.places), *(tiled(one, rows.seen, columns.seen) for one in kv)
        q, k, v = (split_heads(one, self.num_heads).unflatten(0, (b, -1)) for one in (q, k, v))
        scores = q * (c // self.num_heads) ** -0.5 @ k.transpose(-2, -1) + self.position_bias(rows, columns)
        out = merge_heads((scores.softmax(-1) @ v).flatten(0, 1))  # (B n m, s t, C)
        (n, s), (m, t) = rows.places.shape, columns.places.shape
        out = out.reshape(b, n, m, s, t, c).transpose(2, 3).reshape(b, h, w, c)
        if self.dilation > 1:
            out = out.index_select(1, rows.places.flatten().argsort())
            out = out.index_select(2, columns.places.flatten().argsort())
        return self.proj(out)

    def position_bias(self, rows: Axis, columns: Axis) -> Tensor:
        """Of each pair in a tile, -∞ where one doesn't see the other: (n m, heads, s t, places seen)."""
        bias = pad(self.bias, (0, 1, 0, 1), value=float("-inf"))
        dy, dx = rows.distance[:, None, :, None, :, None], columns.distance[None, :, None, :, None, :]
        return bias[:, dy, dx].flatten(5).flatten(3, 4).flatten(1, 2).transpose(0, 1)


class Axis(NamedTuple):
    """What `tiles` returns, as tensors."""

    places: Tensor
    seen: Tensor
    distance: Tensor


def tiled(x: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """Tokens of every tile: (B, H, W, C), (n, s) and (m, t) -> (B n m, s t, C)."""
    (n, s), (m, t) = rows.shape, columns.shape
    x = x.index_select(1, rows.flatten()).index_select(2, columns.flatten())  # (B, n s, m t, C)
    return x.unflatten(2, (m, t)).unflatten(1, (n, s)).transpose(2, 3).reshape(-1, s * t, x.shape[-1])


@cache
def tiles(
    side: int, kernel: int, dilation: int, most: int = 8
) -> tuple[list[list[int]], list[list[int]], list[list[list[int]]]]:
    """Along one axis, places in tiles of `most` or the next fewer that divides the side, and what each tile attends to.

    Neighbouring places attend to nearly the same, so that a tile copies each key a few times, not `kernel` times; what
    only others of its tile attend to is masked.

    Returns places (n, t), phase after phase; seen (n, M), all that any of the tile attends to, the last repeated to
    fill it; distance (n, t, M) in dilations, from 0 to 2 (kernel - 1), and one more where a place doesn't attend.
    """
    size = max(size for size in range(1, most + 1) if side % size == 0)
    order = sorted(range(side), key=lambda place: (place % dilation, place))
    places = [order[i : i + size] for i in range(0, side, size)]
    near = neighbors(side, kernel, dilation)
    union = [sorted({other for place in tile for other in near[place]}) for tile in places]
    longest = max(len(one) for one in union)
    seen = [one + one[-1:] * (longest - len(one)) for one in union]
    distance = [
        [
            [
                (one[i] - place) // dilation + kernel - 1 if i < len(own) and one[i] in near[place] else 2 * kernel - 1
                for i in range(longest)
            ]
            for place in tile
        ]
        for tile, one, own in zip(places, seen, union, strict=True)
    ]
    return places, seen, distance


def neighbors(side: int, kernel: int, dilation: int) -> list[list[int]]:
    """Along one axis, the places that each place attends to: those of its own phase nearest to it. (side, kernel)."""
    near = []
    for place in range(side):
        index, phase = divmod(place, dilation)
        last = (side - 1 - phase) // dilation + 1 - kernel  # where the last full neighbourhood of the phase starts
        start = min(max(index - kernel // 2, 0), last)
        near.append([phase + dilation * (start + i) for i in range(kernel)])
    return near


class KanLayer(nn.Module):
    """A Linear of `grids` functions of each normalized channel: 1 - tanh²((x - g) / 0.33), g from -2 to 2.

    (…, C) -> (…, C').
    """

    grid: Tensor

    def __init__(self, in_features: int, out_features: int, grids: int = 8) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(in_features)
        self.linear = nn.Linear(grids * in_features, out_features, bias=False)
        self.register_buffer("grid", torch.linspace(-2, 2, grids), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear((1 - ((self.norm(x).unsqueeze(-1) - self.grid) / 0.33).tanh().square()).flatten(-2))


class TokenEmbed(nn.Module):
    """Mean of 2 × 2 if strided, 1 × 1 convolution and norm; nothing where nothing changes. (B, C, H, W) -> alike."""

    def __init__(self, dim: int, out: int, stride: int = 1) -> None:
        super().__init__()
        pool = [nn.AvgPool2d(2)] if stride == 2 else []
        conv = [nn.Conv2d(dim, out, 1, bias=False), nn.BatchNorm2d(out)] if pool or dim != out else []
        self.layers = nn.Sequential(*pool, *conv)

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


class LocalBlock(nn.Module):
    """Local feature perception: neighbourhood attention, then an inverted bottleneck with squeeze and excitation.

    (B, C, H, W) -> (B, C', H / stride, W / stride).
    """

    def __init__(self, dim: int, out: int, stride: int, kernel: int, dilation: int, drop_path: float) -> None:
        super().__init__()
        hidden = 3 * out
        self.embed = TokenEmbed(dim, out, stride)
        self.norm1 = nn.BatchNorm2d(out)
        self.attention = NeighborhoodAttention(out, out // HEAD_DIM, dilation=dilation)
        self.norm2 = nn.BatchNorm2d(out)
        self.feed_forward = nn.Sequential(
            nn.Conv2d(out, hidden, 1, bias=False),
            nn.BatchNorm2d(hidden),
            nn.Hardswish(),
            nn.Conv2d(hidden, hidden, kernel, padding=kernel // 2, groups=hidden, bias=False),
            nn.BatchNorm2d(hidden),
            nn.Hardswish(),
            SqueezeExcite(hidden, rd_channels=3, gate_layer="hard_sigmoid"),
            nn.Conv2d(hidden, out, 1, bias=False),
            nn.BatchNorm2d(out),
        )
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        x = x + self.drop_path(self.attention(self.norm1(x).permute(0, 2, 3, 1)).permute(0, 3, 1, 2))
        normal = self.norm2(x)
        return x + normal + self.feed_forward(normal)


class PooledAttention(nn.Module):
    """Self-attention whose keys and values are means of `pool` tokens that follow each other. (B, N, C) -> the same."""

    def __init__(self, dim: int, pool: int) -> None:
        super().__init__()
        self.num_heads, self.pool = dim // HEAD_DIM, pool
        self.q = nn.Linear(dim, dim)
        self.kv = nn.Linear(dim, 2 * dim)
        self.norm = nn.BatchNorm1d(dim) if pool > 1 else nn.Identity()
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        mean = x.unflatten(1, (-1, self.pool)).mean(2) if self.pool > 1 else x
        mean = self.norm(mean.transpose(1, 2)).transpose(1, 2)
        q, k, v = (split_heads(one, self.num_heads) for one in (self.q(x), *self.kv(mean).chunk(2, -1)))
        return self.proj(merge_heads(scaled_dot_product_attention(q, k, v)))


class GlobalBlock(nn.Module):
    """Global feature perception: attention in three quarters of the channels, whose projection convolutions work on
    further; all go through two Kolmogorov-Arnold layers.

    (B, C, H, W) -> (B, C', H / stride, W / stride).
    """

    def __init__(self, dim: int, out: int, stride: int, pool: int, drop_path: float) -> None:
        super().__init__()
        attended = make_divisible(0.75 * out, HEAD_DIM)
        local = out - attended
        self.embed = TokenEmbed(dim, attended, stride)
        self.norm1 = nn.BatchNorm2d(attended)
        self.attention = PooledAttention(attended, pool)
        self.project = TokenEmbed(attended, local)
        self.convolution = nn.Sequential(
            nn.Conv2d(local, local, 3, padding=1, groups=local // HEAD_DIM, bias=False),
            nn.BatchNorm2d(local),
            nn.ReLU(inplace=True),
            nn.Conv2d(local, local, 1, bias=False),
        )
        self.norm2 = nn.BatchNorm2d(out)
        self.kan = nn.Sequential(KanLayer(out, 2 * out), KanLayer(2 * out, out))
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        tokens = self.norm1(x).flatten(2).transpose(1, 2)
        x = x + self.drop_path(self.attention(tokens)).transpose(1, 2).unflatten(2, x.shape[2:])
        local = self.project(x)
        x = torch.cat([x, local + self.drop_path(self.convolution(local))], 1)
        return x + self.drop_path(self.kan(self.norm2(x).permute(0, 2, 3, 1)).permute(0, 3, 1, 2))


class MedViTV2(Backbone):
    """Manzari et al., "MedViTV2", arXiv:2502.13693. Sides: multiples of 32, 128 at least.

    Args:
        pattern: For each stage the kinds of its blocks, repeated: local or global.
        dilations: Of the neighbourhoods, for each stage.
        pools: Tokens along a side whose mean is a key of the global blocks, for each stage.
    """

    def __init__(
        self,
        *,
        in_chans: int = 3,
        dims: tuple[int, ...] = (64, 128, 192, 384),
        depths: tuple[int, ...] = (2, 2, 6, 1),
        pattern: tuple[str, ...] = ("L", "LG", "LLG", "G"),
        dilations: tuple[int, ...] = (1, 1, 1, 1),
        pools: tuple[int, ...] = (8, 4, 2, 1),
        drop_path_rate: float = 0.0,
        **kwargs: Any,
    ) -> None:
        stem: list[nn.Module] = []
        widths = (in_chans, 64, 32, 64, 64)
        for before, after, stride in zip(widths[:-1], widths[1:], (2, 1, 1, 2), strict=True):
            conv = nn.Conv2d(before, after, 3, stride=stride, padding=1, bias=False)
            stem += [conv, nn.BatchNorm2d(after), nn.ReLU(inplace=True)]
        stages, before = [], widths[-1]
        for i, rates in enumerate(drop_path_rates(drop_path_rate, depths)):
            blocks: list[nn.Module] = []
            for j, rate in enumerate(rates):
                stride = 2 if i and not j else 1
                if pattern[i][j % len(pattern[i])] == "L":
                    blocks.append(LocalBlock(before, dims[i], stride, 3 if i else 7, dilations[i], rate))
                else:
                    blocks.append(GlobalBlock(before, dims[i], stride, pools[i] ** 2, rate))
                before = dims[i]
            stages.append(Stage(nn.Identity(), blocks, channels_last=False))
        norm = nn.BatchNorm2d(dims[-1])
        super().__init__(stem=nn.Sequential(*stem), stages=stages, dims=dims, norm=norm, **kwargs)


@register_model
def medvit_v2_tiny(pretrained: bool = False, **kwargs: Any) -> MedViTV2:
    """MedViTV2-T."""
    return make(MedViTV2, "medvit_v2_tiny", pretrained, kwargs, depths=(2, 2, 6, 1))


@register_model
def medvit_v2_small(pretrained: bool = False, **kwargs: Any) -> MedViTV2:
    """MedViTV2-S."""
    return make(MedViTV2, "medvit_v2_small", pretrained, kwargs, dims=(64, 128, 256, 512), depths=(2, 2, 6, 2))


@register_model
def medvit_v2_base(pretrained: bool = False, **kwargs: Any) -> MedViTV2:
    """MedViTV2-B."""
    return make(MedViTV2, "medvit_v2_base", pretrained, kwargs, dims=(96, 192, 384, 768), depths=(2, 2, 6, 2))


@register_model
def medvit_v2_large(pretrained: bool = False, **kwargs: Any) -> MedViTV2:
    """MedViTV2-L."""
    return make(MedViTV2, "medvit_v2_large", pretrained, kwargs, dims=(96, 256, 512, 1024), depths=(2, 2, 6, 2))
