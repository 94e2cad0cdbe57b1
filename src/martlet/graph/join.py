"""Joins the graphs of several models into one, in which an image goes on from each to the next."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.fx import Graph, GraphModule, Node

from martlet.nn.exits import LEAVE, Exit

aten = torch.ops.aten


class Member(NamedTuple):
    """A model of a cascade: its graph, and the scale and shift (3, 1, 1) that turn the images into its own."""

    module: GraphModule
    scale: Tensor
    shift: Tensor


def join(members: Sequence[Member], average: bool) -> GraphModule:
    """A graph from images (B, 3, H, W) to the logits (B, K) with which each image leaves, cheapest member first.

    average: after each member, images leave with the logarithm of the mean of the members' probabilities so far; else
    with the last member's logits. Confidence is the largest probability of these. The windows are `exits.0.window` …
    """
    root = nn.Module()
    root.members = nn.ModuleList([member.module for member in members])
    root.exits = nn.ModuleList([Exit(nn.Identity()) for _ in members[1:]])
    graph = Graph()
    images = graph.placeholder("images")
    call = graph.call_function
    answers: list[Node] = []
    total: Node | None = None  # of probabilities
    for i, member in enumerate(members):
        x = images
        if not (torch.all(member.scale == 1) and torch.all(member.shift == 0)):
            root.register_buffer(f"scale{i}", member.scale)
            root.register_buffer(f"shift{i}", member.shift)
            x = call(
                aten.add.Tensor, (call(aten.mul.Tensor, (x, graph.get_attr(f"scale{i}"))), graph.get_attr(f"shift{i}"))
            )
        logits = _copy(graph, member.module, x, f"members.{i}.")
        if average:
            probabilities = call(aten.softmax.int, (logits, 1))
            total = probabilities if total is None else call(aten.add.Tensor, (total, probabilities))
            logits = call(aten.log.default, (call(aten.mul.Tensor, (total, 1 / (i + 1))),)) if i else logits
        answers.append(logits)
    later = answers[-1]
    for i, logits in reversed([*enumerate(answers[:-1])]):
        highest = call(aten.amax.default, (logits, [1], True))
        powers = call(aten.exp.default, (call(aten.sub.Tensor, (logits, highest)),))
        confidence = call(aten.reciprocal.default, (call(aten.sum.dim_IntList, (powers, [1])),))
        later = call(LEAVE, (logits, confidence, later, graph.get_attr(f"exits.{i}.window")))
    graph.output(later)
    return GraphModule(root, graph)


def _copy(graph: Graph, module: GraphModule, x: Node, prefix: str) -> Node:
    """Writes a module's graph behind x. Returns its result."""
    copies: dict[Node, Node] = {}
    for node in module.graph.nodes:
        if node.op == "placeholder":
            copies[node] = x
        elif node.op == "output":
            result = node.args[0]
            while isinstance(result, tuple | list):
                [result] = result
            assert isinstance(result, Node)
            return copies[result]
        else:
            copies[node] = graph.node_copy(node, copies.__getitem__)
            if node.op in ("get_attr", "call_module"):
                copies[node].target = prefix + str(node.target)
    raise AssertionError("a graph ends in its output")
