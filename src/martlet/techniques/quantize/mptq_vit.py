"""mptq_vit: LayerNorm outputs centred and smoothed (SQ-b), GELU outputs with two steps of a searched ratio (OPT-m)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from martlet.core.errors import RecipeError
from martlet.functional.quantize.reparameterize import ChannelChange, smooth_with_bias
from martlet.functional.quantize.scale_ratio import search_ratio
from martlet.functional.quantize.search import RoundingError, best_grid, linear_error, search_affine, squared_error
from martlet.functional.quantize.twin import TwinSoftmaxGrid
from martlet.graph.fit import Call, Fitted, Operand
from martlet.graph.low_bit import Reparameterized, affine, sample, tabulated
from martlet.nn.quantizers import Quantizer

SPLITS = range(12)
"""Exponents of 1/2 between the two steps of a softmax's grid."""


@dataclass(frozen=True, kw_only=True)
class MPTQViT(Reparameterized):
    """Quantize a vision transformer to few bits with SmoothQuant with a bias and searched ratios of steps.

    The channels of a LayerNorm's output are moved to mean 0 and smoothed, which the layers around it make up for; a
    GELU's negative and positive values have a step each, whose ratio is the power of two with the least output error.
    One width for all layers. The arithmetic is simulated.

    Args:
        alpha: how much of the difference between channels moves into the weights, from 0 to 1.

    Shape: none changes.
    Needs: images, without labels; the first 32 are looked at.
    Cost: two forward passes, and some hundred roundings of a sample of each activation.
    Paper: Tai and Wu, MPTQ-ViT, 2024, arXiv 2401.14895: SQ-b and OPT-m.
    Differs: the greedy choice of a width for each layer isn't part of it. OPT-m has two regions, negative and positive,
        and is judged by the output of the Linear that reads them. The paper's quantizers for all else weren't at hand:
        a softmax has PTQ4ViT's two steps, and the rest evenly spaced grids, chosen by the output of the Linear that
        reads them or by their own squared error. LayerNorms without a bias, or before a Linear without one, stay as
        they are; the record counts them.
    Raises: RecipeError for a setting out of range or without images; UsageError if the model multiplies nothing;
        NumericsError for an activation that is NaN.
    """

    name: ClassVar[str] = "mptq_vit"
    summary: ClassVar[str] = "few bits: LayerNorm outputs centred and smoothed, searched ratios of steps for GELU"
    paper: ClassVar[str] = "Tai and Wu, MPTQ-ViT, 2024, arXiv 2401.14895"

    alpha: float = 0.5

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.alpha <= 1:
            raise RecipeError(f"mptq_vit: alpha is {self.alpha:g}; it can be 0 to 1")

    def change(self, rows: Tensor, weights: Sequence[Tensor]) -> ChannelChange:
        """SQ-b."""
        return smooth_with_bias(rows, torch.cat(list(weights)).abs().amax(0), self.alpha)

    def decide(self, call: Call) -> Fitted:
        if call.site.node.target is not torch.ops.aten.linear.default:
            return super().decide(call)
        assert call.weight is not None
        weight = call.weight.detach()
        rows = {position: sample(operand.value) for position, operand in call.operands.items()}
        operands = {p: self._by(linear_error(x, weight), x, call.operands[p]) for p, x in rows.items()}
        return Fitted(operands, self.weight(call))

    def activation(self, operand: Operand) -> Quantizer:
        few = sample(operand.value)
        return self._by(squared_error(few), few, operand)

    def _by(self, error: RoundingError, x: Tensor, operand: Operand) -> Quantizer:
        bits = self.bits(operand.kind)
        if operand.kind == "softmax":
            return tabulated(best_grid(error, x, [TwinSoftmaxGrid(bits, exponent) for exponent in SPLITS]))
        if operand.kind == "gelu" and float(x.max()) > 0:
            return tabulated(search_ratio(error, x, bits))
        return affine(search_affine(error, x, bits, steps=3))
