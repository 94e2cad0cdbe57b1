"""q_hyvit: granularity, scheme and scale of each layer by the Hessian; bridges to attention judged by their output."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.fx import GraphModule

from martlet.core.technique import Context
from martlet.functional.quantize.hessian_search import FACTORS, covering_step
from martlet.functional.quantize.search import AffineGrid
from martlet.graph import sensitivity
from martlet.graph.fit import Call, Fit, Fitted, Operand
from martlet.graph.hessian_guided import HessianGuided, as_quantizer, symmetric_grids
from martlet.graph.low_bit import FIT_IMAGES, spread
from martlet.graph.objectives import Block, Loss, perturbation_hessian
from martlet.graph.segments import bridges, extract
from martlet.nn.quantizers import ActivationQuantizer, Quantizer, TableQuantizer

FEW_FACTORS = FACTORS[::5]
"""Tried in a convolution, which is computed anew for each."""
BRIDGE_FACTORS = (0.8, 0.9, 1.1, 1.2)
"""By which a scale inside a bridge is changed to see if the bridge's output likes it better."""


@dataclass(frozen=True, kw_only=True)
class QHyViT(HessianGuided):
    """Quantize a hybrid of convolutions and attention to few bits, with care where the two meet.

    Each activation's grid is the best of symmetric and asymmetric ones of many scales, by the error of the output that
    it is for, weighted by the squared gradient of the logits; before a depthwise convolution each channel may have its
    own. Then the scales inside a bridge, one after another, are changed as its output asks for. The arithmetic is
    simulated.

    Args:
        bridge: False leaves the bridges as their layers were chosen, to compare.

    Shape: none changes.
    Needs: images, without labels; the first 32 are looked at.
    Cost: two forward and one backward pass, some hundred roundings of a sample of each tensor, some twenty of each
        convolution's output, and five runs of a bridge for each tensor that it rounds.
    Paper: Lee et al., Q-HyViT, 2023, arXiv 2303.12557.
    Differs: the paper's equations weren't at hand, what follows its abstract and its official code is. That code's
        bridges are numbers of layers, written down for each model; here they are found: a block in which convolutions
        and attention have no single tensor between them, or the last block of one and the first of the other. Its
        gradient is of the divergence between the rounded prediction and the float one; here of random combinations of
        logits. It gives all depthwise convolutions a scale for each channel; here that competes with one scale, and it
        rounds symmetrically only. LayerNorm, softmax, GELU and additions are computed in floating point.
    Raises: RecipeError for settings out of range or without images; UsageError if the model multiplies nothing;
        NumericsError for an activation or a gradient that is NaN.
    """

    name: ClassVar[str] = "q_hyvit"
    summary: ClassVar[str] = "few bits for hybrids: granularity, scheme and scale by the Hessian, bridges as a whole"
    paper: ClassVar[str] = "Lee et al., Q-HyViT, 2023, arXiv 2303.12557"
    guides_convolutions: ClassVar[bool] = True

    bridge: bool = True

    def grids(self, operand: Operand) -> Sequence[AffineGrid]:
        """Of both schemes."""
        return self._grids(operand, FACTORS)

    def convolution(self, call: Call, gradient: Tensor, images: int) -> Fitted:
        [(position, operand)] = call.operands.items()
        assert call.weight is not None
        tried: list[Quantizer] = [as_quantizer(grid) for grid in self._grids(operand, FEW_FACTORS)]
        if call.weight.shape[1] == 1 and call.weight.ndim == 4:  # one input channel each
            tried += channel_quantizers(operand.value, self.bits(operand.kind), FEW_FACTORS)

        def error(quantizer: Quantizer) -> float:
            moved = call.multiply({position: quantizer(operand.value)}) - call.output
            return float((sensitivity.sample(moved, images, False) * gradient).square().sum())

        return Fitted({position: min(tried, key=error)}, self.weight(call))

    def round_(
        self, graph_module: GraphModule, original: GraphModule | None, fitted: Fit, images: Tensor, context: Context
    ) -> dict[str, Any]:
        exact = original or copy.deepcopy(graph_module)
        record = super().round_(graph_module, original, fitted, images, context)
        if not self.bridge:
            return record
        few = spread(images, FIT_IMAGES)
        return {"bridges": reconstruct_bridges_(graph_module, exact, few, context), **record}

    def _grids(self, operand: Operand, factors: Sequence[float]) -> list[AffineGrid]:
        bits = self.bits(operand.kind)
        symmetric = symmetric_grids(operand.value, bits, factors)
        low, high = (float(v) for v in torch.aminmax(operand.value))
        low, high, most = min(low, 0.0), max(high, 0.0), 2**bits - 1
        zero = round(-low / (high - low) * most)
        return symmetric + [AffineGrid(bits, (high - low) / most * factor, zero) for factor in (1.0, *factors)]


def channel_quantizers(x: Tensor, bits: int, factors: Sequence[float]) -> list[Quantizer]:
    """Grids (C,) for each channel of x (B, C, H, W): of both schemes, with steps so many times those that cover it."""
    low, high = x.amin((0, 2, 3)).clamp(max=0), x.amax((0, 2, 3)).clamp(min=0)
    most = 2**bits - 1
    even = torch.where(high > low, (high - low) / most, 1.0)
    symmetric = covering_step(torch.maximum(-low, high), bits)
    middle = torch.full_like(low, 2 ** (bits - 1))
    schemes = [(symmetric, middle), (even, torch.round(-low / even))]
    return [TableQuantizer(bits, step * f, zero, axis=1) for step, zero in schemes for f in (1.0, *factors)]


def reconstruct_bridges_(
    rounded: GraphModule, original: GraphModule, images: Tensor, context: Context
) -> list[dict[str, Any]]:
    """Changes scales inside each bridge, one after another in their order, where its output errs less for it.

    By the error's square, weighted as APHQ-ViT's objective does. original: the same graph before it was rounded.
    images (B, 3, H, W). Returns each bridge's layers, and its loss after over that before.
    """
    nodes = {node.name: node for node in rounded.graph.nodes}
    [image] = [node for node in original.graph.nodes if node.op == "placeholder"]
    [logits] = [node.all_input_nodes[0] for node in original.graph.nodes if node.op == "output"]
    found, report = bridges(original), list[dict[str, Any]]()
    for i, bridge in enumerate(found):
        context.progress("reconstruct bridges", i, len(found))
        piece = extract(rounded, nodes[bridge.input.name], nodes[bridge.output.name])
        with torch.no_grad():
            x = extract(rounded, nodes[image.name], nodes[bridge.input.name])(images)
            target = extract(original, image, bridge.output)(images)
        rest = None if bridge.output is logits else extract(original, bridge.output, logits)
        loss = perturbation_hessian(Block(rest, target, lambda p=piece, x=x: p(x), 1))

        def error(piece: GraphModule = piece, x: Tensor = x, target: Tensor = target, loss: Loss = loss) -> float:
            with torch.no_grad():
                return float(loss(piece(x) - target, torch.arange(len(x))))

        start = error()
        left = _descend_(_quantizers(piece), error, start)
        report.append({"layers": list(bridge.names), "loss_ratio": left / start if start > 0 else 1.0})
    context.progress("reconstruct bridges", len(found), len(found))
    return report


def _descend_(quantizers: Sequence[Quantizer], error: Callable[[], float], least: float) -> float:
    """Each scale times the factor of the least error. Returns that of the last."""
    for quantizer in quantizers:
        own, best = quantizer.scale.clone(), 1.0
        for factor in BRIDGE_FACTORS:
            quantizer.scale.copy_(own * factor)
            if (now := error()) < least:
                best, least = factor, now
        quantizer.scale.copy_(own * best)
    return least


def _quantizers(piece: GraphModule) -> list[Quantizer]:
    """Of its activations, in the order of execution."""
    called = [piece.get_submodule(str(node.target)) for node in piece.graph.nodes if node.op == "call_module"]
    return [module for module in called if isinstance(module, (ActivationQuantizer, TableQuantizer))]
