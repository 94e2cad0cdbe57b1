"""noisyquant: a fixed noise on what Linears read, with which rounding errs less; it is taken away again behind."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.fx import GraphModule

from martlet.core.technique import Context
from martlet.functional.noise import noisy_bias
from martlet.functional.search import AffineGrid, linear_error, search_affine, squared_error
from martlet.graph.fit import Call, Fitted, Operand
from martlet.graph.low_bit import LowBit, affine, sample
from martlet.nn.quantizers import Quantizer, TableQuantizer

AMPLITUDES = 20
"""How many are tried, up to one step of the grid."""


@dataclass(frozen=True, kw_only=True)
class NoisyQuant(LowBit):
    """Quantize to few bits on evenly spaced grids, with a fixed noise added to the input of each Linear.

    The noise is drawn once, a number a channel. Rounding x + N and taking N away again errs less than rounding x where
    many values lie alike between two steps, as those of a heavy-tailed tensor do. Without the noise it is a uniform
    quantizer whose grids are chosen by the output of the layer that reads them. A noisy input is simulated.

    Args:
        noise: False leaves the noise out, to compare.
        weight_bits: of Linears and convolutions, from 2 to 8.
        activation_bits: of their inputs, and of q, k, v and softmax, from 2 to 8; an image keeps 8.
        steps: of learning rounding and scales, block by block (AdaRound, LSQ, QDrop); 0 learns nothing.

    Shape: none changes.
    Needs: images, without labels; the first 32 are looked at.
    Cost: one forward pass, and some hundred roundings of a sample of each activation.
    Paper: Liu et al., NoisyQuant, 2023, arXiv 2211.16056, section 3.
    Differs: the amplitude, in each Linear, is the one of 20 up to a step of the grid whose draw has the least output
        error with the rounded weight, or none; the official code tries 2,000, up to two steps, and before them a common
        shift. N is even, as in the paper, not normal, as in that code. It is taken away by the quantizer, as in that
        code; the paper's bias B - W N is the same. Grids have a zero point; that code's are symmetric.
    Raises: RecipeError for bits out of range or without images; UsageError if the model multiplies nothing;
        NumericsError for an activation that is NaN.
    """

    name: ClassVar[str] = "noisyquant"
    summary: ClassVar[str] = "few bits on evenly spaced grids, with a fixed noise before rounding"
    paper: ClassVar[str] = "Liu et al., NoisyQuant, 2023, arXiv 2211.16056"

    noise: bool = True

    def decider(self, graph_module: GraphModule, images: Tensor, context: Context) -> Callable[[Call], Fitted]:
        generator = torch.Generator().manual_seed(context.seed)
        return lambda call: self.decide_with(call, generator)

    def decide_with(self, call: Call, generator: torch.Generator) -> Fitted:
        """As `decide`, with noise from a generator."""
        if call.site.node.target is not torch.ops.aten.linear.default or not call.operands:
            return self.decide(call)
        weight, [operand] = self.weight(call), call.operands.values()
        rows = sample(operand.value)
        error = linear_error(rows, weight())
        grid = search_affine(error, rows, self.bits(operand.kind), steps=3)
        unit = noisy_bias(rows.shape[1], 1.0, generator)
        quantizers: list[Quantizer] = [affine(grid)]
        quantizers += [self._noisy(grid, unit, i / AMPLITUDES) for i in range(1, AMPLITUDES + 1)]
        best = min(quantizers, key=lambda quantizer: error(quantizer(rows))) if self.noise else quantizers[0]
        return Fitted(dict.fromkeys(call.operands, best), weight)

    def activation(self, operand: Operand) -> Quantizer:
        few = sample(operand.value)
        return affine(search_affine(squared_error(few), few, self.bits(operand.kind), steps=3))

    def _noisy(self, grid: AffineGrid, unit: Tensor, amplitude: float) -> TableQuantizer:
        """Rounds x + N and subtracts N: with N in steps of the grid, a zero point that is a fraction a channel."""
        return TableQuantizer(grid.bits, torch.full_like(unit, grid.scale), grid.zero_point + unit * amplitude, axis=-1)
