"""One grid for all channels of a normalization's output where each channel wants its own."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from martlet.functional.quantize.smoothing import smoothquant_factors


@dataclass(frozen=True)
class ChannelChange:
    """X' = (X + offset) / ratio for the channels (C) between a normalization and the linear layers that read it.

    Moved into both, the float model doesn't change. Linear layers that share the normalization all take `into_linear`.
    """

    ratio: Float[Tensor, " c"]
    offset: Float[Tensor, " c"]

    def into_norm(
        self, weight: Float[Tensor, " c"], bias: Float[Tensor, " c"] | None
    ) -> tuple[Float[Tensor, " c"], Float[Tensor, " c"]]:
        """Weight γ / ratio and bias (β + offset) / ratio of the normalization, whose bias may be missing."""
        moved = self.offset if bias is None else bias + self.offset
        return weight / self.ratio, moved / self.ratio

    def into_linear(
        self, weight: Float[Tensor, "o c"], bias: Float[Tensor, " o"] | None
    ) -> tuple[Float[Tensor, "o c"], Float[Tensor, " o"]]:
        """Weight ratio W and bias b - W offset of a linear layer, whose bias may be missing."""
        moved = -(weight @ self.offset)
        return weight * self.ratio, moved if bias is None else bias + moved


@dataclass(frozen=True)
class ScaleReparameterization(ChannelChange):
    """The change with which channels whose grids differ all take the one grid (scale, zero_point).

    Rounding X' to that grid gives the codes that rounding each channel of X to its own grid gives.

    Source: Li et al., RepQ-ViT, 2023, arXiv 2212.08254: ratio is r1 = s / s~, offset is s r2 with
    r2 = z - z~. RepQuant (arXiv 2402.05628), I&S-ViT (arXiv 2311.10126) and AdaLog (arXiv 2407.12951) take the same.
    """

    scale: Float[Tensor, ""]
    zero_point: Float[Tensor, ""]


def reparameterize_scales(
    scale: Float[Tensor, " c"],
    zero_point: Float[Tensor, " c"],
    target_scale: Float[Tensor, ""] | None = None,
    target_zero_point: Float[Tensor, ""] | None = None,
) -> ScaleReparameterization:
    """The change from one grid a channel to one for all, whose scale and zero point default to the channels' means.

    Source: RepQ-ViT. The mean zero point is rounded, as AdaLog does: RepQ-ViT's and I&S-ViT's code leave
    it a fraction, which no integer grid has. The float model stays the same whatever the target.

    Raises:
        ValueError: shapes differ, or a scale isn't positive and finite.
    """
    if scale.ndim != 1 or scale.shape != zero_point.shape:
        raise ValueError(
            f"scales {tuple(scale.shape)} and zero points {tuple(zero_point.shape)}; each channel has one of either"
        )
    target_scale = scale.mean() if target_scale is None else target_scale
    zero = zero_point.to(scale.dtype)
    target_zero_point = torch.round(zero.mean()) if target_zero_point is None else target_zero_point.to(scale.dtype)
    for value in (scale, target_scale):
        if not bool(((value > 0) & torch.isfinite(value)).all()):
            raise ValueError("a scale isn't positive and finite")
    return ScaleReparameterization(
        scale / target_scale, scale * (zero - target_zero_point), target_scale, target_zero_point
    )


def median_scale(scale: Float[Tensor, " c"]) -> Float[Tensor, ""]:
    """The channels' middle scale, which outliers don't move; the mean of the middle two of an even number.

    Source: Yang et al., DopQ-ViT, 2024, arXiv 2408.03291, MOSF. Of an even number PyTorch's median is the lower.
    """
    return torch.quantile(scale, 0.5)


def smooth_with_bias(rows: Float[Tensor, "r c"], weight_amax: Float[Tensor, " c"], alpha: float = 0.5) -> ChannelChange:
    """SQ-b: each channel moved by its mean first, and then smoothed as SmoothQuant does.

    The ratio is SmoothQuant's factor of the greatest magnitude of what is left, and of the weights that read the
    channel. Source: Tai and Wu, MPTQ-ViT, 2024, arXiv 2401.14895.
    """
    mean = rows.mean(0)
    return ChannelChange(smoothquant_factors((rows - mean).abs().amax(0), weight_amax, alpha), -mean)
