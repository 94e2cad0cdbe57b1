"""From an `nn.Module` to a graph on which attention products are products."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch.fx import GraphModule, Interpreter, Node
from torch.fx.node import map_arg

from martlet.core.errors import SourceError
from martlet.graph.rewrite.fold import fold_batch_norms_

aten = torch.ops.aten
MAX_BATCH = 4096


def trace(module: nn.Module, size: tuple[int, int]) -> GraphModule:
    """Captures the module in inference mode for any batch size and one image size (H, W).

    Returns a graph from images (B, 3, H, W) to logits (B, K), as `capture` says.

    Raises:
        SourceError: `torch.export` can't capture the module.
    """
    return capture(module, torch.zeros(2, 3, *size))


def capture(module: nn.Module, example: torch.Tensor) -> GraphModule:
    """Captures a module of one input like `example` (2, …), at any other batch size: images, or a text's tokens.

    In the graph dropout is gone, batch norms are folded into the layer before, and fused attention is written out.
    Every parameter keeps its name.

    Raises:
        SourceError: `torch.export` can't capture the module.
    """
    batch = {0: torch.export.Dim("batch", min=1, max=MAX_BATCH)}
    try:
        with torch.no_grad():
            program = torch.export.export(module.eval(), (example,), dynamic_shapes=(batch,))
        einsum = aten.einsum.default
        program = program.run_decompositions({einsum: torch.export.default_decompositions()[einsum]})
        graph_module = program.module(check_guards=False)  # fails for parameters named `graph` or `code`
    except Exception as error:
        first = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise SourceError(
            f"torch.export can't capture this {type(module).__name__} for any batch size: {first}"
        ) from error
    assert isinstance(graph_module, GraphModule)
    simplify_(graph_module)
    fold_batch_norms_(graph_module)
    write_out_attention_(graph_module)
    graph_module.graph.eliminate_dead_code()
    graph_module.graph.lint()
    graph_module.recompile()
    return graph_module


class Walk(Interpreter):
    """Runs a graph node by node; an error in it is the one line that it is."""

    def __init__(self, graph_module: GraphModule) -> None:
        super().__init__(graph_module)
        self.extra_traceback = False


def example_values(graph_module: GraphModule, size: tuple[int, int], batch: int = 1) -> dict[Node, torch.Size]:
    """The shape of every tensor of the graph at one batch size."""
    return shapes_of(graph_module, [torch.zeros(batch, 3, *size)])[0]


def shapes_of(graph_module: GraphModule, inputs: Sequence[torch.Tensor]) -> tuple[dict[Node, torch.Size], Any]:
    """The shape of every tensor of the graph for some inputs, and what it gives."""
    shapes: dict[Node, torch.Size] = {}

    class Shapes(Walk):
        def run_node(self, n: Node) -> object:
            value = super().run_node(n)
            if isinstance(value, torch.Tensor):
                shapes[n] = value.shape
            return value

    with torch.no_grad():
        result = Shapes(graph_module).run(*inputs)
    return shapes, result


def simplify_(graph_module: GraphModule) -> None:
    """Removes what does nothing in inference, and writes every change of shape as `reshape`.

    `view` asks for strides that a rewritten neighbour need not give; `reshape` doesn't.
    """
    graph = graph_module.graph
    identities = {aten.dropout, aten.detach, aten.alias, aten.clone, aten.lift_fresh_copy}
    for node in list(graph.nodes):
        packet = getattr(node.target, "overloadpacket", None)
        if packet in identities or (packet is aten.pad and not any(node.args[1])):
            node.replace_all_uses_with(node.args[0])
            graph.erase_node(node)
        elif packet in (aten.view, aten._unsafe_view) and node.target is not aten.view.dtype:
            node.target = aten.reshape.default
        elif packet is aten._assert_tensor_metadata:
            graph.erase_node(node)


def write_out_attention_(graph_module: GraphModule) -> None:
    """Replaces scaled dot-product attention by softmax(q kᵀ / sqrt(d) + mask) v, so that both products can be seen.

    The scale is multiplied into q, which is smaller than the scores.
    """
    graph = graph_module.graph
    for node in list(graph.nodes):
        if node.target != aten.scaled_dot_product_attention.default:
            continue
        argument: dict[str, object] = dict(
            zip(("query", "key", "value", "attn_mask", "dropout_p", "is_causal"), node.args, strict=False)
        )
        argument.update(node.kwargs)
        query, key, value, mask = (argument.get(name) for name in ("query", "key", "value", "attn_mask"))
        if argument.get("is_causal") or argument.get("enable_gqa"):
            raise SourceError(f"attention at {node.name} is causal or grouped, which no vision encoder here should be")
        assert isinstance(query, Node)
        with graph.inserting_before(node):

            def call(target: object, *args: object, like: Node = node) -> Node:
                new = graph.call_function(target, args)  # type: ignore[arg-type]
                new.meta = {k: like.meta[k] for k in ("nn_module_stack", "stack_trace") if k in like.meta}
                return new

            scale = argument.get("scale") or query.meta["val"].shape[-1] ** -0.5
            transposed = call(aten.transpose.int, key, -2, -1)  # (B, H, D, N)
            scores = call(aten.matmul.default, call(aten.mul.Tensor, query, scale), transposed)  # (B, H, N, N)
            if isinstance(mask, Node):
                if mask.meta["val"].dtype != torch.bool:
                    scores = call(aten.add.Tensor, scores, mask)
                elif not _masks_nothing(graph_module, mask):  # True takes part
                    scores = call(aten.masked_fill.Scalar, scores, call(aten.logical_not.default, mask), float("-inf"))
            output = call(aten.matmul.default, call(aten.softmax.int, scores, -1), value)  # (B, H, N, D)
        output.meta["val"] = node.meta["val"]
        node.replace_all_uses_with(output)
        graph.erase_node(node)


def _masks_nothing(graph_module: GraphModule, mask: Node) -> bool:
    """True if a boolean mask is all True whatever the images: computed from their number alone."""
    needed, work = set[Node](), [mask]
    while work:
        node = work.pop()
        if node.op == "placeholder":
            return False
        if node not in needed:
            needed.add(node)
            work += [] if node.target is aten.sym_size.int else node.all_input_nodes
    values: dict[Node, Any] = {}
    for node in graph_module.graph.nodes:
        if node not in needed:
            continue
        if node.op == "get_attr":
            owner, _, leaf = str(node.target).rpartition(".")
            values[node] = getattr(graph_module.get_submodule(owner), leaf)
        elif node.target is aten.sym_size.int:
            values[node] = 2 if node.args[1] == 0 else node.meta["val"]
        else:
            args, kwargs = map_arg((node.args, node.kwargs), values.__getitem__)
            values[node] = node.target(*args, **kwargs)
    result = values[mask]
    return isinstance(result, torch.Tensor) and bool(result.all())
