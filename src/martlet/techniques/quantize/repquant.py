"""repquant: RepQ-ViT with the ends of each LayerNorm channel's range learned, and weights learned block by block."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.fx import Node

from martlet.functional.quantize.dual_clipping import learn_clipping
from martlet.functional.quantize.percentile import percentile_scales
from martlet.functional.quantize.reparameterize import ChannelChange, reparameterize_scales
from martlet.functional.quantize.search import AffineGrid
from martlet.graph.fit import Call, Fitted
from martlet.graph.low_bit import PercentileGrids, affine, sample
from martlet.graph.rewrite.reparameterize import common_grid
from martlet.graph.sites import source
from martlet.nn.quantizers import Quantizer


@dataclass(frozen=True, kw_only=True)
class RepQuant(PercentileGrids):
    """Quantize a vision transformer to few bits as RepQ-ViT does, with learned clipping of each LayerNorm channel.

    Each end of each channel's range is learned by the output error of the layers that read it (dual clipping), and
    the change to one grid for all channels takes that along. With steps, blocks then learn how their weights round and
    their activations scale (quantized weight reconstruction). The arithmetic is simulated.

    Shape: none changes.
    Needs: images, without labels; the first 32 choose grids, all are learned from.
    Cost: two forward passes, a hundred roundings of a sample of each LayerNorm's output with gradients, and the steps.
    Paper: Li et al., RepQuant, 2024, arXiv 2402.05628.
    Differs: dual clipping is written from the paper's abstract, see learn_clipping; it sees the float model. Weights
        are reconstructed as in all methods here (AdaRound, LSQ and QDrop in each block), and only with steps. Images
        keep 8 bits. LayerNorms without a bias, or before a Linear without one, stay as they are; the record counts
        them.
    Raises: RecipeError for a setting out of range or without images; UsageError if the model multiplies nothing;
        NumericsError for an activation that is NaN.
    """

    name: ClassVar[str] = "repquant"
    summary: ClassVar[str] = "few bits: RepQ-ViT with learned clipping of LayerNorm channels"
    paper: ClassVar[str] = "Li et al., RepQuant, 2024, arXiv 2402.05628"

    def change(self, rows: Tensor, weights: Sequence[Tensor]) -> ChannelChange:
        """From each channel's own learned grid to the mean one."""
        start = percentile_scales(rows.T, self.activation_bits)
        scales, zeros = learn_clipping(sample(rows), torch.cat(list(weights)), self.activation_bits, start)
        zero = torch.round(zeros.mean()).clamp(0, 2**self.activation_bits - 1)  # so that it is a code
        return reparameterize_scales(scales, zeros, target_zero_point=zero)

    def decide(self, call: Call) -> Fitted:
        """A LayerNorm's channels have the grid they were changed to; all else is RepQ-ViT's."""
        operands = dict[int, Quantizer]()
        for position, operand in call.operands.items():
            node = call.site.node.args[position]
            assert isinstance(node, Node)
            change = common_grid(source(node)) if self.bits(operand.kind) == self.activation_bits else None
            if operand.kind == "layer_norm" and change is not None:
                grid = AffineGrid(self.activation_bits, float(change.scale), int(change.zero_point))
                operands[position] = affine(grid)
            else:
                operands[position] = self.activation(operand)
        return Fitted(operands, None if call.weight is None else self.weight(call))
