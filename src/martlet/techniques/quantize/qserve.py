"""qserve: weights of 4 bits that integers alone widen to 8, and activations of 8 bits."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.fx import GraphModule

from martlet.core.errors import RecipeError
from martlet.core.model import Model
from martlet.core.technique import Context
from martlet.functional.quantize.percentile import percentile_affine
from martlet.functional.quantize.progressive import progressive_weight
from martlet.graph.attention import Attention, attentions, scale_channels_
from martlet.graph.fit import Call, Operand
from martlet.graph.low_bit import LowBit, affine
from martlet.graph.observe import OneBatch, observe
from martlet.graph.rewrite.layout import scale_after_scores_
from martlet.nn.quantizers import PackedWeightQuantizer, Quantizer, WeightQuantizer

SMOOTHING = 0.5
"""The power of a key's channel that moves into the query: the paper's."""


@dataclass(frozen=True, kw_only=True)
class QServe(LowBit):
    """Quantize weights in two steps, to 8 bits a row and then to 4 a group, and activations to 8 bits.

    A group's step is a whole number of the row's 8-bit steps, so that a kernel widens 4 bits to 8 with integers and
    multiplies those (W4A8). Channels of the keys that stand out are moved into the queries first (SmoothAttention).
    Engines here multiply such weights in floating point, so the speed is that of float weights.

    Args:
        group_size: neighbouring inputs that share a step; where it doesn't divide a layer's, the largest that does.
        weight_bits: of Linears and convolutions, from 2 to 8, where 8 is one step alone.

    Shape: none changes.
    Needs: images, without labels; the first 32 are looked at.
    Cost: three forward passes.
    Paper: Lin et al., QServe, 2024, arXiv 2405.04532.
    Differs: of the paper's quantization, progressive groups and SmoothAttention; rotation of block inputs, smoothing of
        block outputs, reordering of channels and its kernels aren't part of it, and a vision transformer has no cache
        of keys and values. Activations have one grid a tensor for all images, by percentiles, not one for each token.
    Raises: RecipeError for settings out of range or without images; UsageError if the model multiplies nothing;
        NumericsError for an activation that is NaN.
    """

    name: ClassVar[str] = "qserve"
    summary: ClassVar[str] = "4-bit weights that integers widen to 8 (W4A8), keys smoothed into queries"
    paper: ClassVar[str] = "Lin et al., QServe, 2024, arXiv 2405.04532"

    activation_bits: int = 8
    group_size: int = 128

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.group_size < 1:
            raise RecipeError(f"qserve: group_size is {self.group_size}; it has to be 1 or more")

    def prepare_(self, graph_module: GraphModule, images: Tensor, context: Context) -> dict[str, Any]:
        """SmoothAttention: each channel of k divided by a power of its greatest magnitude, and of q multiplied."""
        scale_after_scores_(graph_module)
        found = [attention for attention in attentions(graph_module) if attention.q and attention.k]
        greatest: dict[Attention, Tensor] = {}

        def look(attention: Attention, output: Tensor) -> None:
            assert attention.k
            here = output.flatten(0, -2).abs().amax(0)[attention.k.index]  # (H, D)
            greatest[attention] = torch.maximum(greatest[attention], here) if attention in greatest else here

        watch = {a.k.linear: lambda x, a=a: look(a, x) for a in found if a.k}
        if watch:
            observe(graph_module, OneBatch(images), watch, context.progress, "observe keys")
        for attention, channels in greatest.items():
            factors = torch.where(channels > 0, channels, 1.0) ** SMOOTHING
            scale_channels_(graph_module, attention, qk=factors / factors.log().mean(1, keepdim=True).exp())
        return {"smoothed": len(greatest)}

    def restore_(self, model: Model, record: Mapping[str, Any]) -> None:
        assert isinstance(model.module, GraphModule)
        scale_after_scores_(model.module)
        super().restore_(model, record)

    def activation(self, operand: Operand) -> Quantizer:
        return affine(percentile_affine(operand.value, self.bits(operand.kind)))

    def weight(self, call: Call) -> Quantizer:
        assert call.weight is not None
        weight, axis = call.weight.detach(), call.site.output_axis
        if self.weight_bits == 8:
            return WeightQuantizer.fit(weight, axis)
        rows = weight.movedim(axis, 0).flatten(1)  # (O, I)
        size = next(n for n in range(min(self.group_size, rows.shape[1]), 0, -1) if rows.shape[1] % n == 0)
        found = progressive_weight(rows, size, self.weight_bits)
        scale = found.scale * found.step
        return PackedWeightQuantizer(found.codes, scale, self.weight_bits, found.zero, weight.shape, axis)
