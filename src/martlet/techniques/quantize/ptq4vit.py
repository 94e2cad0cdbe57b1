"""ptq4vit: two steps in one grid for softmax and GELU, and every grid chosen by what it costs in the logits."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from martlet.functional.quantize.hessian_search import FACTORS
from martlet.functional.quantize.search import AffineGrid
from martlet.functional.quantize.twin import TwinGeluGrid, TwinSoftmaxGrid, covering_exponent
from martlet.graph.fit import Operand
from martlet.graph.hessian_guided import HessianGuided, symmetric_grids

SPLITS = range(20)
"""Exponents of 1/2 up to which a softmax's values are in the fine range: the official code's."""


@dataclass(frozen=True, kw_only=True)
class PTQ4ViT(HessianGuided):
    """Quantize a vision transformer on symmetric grids, softmax and GELU outputs on two whose steps differ by 2^m.

    All steps are chosen by the error of the output of the product they are for, weighted by the squared gradient of
    the logits; q, k and v have one for each head. The arithmetic is simulated. Made for 6 and 8 bits.

    Shape: none changes.
    Needs: images, without labels; the first 32 are looked at.
    Cost: two forward and one backward pass, and some hundred roundings of each weight and of a sample of each tensor.
    Paper: Yuan et al., PTQ4ViT, 2022, arXiv 2111.12293, sections 3.2 (twin uniform grids) and 3.3 (the metric).
    Differs: the gradient is of random combinations of logits. That of the official code, of the divergence between the
        prediction and itself, is zero but for rounding. Weights have a step for each output channel, not for each of q,
        k, v and every other layer. A GELU's positive step is a power of two times the other, as in the paper; the
        code leaves it free. 512 rows of a Linear and four images of an attention are searched on, every other of the
        code's candidates is tried, and the operands' turns end early when nothing changes. Weights of convolutions, and
        of Linears that share an input with an earlier one, are chosen by their own squared error.
    Raises: RecipeError for bits out of range or without images; UsageError if the model multiplies nothing;
        NumericsError for an activation or a gradient that is NaN.
    """

    name: ClassVar[str] = "ptq4vit"
    summary: ClassVar[str] = "few bits: twin uniform grids for softmax and GELU, a metric guided by the Hessian"
    paper: ClassVar[str] = "Yuan et al., PTQ4ViT, 2022, arXiv 2111.12293"

    def grids(self, operand: Operand) -> Sequence[AffineGrid] | Sequence[TwinSoftmaxGrid] | Sequence[TwinGeluGrid]:
        """Two steps for softmax and GELU, symmetric ones for all else."""
        bits, high = self.bits(operand.kind), float(operand.value.max())
        if operand.kind == "softmax":
            return [TwinSoftmaxGrid(bits, exponent) for exponent in SPLITS]
        if operand.kind == "gelu" and high > 0:
            most = covering_exponent(bits, high)
            return [TwinGeluGrid(bits, exponent) for exponent in range(most, most - 8, -1)]
        return symmetric_grids(operand.value, bits, FACTORS)
