"""noisyquant: a fixed noise on what Linears read, with which rounding errs less; it is taken away again behind."""

from __future__ import annotations

import zlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.fx import GraphModule

from martlet.core.technique import Context
from martlet.functional.quantize.noise import noisy_bias
from martlet.functional.quantize.search import AffineGrid, linear_error, search_affine, squared_error
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

    Shape: none changes.
    Needs: images, without labels; the first 32 are looked at.
    Cost: one forward pass, and some hundred roundings of a sample of each activation.
    Paper: Liu et al., NoisyQuant, 2023, arXiv 2211.16056, section 3.
    Differs: the amplitude, in each Linear, is the one of 20 up to a step of the grid whose draw has the least output
        error with the rounded weight, or none; the official code tries 2,000, up to two steps, and before them a common
        shift. N is even, as in the paper, not normal, as in that code. It is taken away by the quantizer, as in that
        code; the paper's bias B - W N is the same. Grids have a zero point; that code's are symmetric.
    Raises: RecipeError for a setting out of range or without images; UsageError if the model multiplies nothing;
        NumericsError for an activation that is NaN.
    """

    name: ClassVar[str] = "noisyquant"
    summary: ClassVar[str] = "few bits on evenly spaced grids, with a fixed noise before rounding"
    paper: ClassVar[str] = "Liu et al., NoisyQuant, 2023, arXiv 2211.16056"

    noise: bool = True

    def decider(self, graph_module: GraphModule, images: Tensor, context: Context) -> Callable[[Call], Fitted]:
        return lambda call: self._decide_with(call, context.seed)

    def activation(self, operand: Operand) -> Quantizer:
        few = sample(operand.value)
        return affine(search_affine(squared_error(few), few, self.bits(operand.kind), steps=3))

    def _decide_with(self, call: Call, seed: int) -> Fitted:
        """As `decide`, with noise on the input of a Linear."""
        if call.site.node.target is not torch.ops.aten.linear.default or not call.operands:
            return self.decide(call)
        weight, [operand] = self.weight(call), call.operands.values()
        rows = sample(operand.value)
        error = linear_error(rows, weight())
        grid = search_affine(error, rows, self.bits(operand.kind), steps=3)
        quantizers: list[Quantizer] = [affine(grid)]
        if self.noise:
            unit = even_noise(rows.shape[1], call.site.name, seed)
            quantizers += [_noisy(grid, unit * i / AMPLITUDES) for i in range(1, AMPLITUDES + 1)]
        best = min(quantizers, key=lambda quantizer: error(quantizer(rows)))
        return Fitted(dict.fromkeys(call.operands, best), weight)


def even_noise(channels: int, layer: str, seed: int) -> Tensor:
    """A layer's noise (C,) for an amplitude of 1: the same whatever other layers there are."""
    return noisy_bias(channels, 1.0, torch.Generator().manual_seed(zlib.crc32(f"{seed} {layer}".encode())))


def _noisy(grid: AffineGrid, noise: Tensor) -> TableQuantizer:
    """Rounds x + N and subtracts N (C,), given in steps of the grid: a zero point that is a fraction a channel."""
    return TableQuantizer(grid.bits, torch.full_like(noise, grid.scale), grid.zero_point + noise, axis=-1)
