"""Where a traced graph rounds its tensors: edges are chosen, hoisted, and get a quantizer layer each."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node

from martlet.core.errors import ArtifactError
from martlet.graph.sites import PERMUTATIONS
from martlet.nn.quantizers import Quantizer, build, structure

DTYPES = {"u8": torch.uint8, "s8": torch.int8}


@dataclass(frozen=True)
class Grid:
    """The kind of integer grid: `u8` or `s8`, with a zero point or symmetric about zero."""

    code: str
    symmetric: bool

    @property
    def dtype(self) -> torch.dtype:
        return DTYPES[self.code]

    def __str__(self) -> str:
        return self.code + ("_symmetric" if self.symmetric else "")


Edge = tuple[Node, Node]
"""(producer, consumer)."""


G = TypeVar("G")


@dataclass(frozen=True)
class Rounding(Generic[G]):
    """One quantizer: it rounds `producer`'s value for some of its consumers.

    grid: what these have in common; a name, where the quantizer itself says all else.
    """

    producer: Node
    consumers: tuple[Node, ...]
    grid: G

    @property
    def name(self) -> str:
        return f"rounding.{self.producer.name}_{self.grid}"


def hoist(edges: Mapping[Edge, Grid]) -> dict[Edge, Grid]:
    """Moves roundings up through operations that only move values, where all users round to the same grid.

    The result is the same; the engine then moves one byte a value and not four, and can round in the producer.
    """
    edges = dict(edges)
    work = [producer for producer, _ in edges]
    while work:
        node = work.pop()
        grids = {edges.get((node, user)) for user in node.users}
        grid = next(iter(grids))
        if node.target not in PERMUTATIONS or len(grids) != 1 or grid is None:
            continue
        above = node.args[0]
        assert isinstance(above, Node)
        for user in node.users:
            del edges[node, user]
        edges[above, node] = grid
        work.append(above)
    return edges


def group(edges: Mapping[Edge, G]) -> list[Rounding[G]]:
    """One rounding for all consumers that want the same grid of the same value."""
    groups: dict[tuple[Node, G], list[Node]] = {}
    for (producer, consumer), grid in edges.items():
        groups.setdefault((producer, grid), []).append(consumer)
    return [Rounding(producer, tuple(consumers), grid) for (producer, grid), consumers in groups.items()]


def insert_activation_(graph_module: GraphModule, rounding: Rounding, quantizer: nn.Module) -> None:
    """Puts the quantizer behind the producer, for the consumers named."""
    graph_module.add_submodule(rounding.name, quantizer)
    with graph_module.graph.inserting_after(rounding.producer):
        node = graph_module.graph.call_module(rounding.name, (rounding.producer,))
    node.meta = {k: v for k, v in rounding.producer.meta.items() if k in ("val", "nn_module_stack")}
    for consumer in rounding.consumers:
        consumer.replace_input_with(rounding.producer, node)


def insert_weight_(graph_module: GraphModule, node: Node, position: int, quantizer: nn.Module) -> None:
    """Puts the quantizer, which holds the weight itself, in the place of `node`'s parameter."""
    parameter = node.args[position]
    assert isinstance(parameter, Node)
    name = f"{parameter.target}_quantizer"
    graph_module.add_submodule(name, quantizer)
    with graph_module.graph.inserting_before(node):
        new = graph_module.graph.call_module(name)
    new.meta = {k: v for k, v in parameter.meta.items() if k == "val"}
    node.update_arg(position, new)


def clean_(graph_module: GraphModule) -> None:
    """Drops parameters and modules that no node uses any more, and recompiles."""
    graph = graph_module.graph
    graph.eliminate_dead_code()
    used = {str(node.target) for node in graph.nodes if node.op == "get_attr"}
    called = {str(node.target) for node in graph.nodes if node.op == "call_module"}
    for name, _ in [*graph_module.named_parameters(), *graph_module.named_buffers()]:
        owner, _, leaf = name.rpartition(".")
        if name not in used and owner not in called:
            delattr(graph_module.get_submodule(owner), leaf)
    graph_module.delete_all_unused_submodules()
    graph.lint()
    graph_module.recompile()


def tensor(graph_module: GraphModule, node: object) -> Tensor:
    """The parameter or buffer that a `get_attr` node names."""
    assert isinstance(node, Node) and node.op == "get_attr"
    owner, _, leaf = str(node.target).rpartition(".")
    return getattr(graph_module.get_submodule(owner), leaf)


class NamedNodes(dict[str, Node]):
    """A graph's nodes by the names that a record has of them."""

    def __init__(self, graph_module: GraphModule) -> None:
        super().__init__((node.name, node) for node in graph_module.graph.nodes)

    def __missing__(self, name: str) -> Node:
        raise missing(name)


def missing(what: str) -> ArtifactError:
    """The error that a recorded graph and this one differ."""
    return ArtifactError(f"the traced graph has no node {what!r}; it was recorded with other library versions")


def insert_(
    graph_module: GraphModule,
    activations: Mapping[Rounding, Quantizer],
    weights: Iterable[tuple[Node, int, Quantizer]],
) -> dict[str, Any]:
    """Inserts all quantizers. Returns what `restore_` needs: names of nodes, and each quantizer's structure."""
    weights = list(weights)
    record = {
        "activations": [
            [r.producer.name, [c.name for c in r.consumers], str(r.grid), structure(quantizer)]
            for r, quantizer in activations.items()
        ],
        "weights": [[node.name, position, structure(quantizer)] for node, position, quantizer in weights],
    }
    for r, quantizer in activations.items():
        insert_activation_(graph_module, r, quantizer)
    for node, position, quantizer in weights:
        insert_weight_(graph_module, node, position, quantizer)
    clean_(graph_module)
    return record


def restore_(graph_module: GraphModule, saved: Mapping[str, Any]) -> None:
    """Inserts quantizers of the recorded structure with empty tensors, to be filled from a state dict.

    Raises:
        ArtifactError: the graph has no node of a recorded name.
    """
    nodes = NamedNodes(graph_module)
    for producer, consumers, grid, its in saved["activations"]:
        rounding = Rounding(nodes[producer], tuple(nodes[c] for c in consumers), grid)
        insert_activation_(graph_module, rounding, build(its))
    for name, position, its in saved["weights"]:
        parameter = nodes[name].args[position]
        if not isinstance(parameter, Node) or parameter.op != "get_attr":
            raise missing(f"{name} with a weight at {position}")
        insert_weight_(graph_module, nodes[name], position, build(its))
    clean_(graph_module)
