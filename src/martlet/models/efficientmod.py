"""EfficientMod: a wide Linear's output, modulated by a narrow depthwise convolution's."""

from __future__ import annotations

from typing import Any

from timm.layers import DropPath, LayerNorm2d, LayerScale, Mlp
from timm.models import generate_default_cfgs, register_model
from torch import Tensor, nn
from torch.nn.functional import gelu

from martlet.models.backbone import Backbone, Block, SelfAttention, Stage, cfg, drop_path_rates, make
from martlet.models.papers.paper import Paper, Stated

__all__ = ["EfficientMod"]

PAPER = Paper(
    title="Efficient Modulation for Vision Networks",
    authors="Ma et al.",
    year=2024,
    arxiv="2403.19963",
    code="https://github.com/ma-xu/EfficientMod",
    license="Apache-2.0",
    models={
        "efficientmod_xxs": Stated(params="4.7M", macs="0.6G"),
        "efficientmod_xs": Stated(params="6.6M", macs="0.8G"),
        "efficientmod_s": Stated(params="12.9M", macs="1.4G"),
        "efficientmod_s_conv": Stated(params="12.9M", macs="1.5G", top1_pct=80.5),
    },
)

default_cfgs = generate_default_cfgs({name: cfg() for name in PAPER.models})


HEADS = 8  # of the attention blocks, at least 32 wide each


class Modulation(nn.Module):
    """x + scale · fc2(fc1(norm(x)) ∘ context(norm(x))) (eq. 6-8). (B, H, W, C) -> the same.

    The context is g(GELU(depthwise(f(x)))), C wide, and multiplies each of the `ratio` groups of C channels that fc1
    gives. A ratio of 1 has no activation after fc1.
    """

    def __init__(self, dim: int, ratio: int, kernel: int, drop_path: float) -> None:
        super().__init__()
        self.ratio = ratio
        self.norm = nn.LayerNorm(dim)
        self.f = nn.Linear(dim, dim)
        self.context = nn.Conv2d(dim, dim, kernel, padding=kernel // 2, groups=dim)
        self.g = nn.Linear(dim, dim)
        self.fc1 = nn.Linear(dim, ratio * dim)
        self.fc2 = nn.Linear(ratio * dim, dim)
        self.scale = LayerScale(dim, 1e-4)
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor) -> Tensor:
        normal = self.norm(x)
        context = self.context(self.f(normal).permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        context = self.g(gelu(context))
        value = self.fc1(normal) if self.ratio == 1 else gelu(self.fc1(normal))  # (B, H, W, ratio C)
        value = (value.unflatten(-1, (self.ratio, -1)) * context.unsqueeze(-2)).flatten(-2)
        return x + self.drop_path(self.scale(self.fc2(value)))


class EfficientMod(Backbone):
    """Ma et al., "Efficient Modulation for Vision Networks", arXiv:2403.19963, section 3. Images of any size.

    Args:
        depths: Modulation blocks of each stage.
        attention: Attention blocks after them.
        ratios: Expansions that the modulation blocks take in turn.
        attention_ratios: Expansion of the attention blocks' MLP, for each stage.
    """

    def __init__(
        self,
        *,
        in_chans: int = 3,
        dims: tuple[int, ...] = (32, 64, 128, 256),
        depths: tuple[int, ...] = (2, 2, 6, 2),
        attention: tuple[int, ...] = (0, 0, 1, 2),
        ratios: tuple[int, ...] = (1, 6),
        attention_ratios: tuple[float, ...] = (4, 4, 4, 4),
        kernel: int = 7,
        drop_path_rate: float = 0.0,
        **kwargs: Any,
    ) -> None:
        stem = nn.Sequential(nn.Conv2d(in_chans, dims[0], 7, stride=4, padding=3), LayerNorm2d(dims[0]))
        rates = drop_path_rates(drop_path_rate, [a + b for a, b in zip(depths, attention, strict=True)])
        stages = []
        for i, c in enumerate(dims):
            merge = nn.Sequential(nn.Conv2d(dims[i - 1], c, 3, stride=2, padding=1), LayerNorm2d(c))
            blocks: list[nn.Module] = [
                Modulation(c, ratios[j % len(ratios)], kernel, rates[i][j]) for j in range(depths[i])
            ]
            for rate in rates[i][depths[i] :]:
                mixer = SelfAttention(c, HEADS, qkv_bias=False, inner=HEADS * max(c // HEADS, 32))
                blocks.append(Block(c, mixer, Mlp(c, int(attention_ratios[i] * c)), rate))
            stages.append(Stage(merge if i else nn.Identity(), blocks))
        super().__init__(stem=stem, stages=stages, dims=dims, norm=LayerNorm2d(dims[-1]), divisor=1, **kwargs)


@register_model
def efficientmod_xxs(pretrained: bool = False, **kwargs: Any) -> EfficientMod:
    """EfficientMod-xxs."""
    return make(EfficientMod, "efficientmod_xxs", pretrained, kwargs, depths=(2, 2, 6, 2))


@register_model
def efficientmod_xs(pretrained: bool = False, **kwargs: Any) -> EfficientMod:
    """EfficientMod-xs."""
    dims: dict[str, Any] = {"dims": (32, 64, 144, 288), "depths": (3, 3, 4, 2)}
    return make(EfficientMod, "efficientmod_xs", pretrained, kwargs, attention=(0, 0, 3, 3), ratios=(1, 4), **dims)


@register_model
def efficientmod_s(pretrained: bool = False, **kwargs: Any) -> EfficientMod:
    """EfficientMod-s."""
    dims: dict[str, Any] = {"dims": (32, 64, 144, 312), "depths": (4, 4, 8, 4), "attention_ratios": (4, 4, 4, 5)}
    return make(EfficientMod, "efficientmod_s", pretrained, kwargs, attention=(0, 0, 4, 4), **dims)


@register_model
def efficientmod_s_conv(pretrained: bool = False, **kwargs: Any) -> EfficientMod:
    """EfficientMod-s-Conv: no attention."""
    dims: dict[str, Any] = {"dims": (40, 80, 160, 344), "depths": (4, 4, 12, 8)}
    return make(EfficientMod, "efficientmod_s_conv", pretrained, kwargs, attention=(0, 0, 0, 0), **dims)
