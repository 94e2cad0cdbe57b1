"""Where a state space model can be rotated: where one layer reads another as it is, and where a Linear reads a gate.

Channel numbers are sent through the graph's own operations, so no library's layout is assumed.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from martlet.graph.probe import owns_parameters, readers, reads_alone, shapes
from martlet.graph.rounding import tensor
from martlet.graph.sites import Site, aten, sites, source


@dataclass(frozen=True)
class Pair:
    """Two multiplications with weights, the second of which alone reads some channels of the first, as they are.

    Mamba makes Δ so, with few channels in between; layers that were factorized do. operand: what the second reads.
    index: the first's channels (R) in the order in which the second reads them. groups: the leading sizes that both
    weights (…, O, I) have.
    """

    first: Site
    second: Site
    operand: Node
    index: Tensor
    groups: tuple[int, ...]

    def weights(self, graph_module: GraphModule) -> tuple[Tensor, Tensor]:
        """Views of both parameters, (…, O, I)."""
        return _matrix(graph_module, self.first), _matrix(graph_module, self.second)

    def rows(self, value: Tensor) -> Tensor:
        """What the second reads, of some images (B, …), as (*groups, rows, R)."""
        value = value.movedim(_contracted(self.second), -1)
        if not self.groups:
            return value.flatten(0, -2)
        return value.flatten(0, -3 - len(self.groups)).movedim(0, -3).flatten(-3, -2)


@dataclass(frozen=True)
class Gate:
    """A Linear that reads a product of two tensors (…, C), both from the image.

    norm: the LayerNorm that gives one of them and nothing else, if there is one and the Linear alone reads the product.
    """

    linear: Node
    product: Node
    norm: Node | None


def pairs(graph_module: GraphModule) -> list[Pair]:
    """Every pair of weights that nothing else shares, in the order of execution."""
    values = shapes(graph_module)
    found = {s.node: s for s in sites(graph_module) if s.kind == "linear" and _is_own(graph_module, s)}
    return [pair for site in found.values() if (pair := _pair(graph_module, site, found, values))]


def gates(graph_module: GraphModule) -> list[Gate]:
    """Every Linear that reads a gate and shares its weight with nothing, in the order of execution."""
    values, found = shapes(graph_module), list[Gate]()
    for node in graph_module.graph.nodes:
        if node.target is not aten.linear.default or not owns_parameters(graph_module, node):
            continue
        product = node.args[0]
        if product.target is not aten.mul.Tensor or not _gates(product, values):
            continue
        norms = [factor for factor in product.args if _is_own_norm(graph_module, factor)]
        found.append(Gate(node, product, norms[0] if norms and len(product.users) == 1 else None))
    return found


def _pair(
    graph_module: GraphModule, first: Site, found: Mapping[Node, Site], values: Mapping[Node, Any]
) -> Pair | None:
    shape, axis = values[first.node].shape, -2 if first.weight == 0 else -1
    numbers = torch.arange(shape[axis], dtype=torch.int32).reshape(-1, *[1] * (-axis - 1)).expand(shape)
    behind = readers(first.node, numbers, values)
    for consumer, operand, ids in behind:
        second = found.get(consumer)
        if second is None or consumer.args[second.activations[0]] is not operand:
            continue
        along = ids.movedim(_contracted(second), -1).flatten(0, -2)
        index = along[0].long()
        elsewhere = [other for user, _, other in behind if user is not consumer]
        shared = any(bool(torch.isin(index, other.long()).any()) for other in elsewhere)
        if shared or len(index.unique()) != len(index) or not bool((along == along[0]).all()):
            continue
        groups, others = (_matrix(graph_module, site).shape[:-2] for site in (first, second))
        if groups == others:
            return Pair(first, second, operand, index, tuple(groups))
    return None


def _contracted(site: Site) -> int:
    """The axis of a multiplication's operand that is summed over."""
    return -2 if site.weight == 0 else -1


def _matrix(graph_module: GraphModule, site: Site) -> Tensor:
    """A weight as (…, O, I)."""
    assert site.weight is not None
    value = tensor(graph_module, site.node.args[site.weight])
    return value.mT if site.node.target is not aten.linear.default and site.weight == 1 else value


def _is_own(graph_module: GraphModule, site: Site) -> bool:
    """Whether nothing else reads a multiplication's parameters."""
    if site.node.target is aten.linear.default:
        return owns_parameters(graph_module, site.node)
    assert site.weight is not None
    return reads_alone(graph_module, [site.node.args[site.weight]])


def _gates(product: Node, values: Mapping[Node, Any]) -> bool:
    """Whether both factors are of the product's shape, and neither is a parameter."""
    factors = [factor for factor in product.args if isinstance(factor, Node) and source(factor).op != "get_attr"]
    return len(factors) == 2 and all(values[factor].shape == values[product].shape for factor in factors)


def _is_own_norm(graph_module: GraphModule, node: object) -> bool:
    """A LayerNorm over channels with a scale, which one operation reads, and whose parameters nothing else does."""
    if not isinstance(node, Node) or node.target is not aten.layer_norm.default or len(node.users) != 1:
        return False
    scale, shift = ([*node.args[2:4], None, None])[:2]
    if scale is None or len(node.args[1]) != 1:  # type: ignore[arg-type]
        return False
    return reads_alone(graph_module, [scale] if shift is None else [scale, shift])
