"""ptq4vit: two steps in one grid for softmax and GELU, and every grid chosen by what it costs in the logits."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from martlet.core.errors import NumericsError
from martlet.core.technique import Context
from martlet.functional.hessian_search import (
    FACTORS,
    covering_step,
    search_linear,
    search_product,
    search_values,
)
from martlet.functional.search import AffineGrid, best_grid, squared_error
from martlet.functional.twin import TwinGeluGrid, TwinSoftmaxGrid, covering_exponent
from martlet.graph import sensitivity
from martlet.graph.fit import Call, Fitted, Operand
from martlet.graph.low_bit import LowBit, affine, quantized_weight, sample, tabulated
from martlet.graph.sites import sites
from martlet.nn.quantizers import Quantizer, TableQuantizer

SPLITS = range(20)
"""Exponents of 1/2 up to which a softmax's values are in the fine range: the official code's."""


@dataclass(frozen=True, kw_only=True)
class PTQ4ViT(LowBit):
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
    rounded_inputs: ClassVar[bool] = False

    def decider(self, graph_module: GraphModule, images: Tensor, context: Context) -> Callable[[Call], Fitted]:
        found = list(sites(graph_module))
        gradients = sensitivity.output_gradients(graph_module, found, images, context.seed, context.progress)
        if not all(bool(torch.isfinite(gradient).all()) for gradient in gradients.values()):
            raise NumericsError("ptq4vit: a gradient of the logits is NaN or infinite")
        return lambda call: self.decide_by(call, gradients, len(images))

    def decide_by(self, call: Call, gradients: Mapping[Node, Tensor], images: int) -> Fitted:
        """As `decide`, with a sample of each product's gradients over so many images."""
        gradient = gradients.get(call.site.node)
        if gradient is None or gradient.shape != sensitivity.sample(call.output, images, call.site.is_attention).shape:
            return self.decide(call)
        taken = {p: sensitivity.sample(o.value, images, call.site.is_attention) for p, o in call.operands.items()}
        if call.site.node.target is torch.ops.aten.linear.default and taken:
            return self._linear(call, taken[0], gradient)
        if call.site.is_attention and len(taken) == 2 and all(x.ndim == 4 for x in taken.values()):
            return self._attention(call, taken[0], taken[1], gradient)
        return self.decide(call)

    def activation(self, operand: Operand) -> Quantizer:
        """By its own squared error."""
        few = sample(operand.value)
        return self._quantizer(best_grid(squared_error(few), few, self.grids(operand, few)))

    def grids(self, operand: Operand, x: Tensor) -> list[AffineGrid] | list[TwinSoftmaxGrid] | list[TwinGeluGrid]:
        """What is tried for a tensor; the first covers all of it."""
        bits, high = self.bits(operand.kind), float(operand.value.max())
        if operand.kind == "softmax":
            return [TwinSoftmaxGrid(bits, exponent) for exponent in SPLITS]
        if operand.kind == "gelu" and high > 0:
            most = covering_exponent(bits, high)
            return [TwinGeluGrid(bits, exponent) for exponent in range(most, most - 8, -1)]
        step = float(covering_step(operand.value.abs().max(), bits))
        return [AffineGrid(bits, step * factor, 2 ** (bits - 1)) for factor in (1.0, *FACTORS)]

    def _linear(self, call: Call, rows: Tensor, gradient: Tensor) -> Fitted:
        assert call.weight is not None
        weight = call.weight.detach()
        bits = self.weight_bits if self.weight_bits < 8 else None
        grid, step = search_linear(rows, weight, gradient, self.grids(call.operands[0], rows), bits)
        zero = 2 ** (self.weight_bits - 1)
        if step is None:
            return Fitted({0: self._quantizer(grid)}, self.weight(call))
        fit = lambda _: torch.cat([step, torch.full_like(step, zero)], 1)  # noqa: E731
        return Fitted({0: self._quantizer(grid)}, quantized_weight(call, self.weight_bits, fit))

    def _attention(self, call: Call, first: Tensor, second: Tensor, gradient: Tensor) -> Fitted:
        bits = self.activation_bits
        if call.operands[0].kind == "softmax":
            grid, steps = search_values(first, second, gradient, self.grids(call.operands[0], first), bits)
            return Fitted({0: self._quantizer(grid), 1: self._heads(steps)})
        found = search_product(first, second, gradient, bits)
        return Fitted({position: self._heads(steps) for position, steps in enumerate(found)})

    def _heads(self, steps: Tensor) -> Quantizer:
        zero = torch.full_like(steps, 2 ** (self.activation_bits - 1))
        return TableQuantizer(self.activation_bits, steps, zero)

    def _quantizer(self, grid: AffineGrid | TwinSoftmaxGrid | TwinGeluGrid) -> Quantizer:
        return affine(grid) if isinstance(grid, AffineGrid) else tabulated(grid)
