"""Where a traced graph multiplies: every Linear, convolution and product of two activations, with a stable name."""

from __future__ import annotations

import operator
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from torch.fx import GraphModule, Node

from martlet.nn.integer import Shiftmax

aten = torch.ops.aten

CONVOLUTIONS = (aten.conv1d.default, aten.conv2d.default, aten.conv2d.padding, aten.convolution.default)
PRODUCTS = (aten.matmul.default, aten.bmm.default, aten.mm.default, aten._int_mm.default)
PERMUTATIONS = (
    aten.reshape.default,
    aten.permute.default,
    aten.transpose.int,
    aten.unsqueeze.default,
    aten.squeeze.dim,
    aten.squeeze.dims,
    aten.flatten.using_ints,
    aten.unflatten.int,
    aten.roll.default,
)
"""Operations that move every value and compute none: rounding before or after them is the same."""

SELECTIONS = (
    aten.expand.default,
    aten.slice.Tensor,
    aten.select.int,
    aten.split.Tensor,
    aten.split_with_sizes.default,
    aten.chunk.default,
    aten.unbind.int,
    aten.unfold.default,
    operator.getitem,
)
"""Operations that pass on some values: a part may have a narrower range than the whole."""

SHAPE_ONLY = (*PERMUTATIONS, *SELECTIONS)


SOFTMAX = (aten.softmax.int, aten._softmax.default)
MASKS = (aten.masked_fill.Scalar, aten.where.self)

Kind = Literal["linear", "conv", "scores", "values", "product"]


@dataclass(frozen=True)
class Site:
    """One multiplication.

    kind: `scores` is an attention's q kᵀ, `values` its softmax times v, `product` any other of two activations.
    activations: positions of the operands in `node.args` that depend on the image; weight: that of the parameter.
    """

    node: Node
    kind: Kind
    name: str
    activations: tuple[int, ...]
    weight: int | None

    @property
    def is_attention(self) -> bool:
        return self.weight is None

    @property
    def output_axis(self) -> int:
        """Along which a weight's output channels lie."""
        if self.node.target not in (aten.matmul.default, aten.mm.default):
            return 0
        assert self.weight is not None
        parameter = self.node.args[self.weight]
        assert isinstance(parameter, Node)
        return parameter.meta["val"].ndim - (1 if self.weight == 1 else 2)


def sites(graph_module: GraphModule) -> Iterator[Site]:
    """Every multiplication, in the order of execution."""
    seen: Counter[str] = Counter()
    for node in graph_module.graph.nodes:
        if node.target is aten.linear.default or node.target in CONVOLUTIONS:
            kind: Kind = "linear" if node.target is aten.linear.default else "conv"
            name = parameter_name(node.args[1]) or module_path(node)
            activations, weight = (0,), 1
        elif node.target in PRODUCTS:
            constant = [i for i in (0, 1) if parameter_name(node.args[i])]
            if len(constant) == 2:
                continue
            if constant:
                kind, weight = "linear", constant[0]
                name = parameter_name(node.args[weight]) or ""
            else:
                kind, weight = _role(graph_module, node), None
                name = f"{module_path(node)}.{kind}"
            activations = tuple(i for i in (0, 1) if i != weight)
        else:
            continue
        seen[name] += 1
        yield Site(node, kind, name if seen[name] == 1 else f"{name}:{seen[name]}", activations, weight)


def within(name: str, path: str) -> bool:
    """Whether a site's name is that path, one of a layer in the module of that path, or of a later call of it."""
    return name == path or name.startswith((f"{path}.", f"{path}:"))


def parameter_name(node: object) -> str | None:
    """The dotted name of the layer that owns a parameter node, also behind a weight quantizer; None if it is none."""
    if isinstance(node, Node) and node.op in ("get_attr", "call_module") and not node.args:
        return str(node.target).removesuffix("_quantizer").removesuffix("weight").rstrip("._")
    return None


def module_path(node: Node) -> str:
    """The dotted name of the module whose forward made the node, or the node's own name."""
    stack = node.meta.get("nn_module_stack") or {}
    path = next(reversed(stack.values()))[0] if stack else ""
    return path or node.name


def source(node: Node, through: tuple[object, ...] = SHAPE_ONLY) -> Node:
    """The node that computed a value, looking up through operations that only move it."""
    while node.target in through and isinstance(node.args[0], Node):
        node = node.args[0]
    return node


def unrounded(graph_module: GraphModule, node: Node) -> Node:
    """As `source`, looking through quantizers too."""
    node = source(node)
    while node.op == "call_module" and node.args and not is_softmax(graph_module, node):
        assert isinstance(node.args[0], Node)
        node = source(node.args[0])
    return node


def is_softmax(graph_module: GraphModule, node: Node) -> bool:
    """Whether a node computes one, in floating point or in integers."""
    if node.op == "call_module":
        return isinstance(graph_module.get_submodule(str(node.target)), Shiftmax)
    return node.target in SOFTMAX


def _role(graph_module: GraphModule, node: Node) -> Kind:
    """`values` if an operand comes from a softmax, `scores` if a softmax follows, else `product`."""
    if any(isinstance(a, Node) and is_softmax(graph_module, unrounded(graph_module, a)) for a in node.args):
        return "values"
    after, seen = [node], 0
    while after and seen < 8:  # scores pass through scale, bias and mask before their softmax
        seen += 1
        after = [user for n in after for user in n.users]
        if any(is_softmax(graph_module, n) for n in after):
            return "scores"
        between = (*SHAPE_ONLY, aten.mul.Tensor, aten.add.Tensor, aten.div.Tensor, *MASKS)
        after = [n for n in after if n.op == "call_module" or n.target in between]
    return "product"
