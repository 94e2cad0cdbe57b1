"""The attentions of a traced graph, the Linears around them, and the scalings between those that leave the logits.

Nothing is assumed of how a library lays out its heads: channel numbers are sent through the graph's own operations, and
a Linear is named only where they come out as an attention needs them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from martlet.graph.probe import owns_parameters, parameters, readers, shapes
from martlet.graph.rounding import tensor
from martlet.graph.sites import PRODUCTS, SHAPE_ONLY, SOFTMAX, aten, is_softmax, sites, source, unrounded


@dataclass(frozen=True, eq=False)
class Channels:
    """Where an attention's channels lie in a Linear.

    index: (H, D); the row (of a Linear that gives them) or column (of one that reads them) of head h, channel d.
    """

    linear: Node
    index: Tensor


@dataclass(frozen=True, eq=False)
class Attention:
    """softmax(scale q kᵀ + …) v on the graph, and the Linears around it.

    scores, softmax, values: the nodes of q kᵀ, its softmax, and the product with v.
    q, k, v: the rows that give them; None where something else than one Linear does, or where it is read elsewhere too.
    output: the columns that read `values`; None where not one Linear alone does.
    """

    scores: Node
    softmax: Node
    values: Node
    q: Channels | None
    k: Channels | None
    v: Channels | None
    output: Channels | None


def attentions(graph_module: GraphModule) -> list[Attention]:
    """Every attention, in the order of execution.

    Best after `scale_after_scores_`: a multiplication between a Linear and the scores hides the Linear.
    """
    values, found = shapes(graph_module), []
    for site in list(sites(graph_module)):
        if site.kind != "values" or (softmax := _softmax_before(site.node)) is None:
            continue
        candidates = _products_before(softmax)
        if len(candidates) != 1:
            continue
        scores = candidates[0]
        q, k = _rows(graph_module, scores, 0, values), _rows(graph_module, scores, 1, values)
        v = _rows(graph_module, site.node, 1, values)
        if q and k and q.linear is k.linear and torch.isin(q.index, k.index).any():
            q = k = None
        output = _columns(graph_module, site.node, values)
        found.append(Attention(scores, softmax, site.node, q, k, v, output))
    return found


@dataclass(frozen=True, eq=False)
class Signals:
    """The nodes of an attention that don't depend on how it is rounded.

    scores: what the softmax reads; weights: what it gives; context: its product with v; output: what the Linear behind
    that gives; None where no Linear reads it.
    """

    scores: Node
    weights: Node
    context: Node
    output: Node | None


def signals(graph_module: GraphModule) -> list[Signals]:
    """Of every attention, in the order of execution; also of a graph that is rounded."""
    found = []
    for site in sites(graph_module):
        if site.kind != "values":
            continue
        operands = (unrounded(graph_module, a) for a in site.node.args if isinstance(a, Node))
        softmax = next(node for node in operands if is_softmax(graph_module, node))
        scores = softmax.args[0]
        assert isinstance(scores, Node)
        found.append(Signals(scores, softmax, site.node, _linear_behind(site.node)))
    return found


def _linear_behind(node: Node) -> Node | None:
    """The one Linear that reads what a node gives, moved or rounded."""
    while len(node.users) == 1:
        [node] = node.users
        if node.target is aten.linear.default:
            return node
        if node.op != "call_module" and node.target not in SHAPE_ONLY:
            return None
    return None


def scale_channels_(
    graph_module: GraphModule, attention: Attention, *, qk: Tensor | None = None, v: Tensor | None = None
) -> None:
    """Scales q, k and v in the weights that give them and undoes it in those that read them. Logits stay the same.

    Args:
        qk: (H, D) or (H D), positive; each channel of q is multiplied with it, and of k divided by it.
        v: (H, D) or (H D), positive; each channel of v is multiplied with it, and the Linear that reads the output
            divides by it.

    Raises:
        ValueError: a Linear that would have to change isn't known, or a factor isn't positive and finite.
    """
    if qk is not None and (attention.q is None or attention.k is None):
        raise ValueError(f"q and k at {attention.scores.name} don't each come from one Linear alone")
    if v is not None and (attention.v is None or attention.output is None):
        raise ValueError(f"v at {attention.values.name} doesn't go from one Linear alone to another one alone")
    if not all(bool((f > 0).all() and f.isfinite().all()) for f in (qk, v) if f is not None):
        raise ValueError(f"factors for {attention.scores.name} must be positive and finite")
    with torch.no_grad():
        if qk is not None:
            assert attention.q
            assert attention.k
            by_channel = qk.double().reshape(attention.q.index.shape)
            _scale_rows_(graph_module, attention.q, by_channel)
            _scale_rows_(graph_module, attention.k, 1 / by_channel)
        if v is not None:
            assert attention.v
            assert attention.output
            by_channel = v.double().reshape(attention.v.index.shape)
            _scale_rows_(graph_module, attention.v, by_channel)
            weight = tensor(graph_module, attention.output.linear.args[1])
            weight[:, attention.output.index] = (weight[:, attention.output.index] / by_channel).to(weight.dtype)


def _softmax_before(product: Node) -> Node | None:
    """The softmax that is a product's left operand."""
    left = product.args[0]
    assert isinstance(left, Node)
    softmax = source(left)
    return softmax if softmax.target in SOFTMAX else None


def _products_before(softmax: Node) -> list[Node]:
    """The products that reach a softmax through scale, bias and mask."""
    found, pending = dict[Node, None](), list(softmax.all_input_nodes)
    while pending:
        node = pending.pop()
        if node.target in PRODUCTS:
            found[node] = None
        elif node.target in (*SHAPE_ONLY, aten.mul.Tensor, aten.div.Tensor, aten.add.Tensor):
            pending += node.all_input_nodes
    return list(found)


def _rows(graph_module: GraphModule, product: Node, position: int, values: Mapping[Node, Any]) -> Channels | None:
    """The rows of the Linear that gives an operand (B, H, N, D), or (B, H, D, N) on the right of scores."""
    operand = product.args[position]
    assert isinstance(operand, Node)
    linear = source(operand)
    if linear.target is not aten.linear.default or not owns_parameters(graph_module, linear):
        return None
    shape = values[linear].shape
    index, elsewhere = None, []
    for consumer, node, ids in readers(linear, torch.arange(shape[-1], dtype=torch.int32).expand(shape), values):
        if consumer is not product or node is not operand:
            elsewhere.append(ids.unique())
        elif ids.ndim == 4:
            ids = ids.mT if _contracts_channels(product, position) else ids  # (B, H, N, D)
            index = ids[0, :, 0].long()  # (H, D)
            if not bool((ids == index[:, None]).all()) or len(index.unique()) != index.numel():
                return None
    if index is None or any(bool(torch.isin(index, ids).any()) for ids in elsewhere):
        return None
    return Channels(linear, index)


def _contracts_channels(product: Node, position: int) -> bool:
    """True of k, whose channels come before its tokens; v has them last, as q has."""
    left = product.args[0]
    assert isinstance(left, Node)
    return position == 1 and source(left).target not in SOFTMAX


def _columns(graph_module: GraphModule, product: Node, values: Mapping[Node, Any]) -> Channels | None:
    """The columns of the Linear that alone reads an attention's output (B, H, N, D)."""
    shape = values[product].shape
    if len(shape) != 4:
        return None
    _, heads, _, width = shape
    ids = torch.arange(heads * width, dtype=torch.int32).reshape(heads, 1, width).expand(shape)
    found = readers(product, ids, values)
    if len(found) != 1:
        return None
    linear, operand, ids = found[0]
    if linear.target is not aten.linear.default or linear.args[0] is not operand:
        return None
    columns = ids[(0,) * (ids.ndim - 1)]  # (C,)
    if not bool((ids == columns).all()) or columns.sort().values.tolist() != list(range(heads * width)):
        return None
    return Channels(linear, columns.argsort().reshape(heads, width)) if owns_parameters(graph_module, linear) else None


def _scale_rows_(graph_module: GraphModule, channels: Channels, factors: Tensor) -> None:
    """Multiplies rows of a weight, and the values of a bias, with factors (H, D)."""
    for parameter in parameters(channels.linear):
        rows = tensor(graph_module, parameter)
        picked = rows[channels.index]  # (H, D, …)
        rows[channels.index] = (picked * factors.reshape(*factors.shape, *[1] * (rows.ndim - 1))).to(rows.dtype)
