"""dopq_vit: a softmax's output by a tangent (TanQ), LayerNorm outputs re-parameterized to the median scale (MOSF)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from martlet.functional.quantize.percentile import percentile_scales
from martlet.functional.quantize.reparameterize import ChannelChange, median_scale, reparameterize_scales
from martlet.functional.quantize.search import SOFTMAX_VALUES, product_error, sample_queries, squared_error
from martlet.functional.quantize.tangent import search_tangent
from martlet.graph.fit import Call, Fitted, Operand
from martlet.graph.low_bit import PercentileGrids, sample, tabulated
from martlet.nn.quantizers import Quantizer


@dataclass(frozen=True, kw_only=True)
class DopQViT(PercentileGrids):
    """Quantize a vision transformer to few bits: attention maps by a tangent, LayerNorm outputs by the median scale.

    The values of a softmax's grid lie close together near 0 and near its largest (TanQ); how close is chosen by the
    attention's output. LayerNorm outputs are re-parameterized to the middle of the channels' scales, which the few far
    above the others don't move as they move the mean (MOSF). All else is as in RepQ-ViT: percentiles choose ranges,
    nothing is learned, and the arithmetic is simulated.

    Shape: none changes.
    Needs: images, without labels; the first 32 are looked at.
    Cost: two forward passes, and some seventy roundings of a sample of each attention map.
    Paper: Yang et al., DopQ-ViT, 2024, arXiv 2408.03291: TanQ, and the scaling factor of section MOSF. The scale with
        the least mean absolute deviation from the channels', as version 3 has it, is their median, as version 1 does.
        A factor common to all channels moves no code where grids follow their tensors: MOSF's result is RepQ-ViT's.
    Differs: the form of the tangent is ours, made from what accounts of the paper say of it; see TangentGrid. Nothing
        is learned without steps. Images keep 8 bits. LayerNorms without a bias, or before a Linear without one, stay as
        they are; the record counts them.
    Raises: RecipeError for bits out of range or without images; UsageError if the model multiplies nothing;
        NumericsError for an activation that is NaN.
    """

    name: ClassVar[str] = "dopq_vit"
    summary: ClassVar[str] = "few bits: softmax by a tangent, LayerNorm outputs re-parameterized to the median scale"
    paper: ClassVar[str] = "Yang et al., DopQ-ViT, 2024, arXiv 2408.03291"

    def change(self, rows: Tensor, weights: Sequence[Tensor]) -> ChannelChange:
        """From each channel's own grid to one of the median scale."""
        scales, zeros = percentile_scales(rows.T, self.activation_bits)
        return reparameterize_scales(scales, zeros, median_scale(scales))

    def decide(self, call: Call) -> Fitted:
        if [operand.kind for operand in call.operands.values()] != ["softmax", "value"]:
            return super().decide(call)
        (first, softmax), (second, value) = call.operands.items()
        quantizer = self.activation(value)
        rows = sample_queries(softmax.value)
        error = product_error(rows, value.value, quantizer(value.value))
        return Fitted({first: tabulated(search_tangent(error, rows, self.activation_bits)), second: quantizer})

    def activation(self, operand: Operand) -> Quantizer:
        if operand.kind != "softmax":
            return super().activation(operand)
        few = sample(operand.value.flatten()[:, None], SOFTMAX_VALUES)
        return tabulated(search_tangent(squared_error(few), few, self.bits(operand.kind)))
