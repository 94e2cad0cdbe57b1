"""int8: weights and activations of every Linear, convolution and attention product in eight bits, after training."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from martlet.core.errors import RecipeError, UsageError, nearest
from martlet.core.facts import Fact
from martlet.core.model import Model
from martlet.core.technique import Batches, Choices, Context, Int8Form, Stage, Technique
from martlet.data.calibration import First
from martlet.functional.quantize.affine import affine_parameters
from martlet.functional.quantize.ranges import Histogram, candidates, first_order_error
from martlet.graph import attention, rounding
from martlet.graph.observe import observe, observe_calls, observe_gradients
from martlet.graph.rewrite import layout, shifting, smoothing, splitting
from martlet.graph.rounding import Edge, Grid, Rounding
from martlet.graph.sites import SHAPE_ONLY, Site, aten, sites, source, within
from martlet.nn.quantizers import ActivationQuantizer, WeightQuantizer

RANGES = ("logits", "mse", "percentile", "minmax")
IMAGES = 64
"""That ranges are learned from, at most."""
U8, S8 = Grid("u8", False), Grid("s8", True)


@dataclass(frozen=True, kw_only=True)
class Int8(Technique):
    """Quantize a trained model to 8-bit integers with a few unlabeled images.

    Every Linear and convolution gets integer weights, one symmetric scale an output channel, and integer inputs, one
    grid a tensor; both products of every attention get integer operands. LayerNorm, softmax and residual additions
    stay in floating point. In the form that the engine's kernels take (`Context.int8`).

    Args:
        ranges: how an activation's range follows from its values: `logits` (least squared error of the logits, to first
            order), `mse` (least squared rounding error), `percentile` (the central 99.99 %), or `minmax`.
        shift: centre LayerNorm outputs and v around zero, undone in the biases that follow.
        smooth: divide each channel of a LayerNorm's output by SmoothQuant's factor and multiply the weights that read
            it, with the alpha that gives each the least error.
        split: split outlier channels inside MLPs into equal parts.
        attention: quantize the products q kᵀ and softmax(…) v too.
        bias_correction: add to each bias the mean error that rounding its layer's weight gives.
        float_layers: what stays in floating point, by the names that `martlet inspect` shows: layers
            (`blocks.3.mlp.fc2`), attention products (`blocks.3.attn.scores`, `blocks.3.attn.values`), or modules, which
            stand for all in them (`blocks.3.attn`). `martlet search` finds which are worth it.

    Shape: none changes.
    Needs: images, without labels; of more than 64 the first 64 are used, which are enough, so that another pass that
        wants more doesn't make this one slow.
    Cost: four forward and two backward passes over the images in float32; at run time, one rounding a tensor.
    Paper: Nagel et al., A White Paper on Neural Network Quantization, 2021, arXiv 2106.08295: section 3.1 (ranges),
        3.3 (bias correction in its empirical form, for the rounded weights). Yuan et al., PTQ4ViT, 2022,
        arXiv 2111.12293 (ranges). Wei et al., Outlier Suppression+, 2023, arXiv 2304.09145
        (shift). Zhao et al., Outlier Channel Splitting, 2019, arXiv 1901.09504. Xiao et al., SmoothQuant, 2023,
        arXiv 2211.10438, equation 4.
    Differs: layers are corrected independently of each other, in one pass, on float inputs.
    Raises: RecipeError for a setting out of range, a layer that isn't there, or without images; UsageError if the model
        multiplies nothing.
    """

    name: ClassVar[str] = "int8"
    stage: ClassVar[Stage] = Stage.GRAPH
    summary: ClassVar[str] = "8-bit weights and activations of Linear, convolution and attention"
    paper: ClassVar[str] = "Nagel et al., A White Paper on Neural Network Quantization, 2021, arXiv 2106.08295"
    requires: ClassVar[frozenset[Fact]] = frozenset({Fact.FLOAT_WEIGHTS, Fact.FLOAT_ACTIVATIONS})
    breaks: ClassVar[frozenset[Fact]] = frozenset({Fact.FLOAT_WEIGHTS, Fact.FLOAT_ACTIVATIONS, Fact.UNFUSED})
    needs_images: ClassVar[bool] = True

    ranges: str = "logits"
    shift: bool = True
    smooth: bool = True
    split: bool = True
    attention: bool = True
    bias_correction: bool = True
    float_layers: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.ranges not in RANGES:
            raise RecipeError(f"int8: ranges is {self.ranges!r}; it can be {', '.join(RANGES)}")
        names = self.float_layers
        if not isinstance(names, list | tuple) or not all(isinstance(name, str) for name in names):
            raise RecipeError(f"int8: float_layers is {names!r}; it can be a list of names, as in [blocks.3.mlp.fc2]")
        object.__setattr__(self, "float_layers", tuple(names))

    def check(self, model: Model) -> None:
        assert isinstance(model.module, GraphModule)
        found = list(sites(model.module))
        if not found:
            raise UsageError(f"int8: {model.name} has no Linear, convolution or attention product to quantize")
        names = [site.name for site in found]
        for path in self.float_layers:
            if not any(within(name, path) for name in names):
                raise RecipeError(
                    f"int8: float_layers names {path!r}, and {model.name} has no such layer{nearest(path, names)} "
                    "(see: martlet inspect)"
                )
        if self.float_layers and not any(map(self.rounds, found)):
            raise RecipeError("int8: float_layers leaves nothing to quantize; name fewer, or leave int8 out")

    def space(self) -> Choices:
        from martlet.recipe_search.precision import Precision

        return Choices(settings={"ranges": ("logits", "mse"), "smooth": (True, False)}, front=Precision)

    def rounds(self, site: Site) -> bool:
        """Whether a multiplication is rounded, or stays in floating point."""
        if site.is_attention and not self.attention:
            return False
        return not any(within(site.name, path) for path in self.float_layers)

    def apply_(self, model: Model, context: Context) -> dict[str, Any]:
        graph_module = model.module
        assert isinstance(graph_module, GraphModule)
        plan = self.plan_(graph_module, context)
        with torch.no_grad():
            for site, correction in plan.corrections.items():
                rounding.tensor(graph_module, site.node.args[2]).add_(correction)
        weights = [(site.node, site.weight or 0, quantizer) for site, quantizer in plan.weights.items()]
        return {**plan.record, "rounding": rounding.insert_(graph_module, plan.activations, weights)}

    def plan_(self, graph_module: GraphModule, context: Context) -> Plan:
        """Decides how everything is rounded, and rounds nothing: the graph is changed, and its logits are the same."""
        images = First(context.calibration(self), IMAGES)
        graph_module.requires_grad_(False)
        cut = layout_(graph_module)
        every = list(sites(graph_module))
        found = [site for site in every if self.rounds(site)]
        rounded = {site.node for site in found}
        seed, progress = context.seed, context.progress
        centred = shifting.shift_(graph_module, images, progress) if self.shift else 0
        smoothed = smoothing.smooth_(graph_module, images, seed, progress, rounded) if self.smooth else 0
        split = splitting.split_(graph_module, images, seed, progress, rounded) if self.split else []
        roundings = rounding.group(place(graph_module, found, context.int8))
        activations = self._activation_quantizers(graph_module, roundings, images, context)
        if context.int8.hoist:
            activations = share_grids_(graph_module, activations)
        weights = {site: _weight_quantizer(graph_module, site) for site in found if site.weight is not None}
        corrections = bias_corrections(graph_module, weights, images, context) if self.bias_correction else {}
        left = [site.name for site in every if site.node not in rounded]
        record = {
            "quantized": dict(sorted(Counter(site.kind for site in found).items())),
            **({"in_floating_point": left} if left else {}),
            "projections_cut": cut,
            "biases_corrected": len(corrections),
            "centred": centred,
            "smoothed": smoothed,
            "split": split,
        }
        return Plan(found, activations, weights, corrections, record)

    def restore_(self, model: Model, record: Mapping[str, Any]) -> None:
        assert isinstance(model.module, GraphModule)
        layout_(model.module)
        splitting.restore_(model.module, record["split"])
        rounding.restore_(model.module, record["rounding"])

    def _activation_quantizers(
        self, graph_module: GraphModule, roundings: list[Rounding[Grid]], images: Batches, context: Context
    ) -> dict[Rounding[Grid], ActivationQuantizer]:
        histograms = {r.producer: Histogram() for r in roundings}
        adds = {node: histogram.add for node, histogram in histograms.items()}
        observe(graph_module, images, adds, context.progress, "observe activations")
        found = {r: self._candidates(histograms[r.producer], r.grid) for r in roundings}
        grids = {
            r: [
                affine_parameters(torch.tensor(low), torch.tensor(high), r.grid.dtype, r.grid.symmetric)
                for low, high in ranges
            ]
            for r, ranges in found.items()
        }
        best = (
            choose_grids(graph_module, grids, images, context) if self.ranges == "logits" else dict.fromkeys(grids, 0)
        )
        return {r: ActivationQuantizer(*grids[r][i]) for r, i in best.items()}

    def _candidates(self, histogram: Histogram, grid: Grid) -> list[tuple[float, float]]:
        """The ranges to choose among; one, where the values alone decide."""
        if self.ranges == "logits":
            return candidates(histogram, grid.dtype, grid.symmetric)
        if self.ranges == "mse":
            return [histogram.mse(grid.dtype, grid.symmetric)]
        if self.ranges == "percentile":
            return [histogram.percentile(99.99)]
        return [(histogram.low, histogram.high)]


@dataclass(frozen=True)
class Plan:
    """How a graph is going to be rounded.

    sites: what is rounded. activations, weights: their quantizers. corrections: (O), what comes to a bias with that.
    record: what is told of it.
    """

    sites: list[Site]
    activations: dict[Rounding[Grid], ActivationQuantizer]
    weights: dict[Site, WeightQuantizer]
    corrections: dict[Site, Tensor]
    record: dict[str, Any]

    def rounded(self, site: Site) -> Callable[..., Tensor]:
        """What takes the arguments of a site's node and gives its value with operands and weight rounded."""
        quantizer_of = {(r.producer, consumer): q for r, q in self.activations.items() for consumer in r.consumers}
        changes: dict[int, Callable[[Tensor], Tensor]] = {}
        for position in site.activations:
            operand = site.node.args[position]
            assert isinstance(operand, Node)
            if quantizer := _quantizer_on_path(operand, site.node, quantizer_of):
                changes[position] = quantizer
        if site in self.weights:
            changes[site.weight or 0] = lambda weight: self.weights[site]()
        if site in self.corrections:
            changes[2] = lambda bias: bias + self.corrections[site]

        def call(*args: Any, **kwargs: Any) -> Tensor:
            now = (changes[i](a) if i in changes else a for i, a in enumerate(args))
            return site.node.target(*now, **kwargs)  # type: ignore[operator]

        return call


def layout_(graph_module: GraphModule) -> int:
    """Exact rewrites that let the engines' fused attention take q, k and v as they come. Returns how many were cut."""
    cut = layout.split_projections_(graph_module) + layout.split_convolutions_(graph_module)
    layout.scale_after_scores_(graph_module)
    layout.flatten_masks_(graph_module)
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
            between = convolutions.intersection(node.args) and convolutions.intersection(node.users)
            if node.target is aten.add.Tensor and between:
                edges |= {
                    (operand, node): U8
                    for operand in node.args
                    if isinstance(operand, Node) and operand.op != "get_attr"
                }
    return rounding.hoist(edges) if form.hoist else edges


def choose_grids(
    graph_module: GraphModule,
    grids: Mapping[Rounding[Grid], list[tuple[Tensor, Tensor]]],
    images: Batches,
    context: Context,
) -> dict[Rounding[Grid], int]:
    """Which of its grids (scale, zero point) errs least in the logits, for each rounding by itself."""
    errors = {r: torch.zeros(len(choices), dtype=torch.float64) for r, choices in grids.items()}

    def add(r: Rounding[Grid], value: Tensor, gradient: Tensor) -> None:
        for i, grid in enumerate(grids[r]):
            errors[r][i] += first_order_error(value, gradient, grid).double().sum()

    watch = [([r.producer], lambda v, g, r=r: add(r, v[0], g[0])) for r in grids]
    observe_gradients(graph_module, images, watch, context.seed, context.progress, "choose ranges")
    return {r: int(error.argmin()) for r, error in errors.items()}


def share_grids_(
    graph_module: GraphModule, quantizers: Mapping[Rounding[Grid], ActivationQuantizer]
) -> dict[Rounding[Grid], ActivationQuantizer]:
    """Gives q, k and v that come from one Linear one grid, on its output, so that the Linear's kernel rounds them.

    Each keeps the resolution it had: the Linear's rows are scaled until the three grids are equal, which q and k undo
    in each other, and v in the Linear that reads the attention's output.
    """
    shared = dict(quantizers)
    quantizer_of = {(r.producer, consumer): q for r, q in quantizers.items() for consumer in r.consumers}
    for found in attention.attentions(graph_module):
        q, k, v, output = found.q, found.k, found.v, found.output
        if not (q and k and v and output) or not q.linear is k.linear is v.linear:
            continue
        own = {_operand(r.producer, found): r for r in shared if source(r.producer) is q.linear}
        pieces = {piece for user in q.linear.users for piece in user.users}
        if set(own) != {"q", "k", "v"} or {r.producer for r in own.values()} != pieces or len(q.linear.users) != 1:
            continue
        if any(r.grid != S8 or set(r.consumers) != set(r.producer.users) for r in own.values()):
            continue
        scale = {name: shared.pop(r).scale for name, r in own.items()}
        common = (scale["q"] * scale["k"]).sqrt()
        by_v = common / scale["v"]
        qk = (common / scale["q"]).expand(q.index.shape)
        attention.scale_channels_(graph_module, found, qk=qk, v=by_v.expand(v.index.shape))
        operand = output.linear.args[0]
        assert isinstance(operand, Node)
        if after := _quantizer_on_path(operand, output.linear, quantizer_of):
            after.scale.mul_(by_v)
        shared[Rounding(q.linear, tuple(q.linear.users), S8)] = ActivationQuantizer(
            common, torch.zeros((), dtype=S8.dtype)
        )
    return shared


def _operand(piece: Node, among: attention.Attention) -> str:
    """Which operand of the attention a piece of a Linear's output becomes; empty if none."""
    node = piece
    while len(node.users) == 1:
        node, above = next(iter(node.users)), node
        if node is among.scores:
            return "q" if node.args[0] is above else "k"
        if node is among.values:
            return "v" if node.args[1] is above else ""
    return ""


def bias_corrections(
    graph_module: GraphModule, weights: Mapping[Site, WeightQuantizer], images: Batches, context: Context
) -> dict[Site, Tensor]:
    """What each bias lacks, E[W x] - E[Ŵ x] (O), for the rounded weight Ŵ. Layers without a bias have none."""
    sums: dict[Site, Tensor] = {}
    counts: dict[Site, int] = {}

    def compare(site: Site, quantizer: WeightQuantizer) -> Any:
        rounded = quantizer()

        def look(value: Tensor, x: Tensor, weight: Tensor, *arguments: Any) -> None:
            error = value - site.node.target(x, rounded, *arguments)  # type: ignore[operator]
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
    return {site: sums[site] / counts[site] for site in biased}


def _quantizer_on_path(
    operand: Node, consumer: Node, quantizer_of: Mapping[Edge, ActivationQuantizer]
) -> ActivationQuantizer | None:
    """The quantizer that a rounding, perhaps hoisted, gives to this operand; None where it isn't rounded."""
    node, user = operand, consumer
    while (node, user) not in quantizer_of:
        if node.target not in SHAPE_ONLY:
            return None
        above = node.args[0]
        assert isinstance(above, Node)
        node, user = above, node
    return quantizer_of[node, user]


def _weight_quantizer(graph_module: GraphModule, site: Site) -> WeightQuantizer:
    """Integer codes of a weight, one scale an output channel, with the least squared rounding error."""
    weight = rounding.tensor(graph_module, site.node.args[site.weight or 0]).detach()
    return WeightQuantizer.fit(weight, site.output_axis)
