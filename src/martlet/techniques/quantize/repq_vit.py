"""repq_vit: grids that fit a LayerNorm's channels and a softmax's tail, changed into ones that kernels could take."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from martlet.functional.percentile import percentile_scales
from martlet.functional.reparameterize import ChannelChange, reparameterize_scales
from martlet.graph.low_bit import PercentileGrids


@dataclass(frozen=True, kw_only=True)
class RepQViT(PercentileGrids):
    """Quantize a vision transformer to few bits: LayerNorm outputs channel by channel, attention maps by a logarithm.

    Channel-wise grids become one grid by a change of the LayerNorm and of the weights that read it; a log√2 grid is
    read as log2 with two scales. Percentiles choose ranges. Nothing is learned. The arithmetic is simulated.

    Args:
        weight_bits: of Linears and convolutions, from 2 to 8.
        activation_bits: of their inputs, and of q, k, v and softmax, from 2 to 8; an image keeps 8.
        steps: of learning rounding and scales, block by block (AdaRound, LSQ, QDrop); 0 learns nothing.
        objective: what a block keeps small: mse, perturbation (APHQ-ViT) or fisher (FIMA-Q).
        allocation: equal bits everywhere, or greedy or milp, bits by layer with the same average.

    Shape: none changes.
    Needs: images, without labels; the first 32 are looked at.
    Cost: two forward passes.
    Paper: Li et al., RepQ-ViT, 2023, arXiv 2212.08254.
    Differs: channels' ranges are those of the float model; the official code sees them with what comes before rounded.
        Images keep 8 bits, which that code rounds like all else. LayerNorms without a bias, or before a Linear
        without one, stay as they are; the record counts them.
    Raises: RecipeError for bits out of range or without images; UsageError if the model multiplies nothing;
        NumericsError for an activation that is NaN.
    """

    name: ClassVar[str] = "repq_vit"
    summary: ClassVar[str] = "few bits: scales of LayerNorm and softmax outputs re-parameterized"
    paper: ClassVar[str] = "Li et al., RepQ-ViT, 2023, arXiv 2212.08254"

    def change(self, rows: Tensor, weights: Sequence[Tensor]) -> ChannelChange:
        """From each channel's own grid to the mean one."""
        return reparameterize_scales(*percentile_scales(rows.T, self.activation_bits))
