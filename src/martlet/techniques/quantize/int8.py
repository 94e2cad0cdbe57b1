"""int8: weights and activations of every Linear, convolution and attention product in eight bits, after training."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node

from martlet.core.errors import RecipeError, UsageError
from martlet.core.facts import Fact
from martlet.core.model import Model
from martlet.core.technique import Batches, Context, Int8Form, Stage, Technique
from martlet.functional.affine import affine_parameters
from martlet.functional.ranges import Histogram, weight_scale_mse
from martlet.graph import layout, rounding, smoothing, splitting
from martlet.graph.observe import observe, observe_calls
from martlet.graph.rounding import Edge, Grid, Rounding
from martlet.graph.sites import Site, aten, sites, source
from martlet.nn.quantizers import ActivationQuantizer, WeightQuantizer

RANGES = ("mse", "percentile", "minmax")
U8, S8 = Grid("u8", False), Grid("s8", True)


@dataclass(frozen=True, kw_only=True)
class Int8(Technique):
    """Quantize a trained model to 8-bit integers with a few unlabeled images.

    Every Linear and convolution gets integer weights, one symmetric scale an output channel, and integer inputs, one
    grid a tensor; both products of every attention get integer operands. LayerNorm, softmax and residual additions
    stay in floating point. In the form that the engine's kernels take (`Context.int8`).

    Args:
        ranges: how an activation's range follows from its values: `mse` (least squared rounding error), `percentile`
            (the central 99.99 %), or `minmax`.
        smooth: divide each channel of a LayerNorm's output by SmoothQuant's factor and multiply the weights that read
            it, with the alpha that gives each the least error. Off by default: on ViT-Ti it loses more than it gains.
        split: split outlier channels inside MLPs into equal parts.
        attention: quantize the products q kᵀ and softmax(…) v too.
        bias_correction: add to each bias the mean error that rounding gives its layer.

    Shape: none changes.
    Needs: images, without labels; 64 are enough for most models.
    Cost: three forward passes over the images in float32; at run time, one rounding a tensor.
    Paper: Nagel et al., A White Paper on Neural Network Quantization, 2021, arXiv 2106.08295: section 3.1 (ranges),
        3.3 (bias correction, analytic form replaced by its empirical one). Xiao et al., SmoothQuant, 2023,
        arXiv 2211.10438, equation 4.
    Differs: bias correction compares each layer with itself on float inputs, so layers are corrected independently of
        each other, in one pass.
    Raises: RecipeError for a setting out of range or without images; UsageError if the model multiplies nothing.
    """

    name: ClassVar[str] = "int8"
    stage: ClassVar[Stage] = Stage.GRAPH
    summary: ClassVar[str] = "8-bit weights and activations of Linear, convolution and attention"
    paper: ClassVar[str] = "Nagel et al., A White Paper on Neural Network Quantization, 2021, arXiv 2106.08295"
    requires: ClassVar[frozenset[Fact]] = frozenset({Fact.FLOAT_WEIGHTS, Fact.FLOAT_ACTIVATIONS})
    breaks: ClassVar[frozenset[Fact]] = frozenset({Fact.FLOAT_WEIGHTS, Fact.FLOAT_ACTIVATIONS, Fact.UNFUSED})
    needs_images: ClassVar[bool] = True

    ranges: str = "mse"
    smooth: bool = False
    split: bool = True
    attention: bool = True
    bias_correction: bool = True

    def __post_init__(self) -> None:
        if self.ranges not in RANGES:
            raise RecipeError(f"int8: ranges is {self.ranges!r}; it can be {', '.join(RANGES)}")

    def check(self, model: Model) -> None:
        assert isinstance(model.module, GraphModule)
        if not any(True for _ in sites(model.module)):
            raise UsageError(f"int8: {model.name} has no Linear, convolution or attention product to quantize")

    def apply_(self, model: Model, context: Context) -> dict[str, Any]:
        graph_module = model.module
        assert isinstance(graph_module, GraphModule)
        images = context.calibration(self)
        graph_module.requires_grad_(False)
        cut = layout_(graph_module)
        smoothed = smoothing.smooth_(graph_module, images, context.seed, context.progress) if self.smooth else 0
        split = splitting.split_(graph_module, images, context.seed, context.progress) if self.split else []
        found = [site for site in sites(graph_module) if self.attention or not site.is_attention]
        roundings = rounding.group(place(graph_module, found, context.int8))
        activations = self._activation_quantizers(graph_module, roundings, images, context)
        weights = {site: _weight_quantizer(graph_module, site) for site in found if site.weight is not None}
        corrected = 0
        if self.bias_correction:
            corrected = correct_biases_(graph_module, weights, activations, images, context)
        record = rounding.record(roundings, [(s.node, s.weight or 0, q.axis) for s, q in weights.items()])
        for r, quantizer in activations.items():
            rounding.insert_activation_(graph_module, r, quantizer)
        for site, quantizer in weights.items():
            rounding.insert_weight_(graph_module, site.node, site.weight or 0, quantizer)
        rounding.clean_(graph_module)
        counts = {kind: sum(site.kind == kind for site in found) for kind in sorted({site.kind for site in found})}
        return {
            "quantized": counts,
            "projections_cut": cut,
            "biases_corrected": corrected,
            "smoothed": smoothed,
            "split": split,
            "rounding": record,
        }

    def restore_(self, model: Model, record: Mapping[str, Any]) -> None:
        assert isinstance(model.module, GraphModule)
        layout_(model.module)
        splitting.restore_(model.module, record["split"])
        rounding.restore_(model.module, record["rounding"])

    def _activation_quantizers(
        self, graph_module: GraphModule, roundings: list[Rounding], images: Batches, context: Context
    ) -> dict[Rounding, ActivationQuantizer]:
        histograms = {r.producer: Histogram() for r in roundings}
        adds = {node: histogram.add for node, histogram in histograms.items()}
        observe(graph_module, images, adds, context.progress, "observe activations")
        quantizers = {}
        for i, r in enumerate(roundings):
            context.progress("choose ranges", i + 1, len(roundings))
            low, high = self._range(histograms[r.producer], r.grid)
            scale, zero = affine_parameters(torch.tensor(low), torch.tensor(high), r.grid.dtype, r.grid.symmetric)
            quantizers[r] = ActivationQuantizer(scale, zero)
        return quantizers

    def _range(self, histogram: Histogram, grid: Grid) -> tuple[float, float]:
        if self.ranges == "mse":
            return histogram.mse(grid.dtype, grid.symmetric)
        if self.ranges == "percentile":
            return histogram.percentile(99.99)
        return histogram.low, histogram.high


def layout_(graph_module: GraphModule) -> int:
    """Exact rewrites that let the engines' fused attention take q, k and v as they come. Returns how many were cut."""
    cut = layout.split_projections_(graph_module)
    layout.scale_after_scores_(graph_module)
    return cut


def place(graph_module: GraphModule, found: list[Site], form: Int8Form) -> dict[Edge, Grid]:
    """Which operands are rounded, and to which grid."""
    edges: dict[Edge, Grid] = {}
    for site in found:
        for position in site.activations:
            operand = site.node.args[position]
            assert isinstance(operand, Node)
            softmax = source(operand).target is aten.softmax.int
            signed = form.attention_signed and not softmax if site.is_attention else form.activation_signed
            edges[operand, site.node] = S8 if signed else U8
    if form.add:
        convolutions = {site.node for site in found if site.kind == "conv"}
        for node in graph_module.graph.nodes:
            if node.target is aten.add.Tensor and any(operand in convolutions for operand in node.args):
                edges |= {
                    (operand, node): U8
                    for operand in node.args
                    if isinstance(operand, Node) and operand.op != "get_attr"
                }
    return rounding.hoist(edges) if form.hoist else edges


def correct_biases_(
    graph_module: GraphModule,
    weights: Mapping[Site, WeightQuantizer],
    activations: Mapping[Rounding, ActivationQuantizer],
    images: Batches,
    context: Context,
) -> int:
    """Adds to each bias E[float output] - E[rounded output], per output channel, both fed with the float input.

    Layers without a bias are left alone. Returns how many were corrected.
    """
    quantizer_of = {(r.producer, consumer): q for r, q in activations.items() for consumer in r.consumers}
    sums: dict[Site, Tensor] = {}
    counts: dict[Site, int] = {}

    def compare(site: Site, quantizer: WeightQuantizer) -> Any:
        operand = site.node.args[site.activations[0]]
        assert isinstance(operand, Node)
        round_input = _quantizer_on_path(operand, site.node, quantizer_of)
        rounded_weight = quantizer()

        def look(value: Tensor, *arguments: Any) -> None:
            arguments = (round_input(arguments[0]), rounded_weight, *arguments[2:])
            error = value - site.node.target(*arguments)  # type: ignore[operator]
            channels = error.movedim(1, -1) if site.kind == "conv" else error
            total = channels.flatten(0, -2).sum(0)  # (O)
            sums[site] = sums.get(site, torch.zeros_like(total)) + total
            counts[site] = counts.get(site, 0) + channels.flatten(0, -2).shape[0]

        return look

    biased = [
        s for s in weights if s.node.target is not aten.matmul.default and len(s.node.args) > 2 and s.node.args[2]
    ]
    watch = {site.node: compare(site, weights[site]) for site in biased}
    observe_calls(graph_module, images, watch, context.progress, "correct biases")
    with torch.no_grad():
        for site in biased:
            rounding.tensor(graph_module, site.node.args[2]).add_(sums[site] / counts[site])
    return len(biased)


def _quantizer_on_path(operand: Node, consumer: Node, quantizer_of: Mapping[Edge, ActivationQuantizer]) -> nn.Module:
    """The quantizer that a rounding, perhaps hoisted, gives to this operand."""
    node, user = operand, consumer
    while (node, user) not in quantizer_of:
        above = node.args[0]
        assert isinstance(above, Node)
        node, user = above, node
    return quantizer_of[node, user]


def _weight_quantizer(graph_module: GraphModule, site: Site) -> WeightQuantizer:
    """Integer codes of a weight, one scale an output channel, with the least squared rounding error."""
    weight = rounding.tensor(graph_module, site.node.args[site.weight or 0]).detach()
    axis = 0 if site.node.target not in (aten.matmul.default, aten.mm.default) else weight.ndim - 1
    rows = weight.movedim(axis, 0).flatten(1)  # (O, …)
    return WeightQuantizer.round(weight, weight_scale_mse(rows), axis)
