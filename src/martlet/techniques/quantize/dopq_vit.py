"""dopq_vit: RepQ-ViT's change of LayerNorm outputs, to the median of the channels' grids instead of their mean."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from martlet.functional.percentile import percentile_scales
from martlet.functional.reparameterize import ChannelChange, median_scale, reparameterize_scales
from martlet.graph.low_bit import PercentileGrids


@dataclass(frozen=True, kw_only=True)
class DopQViT(PercentileGrids):
    """Quantize a vision transformer to few bits, LayerNorm outputs re-parameterized to the channels' median scale.

    A few channels of a LayerNorm have scales far above the others', and move the mean, but not the median (MOSF). All
    else is as in RepQ-ViT: percentiles choose ranges, nothing is learned, and the arithmetic is simulated.

    Shape: none changes.
    Needs: images, without labels; the first 32 are looked at.
    Cost: two forward passes.
    Paper: Yang et al., DopQ-ViT, 2024, arXiv 2408.03291: the scaling factor of section MOSF. The scale with the least
        mean absolute deviation from the channels', as version 3 has it, is their median, as version 1 does.
        A factor common to all channels moves no code where grids follow their tensors: here the result is RepQ-ViT's.
    Differs: the paper's tangent quantizer for softmax outputs (TanQ) isn't here; RepQ-ViT's log√2 is in its place.
        Images keep 8 bits. LayerNorms without a bias, or before a Linear without one, stay as they are; the record
        counts them.
    Raises: RecipeError for bits out of range or without images; UsageError if the model multiplies nothing;
        NumericsError for an activation that is NaN.
    """

    name: ClassVar[str] = "dopq_vit"
    summary: ClassVar[str] = "few bits: LayerNorm outputs re-parameterized to the channels' median scale"
    paper: ClassVar[str] = "Yang et al., DopQ-ViT, 2024, arXiv 2408.03291"

    def change(self, rows: Tensor, weights: Sequence[Tensor]) -> ChannelChange:
        """From each channel's own grid to one of the median scale."""
        scales, zeros = percentile_scales(rows.T, self.activation_bits)
        return reparameterize_scales(scales, zeros, median_scale(scales))
