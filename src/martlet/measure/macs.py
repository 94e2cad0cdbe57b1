"""Multiply–accumulates, counted on the traced graph, where fused attention is written out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import prod
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch.fx import GraphModule, Node

from martlet.nn.sparse import SPARSE_CONV1X1

if TYPE_CHECKING:
    from torch import nn

    from martlet.core.model import Model

aten = torch.ops.aten

CONVOLUTIONS = (aten.conv1d, aten.conv2d, aten.conv3d)
TRANSPOSED = (aten.conv_transpose1d, aten.conv_transpose2d, aten.conv_transpose3d)
PRODUCTS = {aten.matmul: 0, aten.bmm: 0, aten.mm: 0, aten._int_mm: 0, aten.mv: 0, aten.linear: 0}
PRODUCTS |= {aten.addmm: 1, aten.baddbmm: 1}
"""Matrix products, and where their first factor is among the arguments."""


class NodeMacs(NamedTuple):
    """attention: both factors depend on the image."""

    macs: int
    attention: bool


def macs(model: Model) -> int:
    """Per image; 1 MAC is 2 FLOPs. Elementwise work, softmax and norms count for nothing."""
    from martlet.graph.trace import example_values, trace

    size = model.preprocess.size
    module = model.module if isinstance(model.module, GraphModule) else trace(model.module, size)
    return sum(node.macs for node in macs_by_node(module, example_values(module, size)).values())


def macs_run(module: nn.Module, size: tuple[int, int]) -> int:
    """Per image, as PyTorch's own counter sees them run: what a second image adds. No trace, so it takes a second.

    module: on the meta device, where attention isn't fused, which the counter can't see into.
    """
    from torch.utils.flop_counter import FlopCounterMode

    flops = []
    for batch in (1, 2):
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            module(torch.zeros(batch, 3, *size, device="meta"))
        flops.append(counter.get_total_flops())
    return (flops[1] - flops[0]) // 2


def macs_by_node(graph_module: GraphModule, shapes: Mapping[Node, Sequence[int]]) -> dict[Node, NodeMacs]:
    """MACs of every multiplication that depends on the image, in order, for the batch that has these shapes."""
    found: dict[Node, NodeMacs] = {}
    depends: set[Node] = set()
    for node in graph_module.graph.nodes:
        if node.op != "placeholder" and depends.isdisjoint(node.all_input_nodes):
            continue
        depends.add(node)
        packet = getattr(node.target, "overloadpacket", None)
        if packet in PRODUCTS:
            first, second = node.args[PRODUCTS[packet] :][:2]
            found[node] = NodeMacs(prod(shapes[node]) * shapes[first][-1], {first, second} <= depends)
        elif packet in CONVOLUTIONS or packet in TRANSPOSED or packet is aten.convolution:
            image, weight = node.args[:2]
            transposed = packet in TRANSPOSED or (packet is aten.convolution and node.args[6])
            # weight (O, I / groups, …); transposed: (I, O / groups, …)
            found[node] = NodeMacs(prod(shapes[image if transposed else node]) * prod(shapes[weight][1:]), False)
        elif packet is SPARSE_CONV1X1:  # those that its zeros save are of the model all the same
            found[node] = NodeMacs(prod(shapes[node]) * shapes[node.args[0]][1], False)
    return found
