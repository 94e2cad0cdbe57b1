"""Compound scaling: one number makes a network deeper, wider, and its images larger, in fixed proportion."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from types import MappingProxyType
from typing import Any

import timm.models.efficientnet
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
