"""Cuts a traced graph where one tensor alone goes on, and takes out what lies between two cuts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from torch.fx import Graph, GraphModule, Node

from martlet.graph.sites import aten, sites


@dataclass(frozen=True)
class Segment:
    """From a tensor (B, …) to another that all that follows depends on alone.

    names: of its multiplications, as sites have them.
    """

    input: Node
    output: Node
    names: tuple[str, ...]


def blocks(graph_module: GraphModule) -> list[Segment]:
    """The whole graph, in as small pieces as multiply something; an attention and the MLP behind it are one.

    That is a transformer's block, and in a hybrid model also what bridges a stage of convolutions and one of attention.
    """
    cuts, found = _cuts(graph_module), list(sites(graph_module))
    order = {node: i for i, node in enumerate(graph_module.graph.nodes)}
    pieces: list[Segment] = []
    start, names, attention_last = cuts[0], list[str](), False
    for above, cut in pairwise(cuts):
        inside = [site for site in found if order[above] < order[site.node] <= order[cut]]
        names += [site.name for site in inside]
        attention_last = any(site.is_attention for site in inside) if inside else attention_last
        if inside and not attention_last:
            pieces.append(Segment(start, cut, tuple(names)))
            start, names = cut, []
    if names or not pieces:
        pieces.append(Segment(start, cuts[-1], tuple(names)))
    pieces[-1] = Segment(pieces[-1].input, cuts[-1], pieces[-1].names)
    return pieces


def bridges(graph_module: GraphModule) -> list[Segment]:
    """What joins convolutions and attention, in order: blocks of both, or the last of one and the first of the other.

    A patch embedding alone is joined to nothing.
    """
    kinds = {site.name: site for site in sites(graph_module)}
    pieces, found = blocks(graph_module), list[Segment]()
    for i, piece in enumerate(pieces):
        its = [kinds[name] for name in piece.names]
        if not any(site.is_attention for site in its):
            continue
        if any(site.kind == "conv" for site in its):
            found.append(piece)
        elif i > 1 and all(kinds[name].kind == "conv" for name in pieces[i - 1].names):
            before = pieces[i - 1]
            found.append(Segment(before.input, piece.output, (*before.names, *piece.names)))
    return found


def extract(graph_module: GraphModule, first: Node, last: Node) -> GraphModule:
    """A module from one tensor to another. It shares the parameters and the layers of the whole."""
    order = {node: i for i, node in enumerate(graph_module.graph.nodes)}
    needed, pending = set[Node](), [last]
    while pending:
        node = pending.pop()
        if node in needed or node is first:
            continue
        needed.add(node)
        if node.target is aten.sym_size.int and order[node.args[0]] <= order[first]:  # type: ignore[index]
            continue
        pending += node.all_input_nodes
    graph = Graph()
    taken = {first: graph.placeholder("x")}
    for node in graph_module.graph.nodes:
        if node not in needed:
            continue
        if node.target is aten.sym_size.int and node.args[0] not in taken:
            taken[node] = graph.call_function(aten.sym_size.int, (taken[first], node.args[1]))
        else:
            taken[node] = graph.node_copy(node, taken.__getitem__)
    graph.output(taken[last])
    return GraphModule(graph_module, graph)


def _cuts(graph_module: GraphModule) -> Sequence[Node]:
    """The image, every node behind which nothing earlier is read, and the last before the output."""
    order = {node: i for i, node in enumerate(graph_module.graph.nodes)}
    varying = set[Node]()
    cuts, until = [], -1
    for node in graph_module.graph.nodes:
        if node.op == "output":
            break
        sizes = node.target is aten.sym_size.int
        if node.op != "placeholder" and (sizes or not varying.intersection(node.all_input_nodes)):
            continue
        varying.add(node)
        tensors = [user for user in node.users if user.target is not aten.sym_size.int]
        if until <= order[node]:
            cuts.append(node)
        until = max([until, *(order[user] for user in tensors)])
    return cuts
