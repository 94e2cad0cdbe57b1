"""dopq_vit: RepQ-ViT's change of LayerNorm outputs, to the median of the channels' grids instead of their mean."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.fx import GraphModule

from martlet.core.technique import Context
from martlet.functional.logarithmic import LogarithmicGrid
from martlet.functional.percentile import QUANTILES, percentile_affine, percentile_grids, percentile_scales
from martlet.functional.reparameterize import ChannelChange, median_scale, reparameterize_scales
from martlet.functional.search import best_grid, squared_error
from martlet.graph.fit import Call, Operand
from martlet.graph.low_bit import LowBit, affine, quantized_weight, tabulated
from martlet.graph.reparameterize import reparameterize_
from martlet.nn.quantizers import Quantizer


@dataclass(frozen=True, kw_only=True)
class DopQViT(LowBit):
    """Quantize a vision transformer to few bits, LayerNorm outputs re-parameterized to the channels' median scale.

    A few channels of a LayerNorm have scales far above the others', and move the mean, but not the median (MOSF). All
    else is as in RepQ-ViT: percentiles choose ranges, nothing is learned, and the arithmetic is simulated.

    Args:
        weight_bits: of Linears and convolutions, from 2 to 8.
        activation_bits: of their inputs, and of q, k, v and softmax, from 2 to 8; an image keeps 8.
        steps: of learning rounding and scales, block by block (AdaRound, LSQ, QDrop); 0 learns nothing.

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

    def prepare_(self, graph_module: GraphModule, images: Tensor, context: Context) -> dict[str, Any]:
        return reparameterize_(graph_module, images, self.change)

    def change(self, rows: Tensor, weights: Sequence[Tensor]) -> ChannelChange:
        """From each channel's own grid to one of the median scale."""
        scales, zeros = percentile_scales(rows.T, self.activation_bits)
        return reparameterize_scales(scales, zeros, median_scale(scales))

    def activation(self, operand: Operand) -> Quantizer:
        x, bits = operand.value, self.bits(operand.kind)
        if operand.kind == "softmax":
            tops = torch.quantile(x.flatten()[:: max(1, x.numel() // 2**20)], torch.tensor(QUANTILES))
            return tabulated(best_grid(squared_error(x), x, [LogarithmicGrid(bits, top, 1, 2) for top in tops]))
        return affine(percentile_affine(x, bits))

    def weight(self, call: Call) -> Quantizer:
        return quantized_weight(call, self.weight_bits, lambda rows: percentile_grids(rows, self.weight_bits))
