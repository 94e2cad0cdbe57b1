"""What a traced graph says of itself: shapes, where channels go, whose parameters are whose; and how to add to it.

Nothing is assumed of how a library lays out its heads: channel numbers are sent through the graph's own operations.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx import Graph, GraphModule, Interpreter, Node
from torch.fx.node import map_arg

from martlet.graph.rounding import tensor
from martlet.graph.sites import SHAPE_ONLY, aten

PROBE_BATCH = 5
"""Images in a probe; unlike the sizes that stand first in a shape, so that none is taken for the batch."""


def shapes(graph_module: GraphModule) -> Mapping[Node, Any]:
    """What every node gives for a few images: tensors with a shape and no data, and whole numbers."""
    image = next(node for node in graph_module.graph.nodes if node.op == "placeholder")
    dtype = next(p.dtype for p in graph_module.parameters() if p.is_floating_point())
    run = _Run(graph_module)
    with torch.no_grad(), FakeTensorMode(allow_non_fake_inputs=True):
        run.run(torch.empty(PROBE_BATCH, *(int(size) for size in image.meta["val"].shape[1:]), dtype=dtype))
    return run.values


class _Run(Interpreter):
    """Runs a graph and keeps what every node gave."""

    def __init__(self, graph_module: GraphModule) -> None:
        super().__init__(graph_module, garbage_collect_values=False)
        self.values: dict[Node, Any] = {}

    def run_node(self, n: Node) -> Any:
        self.values[n] = value = super().run_node(n)
        return value


def route(node: Node, value: Tensor, values: Mapping[Node, Any]) -> Any:
    """What an operation that only moves values gives for another first argument."""
    args = map_arg(node.args[1:], lambda a: values[a])
    return node.target(value, *args, **map_arg(node.kwargs, lambda a: values[a]))  # type: ignore[operator]


def readers(node: Node, ids: Tensor, values: Mapping[Node, Any]) -> list[tuple[Node, Node, Tensor]]:
    """Who computes with what a node gives: (consumer, the node it reads, the channel number of each value there)."""
    found, pending = [], [(node, ids)]
    while pending:
        node, ids = pending.pop()
        for user in node.users:
            if user.target in SHAPE_ONLY and user.args[0] is node:
                pending.append((user, route(user, ids, values)))
            elif user.target is not aten.sym_size.int:
                found.append((user, node, ids))
    return found


def parameters(linear: Node) -> list[object]:
    """The weight of a Linear, and its bias if it has one."""
    return [argument for argument in linear.args[1:3] if argument is not None]


def owns_parameters(graph_module: GraphModule, linear: Node) -> bool:
    """True if a Linear's weight and bias are parameters that nothing else reads, under whatever name."""
    return reads_alone(graph_module, parameters(linear))


def reads_alone(graph_module: GraphModule, operands: Sequence[object]) -> bool:
    """True if all operands of an operation are parameters that nothing else reads, under whatever name."""
    own = [a for a in operands if isinstance(a, Node) and a.op == "get_attr" and len(a.users) == 1]
    if len(own) != len(operands):
        return False
    memory = {tensor(graph_module, node).untyped_storage().data_ptr() for node in own}
    others = [node for node in graph_module.graph.nodes if node.op == "get_attr" and node not in own]
    return memory.isdisjoint(tensor(graph_module, node).untyped_storage().data_ptr() for node in others)


def call(graph: Graph, like: Node, target: Any, *args: Any) -> Node:
    """A new call that says it comes from the same module as `like`."""
    node = graph.call_function(target, args)
    node.meta = {key: like.meta[key] for key in ("nn_module_stack", "stack_trace") if key in like.meta}
    return node


def finish(graph_module: GraphModule) -> None:
    graph_module.graph.lint()
    graph_module.recompile()
