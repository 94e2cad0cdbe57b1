"""adalog: logarithmic grids whose base is searched, for softmax and GELU; all else by the error of the outputs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from martlet.functional.quantize.logarithmic import GELU_SHIFT
from martlet.functional.quantize.reparameterize import ChannelChange, reparameterize_scales
from martlet.functional.quantize.search import (
    SOFTMAX_VALUES,
    RoundingError,
    linear_error,
    output_rows_error,
    product_error,
    rows_error,
    sample_queries,
    search_affine,
    search_affine_rows,
    search_logarithmic,
    squared_error,
)
from martlet.graph.fit import Call, Fitted, Operand
from martlet.graph.low_bit import (
    Reparameterized,
    affine,
    affine_heads,
    quantized_weight,
    sample,
    spread,
    tabulated,
)
from martlet.nn.quantizers import Quantizer

CONVOLVED = 4
"""Images whose output a convolution computes for each grid of its input."""


@dataclass(frozen=True, kw_only=True)
class AdaLog(Reparameterized):
    """Quantize a vision transformer to few bits, softmax and GELU outputs by a logarithm whose base is searched.

    Everything is chosen by the error of the layer that reads it, from coarse to fine (FPCS). LayerNorm outputs are
    re-parameterized as in RepQ-ViT; q, k and v have a grid for each head. The arithmetic is simulated.

    Shape: none changes.
    Needs: images, without labels; the first 32 are looked at.
    Cost: two forward passes, and a few hundred roundings of each weight and of a sample of each activation; as many
        times each convolution of four images.
    Paper: Wu et al., AdaLog, 2024, arXiv 2407.12951.
    Differs: activations are searched on 1,024 rows of each tensor and weights once after them, where the official
        code takes all rows, three rounds of both, and six steps of the search for four here; a softmax's base is
        chosen on some of its rows, and q, k and v by their own error. A convolution's input is judged by its output
        too: the paper's models have only one, which reads the image. LayerNorms without a bias, or before a Linear
        without one, stay as they are.
    Raises: RecipeError for bits out of range or without images; UsageError if the model multiplies nothing;
        NumericsError for an activation that is NaN.
    """

    name: ClassVar[str] = "adalog"
    summary: ClassVar[str] = "few bits: softmax and GELU by an adaptive logarithm, all searched by output error"
    paper: ClassVar[str] = "Wu et al., AdaLog, 2024, arXiv 2407.12951"
    rounded_inputs: ClassVar[bool] = False

    def change(self, rows: Tensor, weights: Sequence[Tensor]) -> ChannelChange:
        """From each channel's own grid to the mean one."""
        channels = sample(rows).T.contiguous()
        found = search_affine_rows(rows_error(channels), channels, self.activation_bits)
        return reparameterize_scales(found[:, 0], found[:, 1])

    def decide(self, call: Call) -> Fitted:
        kinds = [operand.kind for operand in call.operands.values()]
        if kinds == ["softmax", "value"]:
            return self._for_values(call)
        if call.site.kind == "conv" and kinds and kinds != ["image"]:
            return self._for_convolution(call)
        if call.site.node.target is not torch.ops.aten.linear.default:
            return super().decide(call)
        assert call.weight is not None
        weight = call.weight.detach()
        operands = dict[int, Quantizer]()
        for position, operand in call.operands.items():
            rows = sample(operand.value)
            operands[position] = self._by(linear_error(rows, weight), rows, operand)
            rounded = operands[position](rows)
            error = output_rows_error(weight, rows, rounded)
            fit = lambda w, error=error: search_affine_rows(error, w, self.weight_bits)  # noqa: E731
            return Fitted(operands, quantized_weight(call, self.weight_bits, fit))
        return Fitted(operands, self.weight(call))

    def activation(self, operand: Operand) -> Quantizer:
        x, bits = operand.value, self.bits(operand.kind)
        if operand.kind == "softmax":
            few = sample(x.flatten()[:, None], SOFTMAX_VALUES)
            return tabulated(search_logarithmic(squared_error(few), few, bits, scale=1.0))
        if operand.kind in ("query", "key", "value") and x.ndim == 4:
            heads = [sample(head) for head in x.unbind(1)]
            return affine_heads([search_affine(squared_error(h), h, bits, width=8, splits=4, steps=4) for h in heads])
        few = sample(x)
        return affine(search_affine(squared_error(few), few, bits, width=8, splits=4, steps=4))

    def weight(self, call: Call) -> Quantizer:
        return quantized_weight(
            call, self.weight_bits, lambda w: search_affine_rows(rows_error(w), w, self.weight_bits)
        )

    def _for_values(self, call: Call) -> Fitted:
        (first, softmax), (second, value) = call.operands.items()
        quantizer = self.activation(value)
        rows = sample_queries(softmax.value)
        error = product_error(rows, value.value, quantizer(value.value))
        grid = search_logarithmic(error, rows, self.activation_bits, scale=1.0)
        return Fitted({first: tabulated(grid), second: quantizer})

    def _for_convolution(self, call: Call) -> Fitted:
        """By the output of a few images: the input's grid first, and the weight's for what that leaves."""
        [(position, operand)] = call.operands.items()
        few = spread(operand.value, CONVOLVED)
        exact = call.multiply({position: few})
        quantizer = self._by(lambda x: float((call.multiply({position: x}) - exact).square().mean()), few, operand)
        assert call.weight is not None
        rounded, shape, at = quantizer(few), call.weight.shape, call.site.weight
        assert at is not None

        def error(rows: Tensor) -> Tensor:
            """Of each output channel (O), for a weight's rows (O, I)."""
            moved = call.multiply({position: rounded, at: rows.reshape(shape)}) - exact
            return moved.square().transpose(0, 1).flatten(1).mean(1)

        weight = quantized_weight(call, self.weight_bits, lambda w: search_affine_rows(error, w, self.weight_bits))
        return Fitted({position: quantizer}, weight)

    def _by(self, error: RoundingError, x: Tensor, operand: Operand) -> Quantizer:
        if operand.kind == "gelu":
            return tabulated(search_logarithmic(error, x, self.activation_bits, shift=GELU_SHIFT))
        return affine(search_affine(error, x, self.bits(operand.kind), width=8, splits=4, steps=4))
