"""Methods whose grids are chosen by the error of the product they are for, weighted by the squared gradient.

Source: Yuan et al., PTQ4ViT, 2022, arXiv 2111.12293, section 3.3, by `functional.hessian_search`.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import ClassVar

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from martlet.core.errors import NumericsError
from martlet.core.technique import Context
from martlet.functional.quantize.hessian_search import covering_step, search_linear, search_product, search_values
from martlet.functional.quantize.search import AffineGrid, best_grid, squared_error
from martlet.functional.quantize.table import Quantizes
from martlet.graph import sensitivity
from martlet.graph.fit import Call, Fitted, Operand
from martlet.graph.low_bit import LowBit, affine, quantized_weight, sample, tabulated
from martlet.graph.sites import sites
from martlet.nn.quantizers import Quantizer, TableQuantizer

Grid = AffineGrid | Quantizes


class HessianGuided(LowBit):
    """A method says which grids are tried for a tensor (`grids`); q, k and v have a symmetric one for each head."""

    rounded_inputs: ClassVar[bool] = False
    guides_convolutions: ClassVar[bool] = False
    """Gradients of convolutions are looked at too; else their operands are chosen by their own squared error."""

    def decider(self, graph_module: GraphModule, images: Tensor, context: Context) -> Callable[[Call], Fitted]:
        found = list(sites(graph_module))
        gradients = sensitivity.output_gradients(
            graph_module, found, images, context.seed, context.progress, self.guides_convolutions
        )
        if not all(bool(torch.isfinite(gradient).all()) for gradient in gradients.values()):
            raise NumericsError(f"{self.name}: a gradient of the logits is NaN or infinite")
        return lambda call: self.decide_by(call, gradients, len(images))

    def decide_by(self, call: Call, gradients: Mapping[Node, Tensor], images: int) -> Fitted:
        """As `decide`, with a sample of each product's gradients over so many images."""
        gradient = gradients.get(call.site.node)
        if gradient is None or gradient.shape != sensitivity.sample(call.output, images, call.site.is_attention).shape:
            return self.decide(call)
        taken = {p: sensitivity.sample(o.value, images, call.site.is_attention) for p, o in call.operands.items()}
        if call.site.node.target is torch.ops.aten.linear.default and taken:
            return self._linear(call, taken[0], gradient)
        if call.site.kind == "conv" and taken:
            return self.convolution(call, gradient, images)
        if call.site.is_attention and len(taken) == 2 and all(x.ndim == 4 for x in taken.values()):
            return self._attention(call, taken[0], taken[1], gradient)
        return self.decide(call)

    @abstractmethod
    def grids(self, operand: Operand) -> Sequence[Grid]:
        """What is tried for a tensor; the first covers all of it."""

    def convolution(self, call: Call, gradient: Tensor, images: int) -> Fitted:
        """How a convolution's operands are rounded, with a sample of its gradients."""
        return self.decide(call)

    def activation(self, operand: Operand) -> Quantizer:
        """By its own squared error."""
        few = sample(operand.value)
        return as_quantizer(best_grid(squared_error(few), few, self.grids(operand)))

    def _linear(self, call: Call, rows: Tensor, gradient: Tensor) -> Fitted:
        assert call.weight is not None
        weight = call.weight.detach()
        bits = self.weight_bits if self.weight_bits < 8 else None
        grid, step = search_linear(rows, weight, gradient, self.grids(call.operands[0]), bits)
        zero = 2 ** (self.weight_bits - 1)
        if step is None:
            return Fitted({0: as_quantizer(grid)}, self.weight(call))
        fit = lambda _: torch.cat([step, torch.full_like(step, zero)], 1)  # noqa: E731
        return Fitted({0: as_quantizer(grid)}, quantized_weight(call, self.weight_bits, fit))

    def _attention(self, call: Call, first: Tensor, second: Tensor, gradient: Tensor) -> Fitted:
        bits = self.activation_bits
        if call.operands[0].kind == "softmax":
            grid, steps = search_values(first, second, gradient, self.grids(call.operands[0]), bits)
            return Fitted({0: as_quantizer(grid), 1: self._heads(steps)})
        found = search_product(first, second, gradient, bits)
        return Fitted({position: self._heads(steps) for position, steps in enumerate(found)})

    def _heads(self, steps: Tensor) -> Quantizer:
        zero = torch.full_like(steps, 2 ** (self.activation_bits - 1))
        return TableQuantizer(self.activation_bits, steps, zero)


def symmetric_grids(x: Tensor, bits: int, factors: Sequence[float]) -> list[AffineGrid]:
    """The grid that reaches the greatest magnitude of x, and those whose step is so many times its."""
    step = float(covering_step(x.abs().max(), bits))
    return [AffineGrid(bits, step * factor, 2 ** (bits - 1)) for factor in (1.0, *factors)]


def as_quantizer(grid: Grid) -> Quantizer:
    return affine(grid) if isinstance(grid, AffineGrid) else tabulated(grid)
