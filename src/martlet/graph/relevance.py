"""Relevance of every tensor of a traced graph for the class that an image is put in, from the logit back to the image.

Source: Chefer et al., 2021, arXiv 2012.09838, as LRP-QViT (Ranjan and Savakis, 2024, arXiv 2401.11243) uses it: the
rules of `functional.relevance` for what multiplies, adds or averages; LayerNorm, softmax, GELU and other functions of
single values pass relevance on as it is, and so does what only moves values. An addition of a parameter is a bias.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.func import vjp
from torch.fx import GraphModule, Node
from torch.fx.node import map_arg

from martlet.core.errors import UsageError
from martlet.core.technique import Progress
from martlet.functional.relevance import through_mean, through_product, through_sum
from martlet.graph.sites import CONVOLUTIONS, MASKS, PRODUCTS, SHAPE_ONLY, Site, aten
from martlet.graph.trace import Walk

SUMS = (aten.add.Tensor, aten.sub.Tensor)
MEANS = (
    aten.mean.dim,
    aten.sum.dim_IntList,
    aten.avg_pool2d.default,
    aten.adaptive_avg_pool2d.default,
    aten.adaptive_avg_pool1d.default,
    aten.upsample_nearest2d.vec,
    aten.upsample_bilinear2d.vec,
)
MOVES = (
    *SHAPE_ONLY,
    *MASKS,
    aten.cat.default,
    aten.stack.default,
    aten.constant_pad_nd.default,
    aten.pad.default,
    aten.max_pool2d.default,
    aten.index.Tensor,
    aten.index_select.default,
    aten.gather.default,
    aten.pixel_shuffle.default,
    aten.pixel_unshuffle.default,
)


def layer_relevance(
    graph_module: GraphModule, found: Sequence[Site], images: Tensor, progress: Progress
) -> dict[Node, float]:
    """The share of the predicted logit that goes through each multiplication, averaged over images (B, 3, H, W).

    From 0 to 1; what lies on no path to the logits has none.
    """
    total = dict.fromkeys((site.node for site in found), 0.0)
    for i, image in enumerate(images):
        relevances = propagate(graph_module, image[None])
        for node in total:
            if node in relevances:
                total[node] += float(relevances[node].sum())
        progress("propagate relevance", i + 1, len(images))
    return {node: share / len(images) for node, share in total.items()}


def propagate(graph_module: GraphModule, images: Tensor) -> dict[Node, Tensor]:
    """The relevance of each tensor, of its shape, for the greatest logit of each image (B, 3, H, W); that logit is 1.

    Parameters that are made part of a tensor (a class token) have theirs as well, and with these the shares that reach
    the image add up to 1 an image.

    Raises:
        UsageError: the graph has an operation that there is no rule for.
    """
    with torch.no_grad():
        return _propagate(graph_module, images)


def _propagate(graph_module: GraphModule, images: Tensor) -> dict[Node, Tensor]:
    walk = _Values(graph_module)
    walk.run(images)
    [output] = [node for node in graph_module.graph.nodes if node.op == "output"]
    [logits] = output.all_input_nodes
    best = walk.values[logits].argmax(-1, keepdim=True)
    found: dict[Node, Any] = {logits: torch.zeros_like(walk.values[logits]).scatter_(-1, best, 1.0)}
    for node in reversed(graph_module.graph.nodes):
        if node not in found or node.op in ("placeholder", "get_attr"):
            continue
        if node.target is operator.getitem and not isinstance(walk.values[node.args[0]], Tensor):
            pieces = found.setdefault(node.args[0], [torch.zeros_like(piece) for piece in walk.values[node.args[0]]])
            pieces[node.args[1]] = pieces[node.args[1]] + found[node]
            continue
        for operand, relevance in _rule(node, walk, found[node]):
            found[operand] = found[operand] + relevance if operand in found else relevance
    return {node: relevance for node, relevance in found.items() if isinstance(relevance, Tensor)}


class _Values(Walk):
    """Keeps what every node gave, and which nodes depend on the images."""

    def __init__(self, graph_module: GraphModule) -> None:
        super().__init__(graph_module)
        self.values: dict[Node, Any] = {}
        self.varying = set[Node]()

    def run_node(self, n: Node) -> object:
        self.values[n] = value = super().run_node(n)
        if n.op == "placeholder" or (
            n.target is not aten.sym_size.int and not self.varying.isdisjoint(n.all_input_nodes)
        ):
            self.varying.add(n)
        return value


def _rule(node: Node, walk: _Values, relevance: Any) -> list[tuple[Node, Tensor]]:
    """Each operand of a node with the relevance that it gets."""
    args: Any = map_arg(node.args, walk.values.__getitem__)
    kwargs: Any = map_arg(node.kwargs, walk.values.__getitem__)
    varying = [operand for operand in node.all_input_nodes if operand in walk.varying]
    if node.target is aten.linear.default or node.target in CONVOLUTIONS:
        [x] = varying
        layer = lambda a, w: node.target(a, w, None, *args[3:], **kwargs)  # type: ignore[operator]  # noqa: E731
        return [(x, through_product(layer, args[0], args[1], relevance))]
    if node.target in PRODUCTS:
        found = []
        for position in (0, 1):
            if node.args[position] in walk.varying:
                swapped = (lambda a, b: b @ a) if position else (lambda a, b: a @ b)
                share = through_product(swapped, args[position], args[1 - position], relevance)
                found.append((node.args[position], share / len(varying)))
        return found
    if node.target in MOVES:
        return _moved(node, walk, relevance)
    if node.target in SUMS and len(varying) == 2:
        return list(zip(node.args[:2], through_sum(*args[:2], relevance), strict=True))  # type: ignore[arg-type]
    if node.target is aten.mul.Tensor and len(varying) == 2:
        return [(operand, (relevance / 2).sum_to_size(walk.values[operand].shape)) for operand in varying]
    if node.target is aten.div.Tensor and len(varying) == 2:  # by a norm, which LayerNorm's rule leaves out too
        varying = [operand for operand in varying if operand is node.args[0]]
    if len(varying) == 1 and isinstance(relevance, Tensor):
        [x] = varying
        value = walk.values[x]
        if node.target in MEANS and node.args[0] is x:
            pool = lambda a: node.target(a, *args[1:], **kwargs)  # type: ignore[operator]  # noqa: E731
            return [(x, through_mean(pool, value, relevance))]
        if value.shape == relevance.shape or node.target in (*SUMS, aten.mul.Tensor, aten.div.Tensor):
            return [(x, relevance.sum_to_size(value.shape))]
    raise UsageError(f"no rule for the relevance of {node.target} at {node.name}; take allocation: milp or greedy")


def _moved(node: Node, walk: _Values, relevance: Any) -> list[tuple[Node, Tensor]]:
    """Relevance goes where each value came from."""
    operands = [operand for operand in node.all_input_nodes if _is_float(walk.values[operand])]

    def move(*values: Tensor) -> Any:
        table = dict(zip(operands, values, strict=True))
        args, kwargs = map_arg((node.args, node.kwargs), lambda a: table[a] if a in table else walk.values[a])
        return node.target(*args, **kwargs)  # type: ignore[operator]

    moved, pull, *_ = vjp(move, *(walk.values[operand] for operand in operands))
    back = relevance if isinstance(moved, Tensor) else type(moved)(relevance)
    return list(zip(operands, pull(back), strict=True))


def _is_float(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()
