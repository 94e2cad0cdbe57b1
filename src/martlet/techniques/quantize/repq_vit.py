"""repq_vit: grids that fit a LayerNorm's channels and a softmax's tail, changed into ones that kernels could take."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from martlet.graph.low_bit import PercentileGrids


@dataclass(frozen=True, kw_only=True)
class RepQViT(PercentileGrids):
    """Quantize a vision transformer to few bits: LayerNorm outputs channel by channel, attention maps by a logarithm.

    Channel-wise grids become one grid by a change of the LayerNorm and of the weights that read it; a log√2 grid is
    read as log2 with two scales. Percentiles choose ranges. Nothing is learned. The arithmetic is simulated.

    Shape: none changes.
    Needs: images, without labels; the first 32 are looked at.
    Cost: two forward passes.
    Paper: Li et al., RepQ-ViT, 2023, arXiv 2212.08254.
    Differs: channels' ranges are those of the float model; the official code sees them with what comes before rounded.
        Once the channels of a LayerNorm are alike, their grid is chosen by percentiles again; that code keeps the mean
        one. LayerNorms without a bias, or before a Linear without one, stay as they are; the record counts them.
    Raises: RecipeError for bits out of range or without images; UsageError if the model multiplies nothing;
        NumericsError for an activation that is NaN.
    """

    name: ClassVar[str] = "repq_vit"
    summary: ClassVar[str] = "few bits: scales of LayerNorm and softmax outputs re-parameterized"
    paper: ClassVar[str] = "Li et al., RepQ-ViT, 2023, arXiv 2212.08254"
