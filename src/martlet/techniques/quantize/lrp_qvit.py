"""lrp_qvit: RepQ-ViT's change of LayerNorm outputs, from channels' grids whose outliers are clipped first."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from martlet.functional.quantize.channel_clipping import DEVIATIONS, search_clipping
from martlet.functional.quantize.reparameterize import ChannelChange
from martlet.functional.quantize.search import linear_error, search_affine
from martlet.graph.fit import Call, Fitted
from martlet.graph.low_bit import PercentileGrids, affine, sample


@dataclass(frozen=True, kw_only=True)
class LRPQViT(PercentileGrids):
    """Quantize a vision transformer to few bits, the outliers among a LayerNorm's channels clipped.

    Channel-wise grids become one grid by a change of the LayerNorm and of the weights that read it, as in RepQ-ViT; but
    the ranges of channels far from the others' end where most do, so that the weights don't pay for them. With
    `allocation: relevance`, which other methods take too, layers have bits by their share in the logits. The
    arithmetic is simulated.

    Args:
        clip: False leaves the channels' ranges as they are, to compare.

    Shape: none changes.
    Needs: images, without labels; the first 32 are looked at.
    Cost: two forward passes.
    Paper: Ranjan and Savakis, LRP-QViT, 2024, arXiv 2401.11243: its clipped channel-wise quantizer; bits by layer-wise
        relevance propagation are in `graph.relevance` and `graph.allocation`.
    Differs: the paper's equations weren't at hand. A layer's share in the logit, times a quarter for every bit, is
        what an integer programme keeps small. Clipped ranges end some standard deviations of the channels' ends from
        their mean, as many as give the layer behind the least output error, or nowhere. The one grid of a LayerNorm's
        output is chosen by that error too; all else is RepQ-ViT's. LayerNorms without a bias, or before a Linear
        without one, stay as they are; the record counts them.
    Raises: RecipeError for bits out of range or without images; UsageError if the model multiplies nothing;
        NumericsError for an activation that is NaN.
    """

    name: ClassVar[str] = "lrp_qvit"
    summary: ClassVar[str] = "few bits: LayerNorm outputs re-parameterized, outlier channels clipped"
    paper: ClassVar[str] = "Ranjan and Savakis, LRP-QViT, 2024, arXiv 2401.11243"

    clip: bool = True

    def change(self, rows: Tensor, weights: Sequence[Tensor]) -> ChannelChange:
        """From each channel's own grid, clipped, to the mean one."""
        few, deviations = sample(rows), DEVIATIONS if self.clip else DEVIATIONS[-1:]
        return search_clipping(few, torch.cat(list(weights)), self.activation_bits, self.weight_bits, deviations)

    def decide(self, call: Call) -> Fitted:
        kinds = [operand.kind for operand in call.operands.values()]
        if call.site.node.target is not torch.ops.aten.linear.default or kinds != ["layer_norm"]:
            return super().decide(call)
        [(position, operand)] = call.operands.items()
        assert call.weight is not None
        rows = sample(operand.value)
        grid = search_affine(linear_error(rows, call.weight.detach()), rows, self.activation_bits, steps=3)
        return Fitted({position: affine(grid)}, self.weight(call))
