"""Compound scaling: one number makes a network deeper, wider, and its images larger, in fixed proportion.

And a MobileViTv2 of any global factors, where the proportion is what is looked for (`recipe_search.scaling.factors`).
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cache
from types import MappingProxyType
from typing import Any, cast

import timm.models.efficientnet
from timm.models.byobnet import ByoBlockCfg, ByobNet
from timm.models.mobilevit import model_cfgs
from torch import nn

from martlet.core.errors import SourceError, nearest

GROWTH = 2.0
"""Of MACs, from one φ to the next."""


@dataclass(frozen=True, kw_only=True)
class Scale:
    """Multipliers of the layers in each stage, of channels, and of the sides of images."""

    depth: float = 1.0
    width: float = 1.0
    resolution: float = 1.0

    def image_size(self, base: int = 224) -> int:
        """The side of the images, an even number."""
        return 2 * round(base * self.resolution / 2)


@dataclass(frozen=True, kw_only=True)
class Coefficients:
    """α, β and γ: what φ = 1 does to depth, width and resolution. The published ones are EfficientNet's.

    Raises:
        SourceError: one of them is below 1.
    """

    depth: float = 1.2
    width: float = 1.1
    resolution: float = 1.15

    def __post_init__(self) -> None:
        if min(self.depth, self.width, self.resolution) < 1:
            raise SourceError(
                f"coefficients of compound scaling are at least 1, not {self.depth}, {self.width}, {self.resolution}"
            )

    @property
    def growth(self) -> float:
        """α β² γ²: how many times the MACs grow from one φ to the next."""
        return self.depth * self.width**2 * self.resolution**2


def compound_scale(phi: float, coefficients: Coefficients | None = None) -> Scale:
    """Depth α^φ, width β^φ and resolution γ^φ.

    Paper: Tan and Le, EfficientNet, 2019, arXiv 1905.11946, equation 3.
    """
    by = coefficients or Coefficients()
    return Scale(depth=by.depth**phi, width=by.width**phi, resolution=by.resolution**phi)


EFFICIENTNET = MappingProxyType(
    {
        name: Scale(width=width, depth=depth, resolution=size / 224)
        for name, width, depth, size in (
            ("efficientnet_b0", 1.0, 1.0, 224),
            ("efficientnet_b1", 1.0, 1.1, 240),
            ("efficientnet_b2", 1.1, 1.2, 260),
            ("efficientnet_b3", 1.2, 1.4, 300),
            ("efficientnet_b4", 1.4, 1.8, 380),
            ("efficientnet_b5", 1.6, 2.2, 456),
            ("efficientnet_b6", 1.8, 2.6, 528),
            ("efficientnet_b7", 2.0, 3.1, 600),
        )
    }
)
"""As published with the paper, rounded by hand."""


def create_scaled(family: str, scale: Scale, **kwargs: Any) -> nn.Module:
    """A network of one of `families`, random, with channels rounded to multiples of 8 and layers rounded up.

    kwargs: for timm's constructor (`num_classes` …).

    Raises:
        SourceError: no such family.
    """
    if family not in families():
        raise SourceError(f"no {family!r} can be scaled{nearest(family, families())} (known: {', '.join(families())})")
    return families()[family](family, channel_multiplier=scale.width, depth_multiplier=scale.depth, **kwargs)


@cache
def families() -> MappingProxyType[str, Callable[..., nn.Module]]:
    """timm's EfficientNet-like families whose definition takes a multiplier of channels and one of layers."""
    takes = {"channel_multiplier", "depth_multiplier"}
    found = {
        name.removeprefix("_gen_"): function
        for name, function in vars(timm.models.efficientnet).items()
        if name.startswith("_gen_") and takes <= set(inspect.signature(function).parameters)
    }
    return MappingProxyType(found)


def grid(step: float = 0.05, tolerance: float = 0.1, growth: float = GROWTH) -> Iterator[Coefficients]:
    """Every α, β and γ, `step` apart from 1 on, whose growth lies within `tolerance` of the one asked for."""
    most = math.ceil((growth + tolerance - 1) / step)
    values = [round(1 + i * step, 6) for i in range(most + 1)]
    for depth in values:
        for width in values:
            for resolution in values:
                by = Coefficients(depth=depth, width=width, resolution=resolution)
                if abs(by.growth - growth) <= tolerance:
                    yield by


def fit_coefficients(score: Callable[[Scale], float], step: float = 0.05, tolerance: float = 0.1) -> Coefficients:
    """The coefficients of `grid` whose network at φ = 1 scores highest; of equal ones, the first.

    score: trains or otherwise judges the base network at this scale; higher is better.
    Paper: section 3.3, step 1.
    """
    return max(grid(step, tolerance), key=lambda by: score(compound_scale(1, by)))


@dataclass(frozen=True, kw_only=True)
class Factors:
    """The global factors of a MobileViTv2; all 1 at 256 pixels is `mobilevitv2_100`.

    resolution: the side of its images, in pixels. width: multiplier of channels. convolutions, transformers:
    multipliers of the inverted residuals and of the transformer blocks of each stage; one of each stays at least.

    Raises:
        SourceError: one isn't positive, or an image smaller than 32 pixels.
    """

    resolution: int = 256
    width: float = 1.0
    convolutions: float = 1.0
    transformers: float = 1.0

    def __post_init__(self) -> None:
        if min(self.width, self.convolutions, self.transformers) <= 0 or self.resolution < 32:
            raise SourceError(
                f"factors of a MobileViTv2 are positive, and its images have 32 pixels or more, not {self}"
            )

    def smaller(self, share: float = 0.05, pixels: int = 2) -> Iterator[Factors]:
        """Sizes with one factor less: by a share of it, the side also by some pixels, depths by a block somewhere."""
        for side in {round(self.resolution * (1 - share)), self.resolution - pixels}:
            if 32 <= side < self.resolution:
                yield replace(self, resolution=side)
        yield replace(self, width=self.width * (1 - share))
        for name in ("convolutions", "transformers"):
            depths = _depths(self)[name]
            less = [n for n in range(1, max(depths)) if _times(self, name, n / max(depths)) != depths]
            if less:
                yield replace(self, **{name: getattr(self, name) * less[-1] / max(depths)})


def mobilevitv2(factors: Factors, **kwargs: Any) -> ByobNet:
    """A random MobileViTv2; channels are multiples of 8, as the published widths give them.

    kwargs: for timm's constructor (`num_classes` …).

    Paper: Mehta and Rastegari, Separable Self-attention for Mobile Vision Transformers, 2022, arXiv 2206.02680.
    """
    base, depths = model_cfgs["mobilevitv2_100"], _depths(factors)
    convolutions, transformers = iter(depths["convolutions"]), iter(depths["transformers"])

    def wide(channels: int) -> int:
        return max(8, 8 * round(channels * factors.width / 8))

    def scaled(block: ByoBlockCfg) -> ByoBlockCfg:
        if block.type == "bottle":
            return replace(block, c=wide(block.c), d=next(convolutions))
        inside = {**(block.block_kwargs or {}), "transformer_depth": next(transformers)}
        return replace(block, c=wide(block.c), block_kwargs=inside)

    blocks = tuple(tuple(map(scaled, stage)) if isinstance(stage, tuple) else scaled(stage) for stage in base.blocks)
    return ByobNet(replace(base, blocks=blocks, stem_chs=wide(cast(int, base.stem_chs))), **kwargs)


def _depths(factors: Factors) -> dict[str, list[int]]:
    return {name: _times(factors, name) for name in ("convolutions", "transformers")}


def _times(factors: Factors, name: str, more: float = 1.0) -> list[int]:
    """Blocks of a kind in each stage of `mobilevitv2_100`, times a factor, rounded, and one at least."""
    flat = [
        b for stage in model_cfgs["mobilevitv2_100"].blocks for b in (stage if isinstance(stage, tuple) else [stage])
    ]
    counts = {
        "convolutions": [block.d for block in flat if block.type == "bottle"],
        "transformers": [(block.block_kwargs or {})["transformer_depth"] for block in flat if block.type != "bottle"],
    }[name]
    return [max(1, round(count * getattr(factors, name) * more)) for count in counts]
