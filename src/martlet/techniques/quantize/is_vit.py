"""is_vit: a shifted logarithm for softmax outputs, and activations learned to be rounded before weights are."""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace
from typing import Any, ClassVar

from torch import Tensor
from torch.fx import GraphModule

from martlet.core.technique import Context
from martlet.functional.quantize.logarithmic import search_shift
from martlet.functional.quantize.percentile import WEIGHT_QUANTILES, percentile_affine, percentile_grids
from martlet.graph import rounding
from martlet.graph.fit import Call, Fit, Fitted, Operand, fit
from martlet.graph.low_bit import Reparameterized, affine, quantized_weight, tabulated
from martlet.graph.reconstruct import Learning
from martlet.graph.sites import sites
from martlet.nn.quantizers import Quantizer


@dataclass(frozen=True, kw_only=True)
class ISViT(Reparameterized):
    """Quantize a vision transformer to few bits: first its activations, learned with float weights, then its weights.

    A softmax's output has a grid of powers of two, shifted and evenly chosen (SULQ). LayerNorm outputs are
    re-parameterized as in RepQ-ViT. With steps, the three stages of SOS follow: blocks learn float weights under
    rounded activations, weights get their grids, and blocks learn again with both. The arithmetic is simulated.

    Args:
        steps: of learning weights, block by block, in each of the two stages that learn; 0 learns nothing.

    Shape: none changes.
    Needs: images, without labels; the first 32 choose grids, all are learned from.
    Cost: two forward passes, and twice the steps of learning.
    Paper: Zhong et al., I&S-ViT, 2023, arXiv 2311.10126.
    Differs: channels' grids are moved into LayerNorms and weights before the first stage and not after it, which is the
        same function; they stay as they were chosen. Scales of activations are learned too, rates are relative to what
        they change, and inputs of a block are float in half of their values (QDrop). LayerNorms without a bias, or
        before a Linear without one, stay as they are; the record counts them.
    Raises: RecipeError for settings out of range or without images; UsageError if the model multiplies nothing;
        NumericsError for an activation that is NaN.
    """

    name: ClassVar[str] = "is_vit"
    summary: ClassVar[str] = "few bits: softmax by a shifted logarithm, activations learned before weights"
    paper: ClassVar[str] = "Zhong et al., I&S-ViT, 2023, arXiv 2311.10126"

    freedom: str = "weights"

    def activation(self, operand: Operand) -> Quantizer:
        bits = self.bits(operand.kind)
        if operand.kind == "softmax":
            return tabulated(search_shift(operand.value, bits))
        return affine(percentile_affine(operand.value, bits))

    def weight(self, call: Call) -> Quantizer:
        grids = lambda rows: percentile_grids(rows, self.weight_bits, WEIGHT_QUANTILES)  # noqa: E731
        return quantized_weight(call, self.weight_bits, grids)

    def learning(self) -> Learning:
        return replace(super().learning(), float_rate=1e-3)

    def round_(
        self, graph_module: GraphModule, original: GraphModule | None, fitted: Fit, images: Tensor, context: Context
    ) -> dict[str, Any]:
        """The three stages of SOS; without learning, all at once."""
        if original is None:
            return super().round_(graph_module, original, fitted, images, context)
        activations = rounding.insert_(graph_module, fitted.activations, [])
        first = self.learn_(graph_module, original, images, context)
        learned = copy.deepcopy(graph_module)
        bits = {node: quantizer.bits for node, _, quantizer in fitted.weights}

        def decide(call: Call) -> Fitted:
            found = bits.get(call.site.node)
            return Fitted({}, None if found is None else replace(self, weight_bits=found).weight(call))

        again = fit(graph_module, list(sites(graph_module)), images[:1], decide, False, context.progress)
        record = rounding.insert_(graph_module, {}, again.weights)
        second = self.learn_(graph_module, original, images, context, learned)
        return {"activations": first, "blocks": second, "rounding": activations | {"weights": record["weights"]}}
