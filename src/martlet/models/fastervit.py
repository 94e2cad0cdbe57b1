"""FasterViT: windows that talk through a few carrier tokens each, which attend to all carriers first."""

from __future__ import annotations

from typing import Any

import torch
from timm.layers import DropPath, LayerNorm2d, LayerScale, Mlp
from timm.models import generate_default_cfgs, register_model
from timm.models.swin_transformer import window_partition, window_reverse
from torch import Tensor, nn
from torch.nn.functional import avg_pool2d, interpolate, pad, scaled_dot_product_attention

from martlet.models.backbone import Backbone, Block, Stage, cfg, drop_path_rates, make, merge_heads, pair, split_heads
from martlet.models.papers.paper import Paper, Stated

__all__ = ["FasterViT"]

FOUR = {
    "params": "365.6 M here, and in the authors' code of that name",
    "macs": "42.7 G here; without carriers it has the 271.9 M parameters that the authors print for such a model",
}
FIVE = {"params": "957.5 M: two digits of the authors' table seem to have changed places"}

PAPER = Paper(
    title="FasterViT: Fast Vision Transformers with Hierarchical Attention",
    authors="Hatamizadeh et al.",
    year=2024,
    arxiv="2306.06189",
    code="https://github.com/NVlabs/FasterViT",
    license="NVIDIA Source Code License-NC",
    models={
        "fastervit_0": Stated(params="31.4M", macs="3.3G", top1_pct=82.1),
        "fastervit_1": Stated(params="53.4M", macs="5.3G", top1_pct=83.2),
        "fastervit_2": Stated(params="75.9M", macs="8.7G", top1_pct=84.2),
        "fastervit_3": Stated(params="159.5M", macs="18.2G", top1_pct=84.9),
        "fastervit_4": Stated(params="424.6M", macs="36.6G", top1_pct=85.4, differs=FOUR),
        "fastervit_5": Stated(params="975.5M", macs="113.0G", top1_pct=85.6, differs=FIVE),
        "fastervit_6": Stated(params="1360.0M", macs="142.0G", top1_pct=85.8),
    },
)

default_cfgs = generate_default_cfgs({name: cfg(crop_pct=0.875) for name in PAPER.models})

Size = tuple[int, int]


class PositionBias(nn.Module):
    """Swin v2's bias of the scores: 16 sigmoid(MLP) of log-spaced distances. -> (heads, C + N, C + N).

    carriers: C, tokens before the N of the window; nothing is added to theirs.
    """

    distances: Tensor
    places: Tensor

    def __init__(self, num_heads: int, size: Size, carriers: int = 0) -> None:
        super().__init__()
        self.carriers = carriers
        h, w = size
        self.mlp = nn.Sequential(nn.Linear(2, 512), nn.ReLU(), nn.Linear(512, num_heads, bias=False))
        away = [8 * torch.arange(1 - side, side).float() / max(side - 1, 1) for side in size]  # in [-8, 8]
        spaced = [one.sign() * (one.abs() + 1).log2() / 3 for one in away]
        table = torch.stack(torch.meshgrid(*spaced, indexing="ij"), -1).flatten(0, 1)
        rows, columns = (place.flatten() for place in torch.meshgrid(torch.arange(h), torch.arange(w), indexing="ij"))
        dy, dx = rows[:, None] - rows + h - 1, columns[:, None] - columns + w - 1
        self.register_buffer("distances", table, persistent=False)  # ((2 h - 1) (2 w - 1), 2)
        self.register_buffer("places", dy * (2 * w - 1) + dx, persistent=False)  # (N, N)

    def forward(self) -> Tensor:
        bias = 16 * self.mlp(self.distances)[self.places].permute(2, 0, 1).sigmoid()
        return pad(bias, (self.carriers, 0, self.carriers, 0))


class Position(nn.Module):
    """Adds an MLP of each token's place, from -1 to 1 along both sides. (B, N, C) -> the same."""

    places: Tensor

    def __init__(self, dim: int, size: Size) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(2, 512), nn.ReLU(), nn.Linear(512, dim, bias=False))
        lines = [(torch.arange(side).float() - side // 2) / max(side // 2, 1) for side in size]
        self.register_buffer("places", torch.stack(torch.meshgrid(*lines, indexing="ij"), -1).flatten(0, 1), False)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.mlp(self.places)


class BiasedAttention(nn.Module):
    """Self-attention with a bias of position. (B, N, C) -> the same."""

    def __init__(self, dim: int, num_heads: int, size: Size, carriers: int = 0) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)
        self.bias = PositionBias(num_heads, size, carriers)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (split_heads(one, self.num_heads) for one in self.qkv(x).chunk(3, -1))
        return self.proj(merge_heads(scaled_dot_product_attention(q, k, v, attn_mask=self.bias().unsqueeze(0))))


class HierarchicalBlock(nn.Module):
    """Hierarchical attention (eq. 3-6): carriers attend to all carriers, then windows to themselves and their own.

    Args:
        window: H and W of a window.
        carriers: H and W of the grid of all carrier tokens; None for windows that don't talk.
        each: Carriers of a window, along a side.
        layer_scale: What learned scales of attention and MLP start as; None for no scales.
        propagate: The carriers are added to the tokens that they stand for, scaled as their attention is.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        window: Size,
        carriers: Size | None,
        each: int,
        mlp_ratio: float,
        drop_path: float,
        layer_scale: float | None = None,
        propagate: bool = False,
    ) -> None:
        super().__init__()
        self.window, self.carriers, self.each = window, carriers, each
        self.propagate = propagate and carriers is not None

        def scaled(part: nn.Module) -> nn.Module:
            return part if layer_scale is None else nn.Sequential(part, LayerScale(dim, layer_scale))

        def block(size: Size, extra: int = 0) -> Block:
            attention = BiasedAttention(dim, num_heads, size, extra)
            return Block(dim, scaled(attention), scaled(Mlp(dim, int(mlp_ratio * dim))), drop_path)

        self.position = Position(dim, window)
        self.local = block(window, each * each if carriers else 0)
        self.carrier_position = Position(dim, carriers) if carriers else None
        self.globally = block(carriers) if carriers else None

    def forward(self, x: Tensor, carriers: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """(B windows, N, C), and (B, all carriers, C) in raster order or None -> the same."""
        x = self.position(x)
        if carriers is None or self.carriers is None or self.carrier_position is None or self.globally is None:
            return self.local(x), None
        size = (self.each, self.each)
        talked: Tensor = self.globally(self.carrier_position(carriers))
        own = window_partition(talked.unflatten(1, self.carriers), size).flatten(1, 2)  # (B windows, each², C)
        own, x = self.local(torch.cat([own, x], 1)).split([own.shape[1], x.shape[1]], 1)
        if self.propagate:
            x = x + self.spread(own)
        return x, window_reverse(own.unflatten(1, size), size, *self.carriers).flatten(1, 2)

    def spread(self, carriers: Tensor) -> Tensor:
        """A window's carriers (B windows, each², C) at the places of its tokens: (B windows, N, C)."""
        image = carriers.transpose(1, 2).unflatten(2, (self.each, self.each))
        at_tokens = interpolate(image, self.window, mode="nearest").flatten(2).transpose(1, 2)
        mixer = self.globally.mixer if self.globally else None
        return mixer[1](at_tokens) if isinstance(mixer, nn.Sequential) else at_tokens


class HierarchicalStage(nn.Module):
    """Downsampling, then blocks on windows, carriers pooled from the image: (B, C, H, W) -> (B, C', H', W')."""

    def __init__(
        self, downsample: nn.Module, dim: int, size: Size, window: int, each: int, hat: bool, **block: Any
    ) -> None:
        super().__init__()
        self.downsample, self.window = downsample, (window, window)
        grid = (each * size[0] // window, each * size[1] // window)
        carriers = grid if hat and size != self.window else None
        if carriers:
            self.init_carriers = nn.Conv2d(dim, dim, 3, padding=1, groups=dim)
            self.stride = (size[0] // grid[0], size[1] // grid[1])
            self.kernel = tuple(side - (n - 1) * s for side, n, s in zip(size, grid, self.stride, strict=True))
        rates, propagate = block.pop("rates"), block.pop("propagate", False)
        block |= {"window": self.window, "carriers": carriers, "each": each}
        self.blocks = nn.ModuleList(
            HierarchicalBlock(dim, drop_path=rate, propagate=propagate and i == len(rates) - 1, **block)
            for i, rate in enumerate(rates)
        )
        self.has_carriers = carriers is not None

    def forward(self, x: Tensor) -> Tensor:
        x, carriers = self.downsample(x), None
        h, w = x.shape[2:]
        if self.has_carriers:
            carriers = avg_pool2d(self.init_carriers(x), self.kernel, self.stride).flatten(2).transpose(1, 2)
        x = window_partition(x.permute(0, 2, 3, 1), self.window).flatten(1, 2)
        for block in self.blocks:
            x, carriers = block(x, carriers)
        return window_reverse(x.unflatten(1, self.window), self.window, h, w).permute(0, 3, 1, 2)


class ConvBlock(nn.Module):
    """x + BN(conv(GELU(BN(conv(x))))) (eq. 1). (B, C, H, W) -> the same."""

    def __init__(self, dim: int, drop_path: float) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(dim, dim, 3, padding=1),
            nn.BatchNorm2d(dim),
            nn.GELU(),
            nn.Conv2d(dim, dim, 3, padding=1),
            nn.BatchNorm2d(dim),
        )
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.drop_path(self.layers(x))


class FasterViT(Backbone):
    """Hatamizadeh et al., "FasterViT", arXiv:2306.06189, section 3.

    Sides are multiples of 32 · `window`, as many as `img_size` says.

    Args:
        stem_dim: Channels of the stem's first convolution.
        dim: Channels of the first stage, doubled by each of the others.
        convs: Stages from the first that are of convolutions.
        hat: For each stage, whether its windows have carriers; one window alone has none.
        carriers: Of each window, along a side.
        layer_scale, propagate: As HierarchicalBlock's, `propagate` for the last of a stage.
    """

    def __init__(
        self,
        *,
        in_chans: int = 3,
        img_size: int | Size = 224,
        stem_dim: int = 64,
        dim: int = 64,
        depths: tuple[int, ...] = (2, 3, 6, 5),
        num_heads: tuple[int, ...] = (2, 4, 8, 16),
        convs: int = 2,
        hat: tuple[bool, ...] = (False, False, True, False),
        window: int = 7,
        carriers: int = 2,
        mlp_ratio: float = 4.0,
        layer_scale: float | None = None,
        propagate: bool = False,
        drop_path_rate: float = 0.0,
        **kwargs: Any,
    ) -> None:
        h, w = pair(img_size)
        stem: list[nn.Module] = []
        for before, after in ((in_chans, stem_dim), (stem_dim, dim)):
            conv = nn.Conv2d(before, after, 3, stride=2, padding=1, bias=False)
            stem += [conv, nn.BatchNorm2d(after, eps=1e-4), nn.ReLU(inplace=True)]
        dims = [dim * 2**i for i in range(len(depths))]
        stages = []
        for i, rates in enumerate(drop_path_rates(drop_path_rate, depths)):
            c, size = dims[i], (h // (4 * 2**i), w // (4 * 2**i))
            merge = nn.Sequential(LayerNorm2d(c // 2), nn.Conv2d(c // 2, c, 3, stride=2, padding=1, bias=False))
            downsample = merge if i else nn.Identity()
            if i < convs:
                blocks = [ConvBlock(c, rate) for rate in rates]
                stages.append(Stage(downsample, blocks, channels_last=False))
            else:
                block = {"num_heads": num_heads[i], "mlp_ratio": mlp_ratio, "rates": rates}
                block |= {"layer_scale": layer_scale, "propagate": propagate}
                stages.append(HierarchicalStage(downsample, c, size, window, carriers, hat[i], **block))
        divisor = 4 * 2 ** (len(depths) - 1) * window
        norm = nn.BatchNorm2d(dims[-1])
        super().__init__(
            stem=nn.Sequential(*stem),
            stages=stages,
            dims=dims,
            norm=norm,
            divisor=divisor,
            img_size=img_size,
            **kwargs,
        )


@register_model
def fastervit_0(pretrained: bool = False, **kwargs: Any) -> FasterViT:
    """FasterViT-0."""
    return make(FasterViT, "fastervit_0", pretrained, kwargs, depths=(2, 3, 6, 5))


@register_model
def fastervit_1(pretrained: bool = False, **kwargs: Any) -> FasterViT:
    """FasterViT-1."""
    return make(FasterViT, "fastervit_1", pretrained, kwargs, stem_dim=32, dim=80, depths=(1, 3, 8, 5))


@register_model
def fastervit_2(pretrained: bool = False, **kwargs: Any) -> FasterViT:
    """FasterViT-2."""
    return make(FasterViT, "fastervit_2", pretrained, kwargs, dim=96, depths=(3, 3, 8, 5))


def _large(name: str, pretrained: bool, kwargs: dict[str, Any], **dims: Any) -> FasterViT:
    """Those with scales and propagated carriers."""
    depths = dims.pop("depths", (3, 3, 12, 5))
    return make(FasterViT, name, pretrained, kwargs, depths=depths, layer_scale=1e-5, propagate=True, **dims)


@register_model
def fastervit_3(pretrained: bool = False, **kwargs: Any) -> FasterViT:
    """FasterViT-3."""
    return _large("fastervit_3", pretrained, kwargs, dim=128)


@register_model
def fastervit_4(pretrained: bool = False, **kwargs: Any) -> FasterViT:
    """FasterViT-4."""
    return _large("fastervit_4", pretrained, kwargs, dim=196, num_heads=(4, 8, 16, 32))


@register_model
def fastervit_5(pretrained: bool = False, **kwargs: Any) -> FasterViT:
    """FasterViT-5."""
    return _large("fastervit_5", pretrained, kwargs, dim=320, num_heads=(4, 8, 16, 32))


@register_model
def fastervit_6(pretrained: bool = False, **kwargs: Any) -> FasterViT:
    """FasterViT-6."""
    return _large("fastervit_6", pretrained, kwargs, dim=320, depths=(3, 3, 16, 8), num_heads=(4, 8, 16, 32))
