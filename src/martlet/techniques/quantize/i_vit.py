"""i_vit: a vision transformer that computes with integers alone, from the quantized image to the logits."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from martlet.core.errors import UsageError
from martlet.core.facts import Fact
from martlet.core.model import Model
from martlet.core.technique import Batches, Context, Stage, Technique
from martlet.functional.quantize.affine import affine_parameters
from martlet.functional.quantize.integer import SIGMOID_SLOPE, shift_gelu
from martlet.functional.quantize.ranges import Histogram, candidates, first_order_error, weight_scale_mse
from martlet.graph import rounding
from martlet.graph.integer import OPERAND_BITS, WIDE_BITS, Request, Scales, UnsupportedOperation, integerize
from martlet.graph.observe import observe, observe_calls, observe_gradients
from martlet.graph.rewrite import layout, shifting, smoothing, splitting
from martlet.graph.sites import aten

HEADROOM = 1.25
"""How far a tensor of 16 bits reaches past the largest value seen; what it costs is a third of a bit of 16."""


@dataclass(frozen=True, kw_only=True)
class IViT(Technique):
    """Compute everything between the image and the logits with integers: products, additions, divisions and shifts.

    For hardware without floating point. Linear and convolution multiply int8 by int8 into int32; dyadic numbers take
    each result to the scale of what follows; softmax, GELU and LayerNorm have integer forms of their own. The image is
    rounded on the way in, the logits get their scale on the way out. Engines here have no kernels for it: PyTorch runs
    it, exactly and slowly.

    Shape: none changes.
    Needs: images, without labels; 64 are enough for most models.
    Cost: six forward and three backward passes over the images in float32; at run time, int64 arithmetic.
    Paper: Li and Gu, I-ViT: Integer-only Quantization for Efficient Vision Transformer Inference, 2023,
        arXiv 2207.01405: Shiftmax (algorithm 1), ShiftGELU (algorithm 2), I-LayerNorm, dyadic scales.
    Differs: the paper fine-tunes; here nothing is trained, which these make up for in part. Inputs of softmax and
        GELU, and the sigmoid in GELU, have 16 bits, not 8 (residuals and softmax outputs have 16 in the official code
        too), at scales that are powers of two, as 1 / scale is rounded to an integer otherwise. Outlier channels are
        split, LayerNorm outputs and v centred and smoothed first, exactly, as in `int8`; ranges of 8 bits are those
        with the least error of the logits, not running maxima. What ShiftGELU lacks in the mean, in each channel, is
        added where its output is rounded. ShiftGELU subtracts the larger of y and 0, not the
        row's largest y; 1.702 is in the scale, as in that code. LayerNorm keeps its eps, and its bias is added at the
        scale of its output.
    Raises: RecipeError without images; UsageError for an operation that has no integer form, by its name.
    """

    name: ClassVar[str] = "i_vit"
    stage: ClassVar[Stage] = Stage.GRAPH
    summary: ClassVar[str] = "integers alone from the image to the logits, in 8 bits where it multiplies"
    paper: ClassVar[str] = "Li and Gu, I-ViT: Integer-only Quantization for ViT Inference, 2023, arXiv 2207.01405"
    requires: ClassVar[frozenset[Fact]] = frozenset({Fact.FLOAT_WEIGHTS, Fact.FLOAT_ACTIVATIONS, Fact.FREE_PRECISION})
    breaks: ClassVar[frozenset[Fact]] = requires | {Fact.UNFUSED}
    needs_images: ClassVar[bool] = True

    def check(self, model: Model) -> None:
        assert isinstance(model.module, GraphModule)
        try:
            integerize(model.module, Scales.none())
        except UnsupportedOperation as error:
            raise UsageError(
                f"i_vit: {model.name} has {error}, which has no integer form here; int8 leaves such operations in float"
            ) from error

    def apply_(self, model: Model, context: Context) -> dict[str, Any]:
        graph_module = model.module
        assert isinstance(graph_module, GraphModule)
        images = context.calibration(self)
        graph_module.requires_grad_(False)
        layout_(graph_module)
        split = splitting.split_(graph_module, images, context.seed, context.progress)
        centred = shifting.shift_(graph_module, images, context.progress)
        smoothed = smoothing.smooth_(graph_module, images, context.seed, context.progress)
        requests: dict[Request, None] = {}
        integerize(graph_module, Scales.none(lambda request: requests.setdefault(request)))
        scales = self._scales(graph_module, list(requests), images, context)
        lacks = gelu_lacks(graph_module, scales, images, context)
        found = Scales(scales.__getitem__, weight_scale_mse, lambda gelu, channels: lacks[gelu])
        model.module = integerize(graph_module, found)
        return {"centred": centred, "smoothed": smoothed, "split": split, "scales": len(scales)}

    def restore_(self, model: Model, record: Mapping[str, Any]) -> None:
        assert isinstance(model.module, GraphModule)
        layout_(model.module)
        splitting.restore_(model.module, record["split"])
        model.module = integerize(model.module, Scales.none())

    def _scales(
        self, graph_module: GraphModule, requests: list[Request], images: Batches, context: Context
    ) -> dict[Request, float]:
        histograms = {node: Histogram() for request in requests for node in request.nodes}
        computed = {node: seen for node, seen in histograms.items() if node.op != "get_attr"}
        observe(graph_module, images, {n: h.add for n, h in computed.items()}, context.progress, "observe activations")
        for node in histograms.keys() - computed.keys():
            histograms[node].add(rounding.tensor(graph_module, node))
        largest = {node: max(-histogram.low, histogram.high) for node, histogram in histograms.items()}
        operands = {r.nodes[0]: r for r in requests if r.bits == OPERAND_BITS and r.nodes[0].op == "call_function"}
        chosen = choose(graph_module, {node: histograms[node] for node in operands}, images, context)
        scales = {request: _scale(request, max(largest[node] for node in request.nodes)) for request in requests}
        return scales | {request: chosen[node] for node, request in operands.items()}


def layout_(graph_module: GraphModule) -> None:
    """Exact rewrites: q, k and v get a scale each, and the scale of the scores takes no operation."""
    layout.split_projections_(graph_module)
    layout.scale_after_scores_(graph_module)


def choose(
    graph_module: GraphModule, histograms: Mapping[Node, Histogram], images: Batches, context: Context
) -> dict[Node, float]:
    """The scale of 8 bits that errs least in the logits, for each tensor by itself."""
    grids: dict[Node, list[tuple[Tensor, Tensor]]] = {
        node: [
            affine_parameters(torch.tensor(low), torch.tensor(high), torch.int8, True)
            for low, high in candidates(histogram, torch.int8, True)
        ]
        for node, histogram in histograms.items()
    }
    errors = {node: torch.zeros(len(choices), dtype=torch.float64) for node, choices in grids.items()}

    def add(node: Node, value: Tensor, gradient: Tensor) -> None:
        for i, grid in enumerate(grids[node]):
            errors[node][i] += first_order_error(value, gradient, grid).double().sum()

    watch = [([node], lambda v, g, node=node: add(node, v[0], g[0])) for node in grids]
    observe_gradients(graph_module, images, watch, context.seed, context.progress, "choose ranges")
    return {node: float(grids[node][int(error.argmin())][0]) for node, error in errors.items()}


def gelu_lacks(
    graph_module: GraphModule, scales: Mapping[Request, float], images: Batches, context: Context
) -> dict[Node, Tensor]:
    """What ShiftGELU lacks in the mean over all images, (C,), of each GELU (…, C)."""
    sums: dict[Node, Tensor] = {}
    counts: dict[Node, int] = {}

    def look(gelu: Node, scale: float, value: Tensor, x: Tensor) -> None:
        limit = 2 ** (WIDE_BITS - 1)
        codes = torch.round(x / scale).clamp(-limit, limit - 1).long()
        found = shift_gelu(codes, round(1 / (SIGMOID_SLOPE * scale)), WIDE_BITS) * (scale / limit)
        lack = (value - found).flatten(0, -2).double()  # (R, C)
        sums[gelu] = sums.get(gelu, torch.zeros(lack.shape[1])) + lack.sum(0)
        counts[gelu] = counts.get(gelu, 0) + len(lack)

    inputs = {request.nodes[0]: scale for request, scale in scales.items() if request.unit == 1 / SIGMOID_SLOPE}
    watch = {
        node: (lambda value, x, node=node, scale=inputs[node.args[0]]: look(node, scale, value, x))
        for node in graph_module.graph.nodes
        if node.target is aten.gelu.default
    }
    observe_calls(graph_module, images, watch, context.progress, "correct GELU")
    return {node: total / counts[node] for node, total in sums.items()}


def _scale(request: Request, largest: float) -> float:
    """With which codes reach the largest value, and past it but for 8 bits; no coarser than the unit."""
    reach = largest if request.bits == OPERAND_BITS else largest * HEADROOM
    scale = reach / (2 ** (request.bits - 1) - 1) if reach > 0 else 1.0
    if not request.unit:
        return scale
    return request.unit * 2.0 ** min(math.ceil(math.log2(scale / request.unit)), 0)
