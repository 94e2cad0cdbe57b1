"""Runs a traced graph once over some images and decides, product by product, how operands are rounded.

What is held in memory is what the graph holds: a tensor is gone once nothing needs it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from martlet.core.technique import Progress
from martlet.graph.rounding import Edge, Rounding, group
from martlet.graph.sites import SOFTMAX, Site, aten, source
from martlet.graph.trace import Walk
from martlet.nn.quantizers import Quantizer

TensorKind = Literal["image", "layer_norm", "softmax", "gelu", "query", "key", "value", "other"]
"""What an activation is, by which methods choose its grid. `other`: an attention's output, or what a ReLU gives."""


@dataclass(frozen=True)
class Operand:
    """An activation that a multiplication reads, of any shape; for a Linear (…, I), for an attention (…, H, N, D)."""

    kind: TensorKind
    value: Tensor


@dataclass(frozen=True)
class Call:
    """One multiplication with its operands in floating point.

    operands: those to decide on, by position; one that an earlier multiplication reads too is decided there.
    weight: as the layer has it, or None for an attention. output: what it gives, the bias included. multiply: what it
    gives with other tensors at some positions, the weight's among them.
    """

    site: Site
    operands: Mapping[int, Operand]
    weight: Tensor | None
    output: Tensor
    multiply: Callable[[Mapping[int, Tensor]], Tensor]


@dataclass(frozen=True)
class Fitted:
    """The decision: a quantizer by position of each operand, and one for the weight; None leaves it as it is."""

    operands: Mapping[int, Quantizer]
    weight: Quantizer | None = None


@dataclass(frozen=True)
class Fit:
    """All decisions, for `rounding.insert_`."""

    activations: dict[Rounding, Quantizer]
    weights: list[tuple[Node, int, Quantizer]]


def fit(
    graph_module: GraphModule,
    found: Iterable[Site],
    images: Tensor,
    decide: Callable[[Call], Fitted],
    rounded: bool,
    progress: Progress,
) -> Fit:
    """Calls `decide` for every site, in the order of execution, with what all images (B, 3, H, W) give there.

    rounded: a site's operands come from rounded operands before it; else from the untouched model.
    """
    walk = _Walk(graph_module, list(found), decide, rounded, progress)
    with torch.no_grad():
        walk.run(images)
    return Fit(walk.activations, walk.weights)


def tensor_kind(site: Site, position: int) -> TensorKind:
    """What the operand at a position is."""
    operand = site.node.args[position]
    assert isinstance(operand, Node)
    node = source(operand)
    if node.op == "placeholder":
        return "image"
    if node.target in SOFTMAX:
        return "softmax"
    if site.kind == "scores":
        return "query" if position == 0 else "key"
    if site.kind == "values":
        return "value"
    if node.target is aten.layer_norm.default:
        return "layer_norm"
    return "gelu" if node.target is aten.gelu.default else "other"


class _Walk(Walk):
    def __init__(
        self,
        graph_module: GraphModule,
        found: list[Site],
        decide: Callable[[Call], Fitted],
        rounded: bool,
        progress: Progress,
    ) -> None:
        super().__init__(graph_module)
        self.sites = {site.node: site for site in found}
        self.decide, self.rounded, self.progress = decide, rounded, progress
        edges: dict[Edge, str] = {}
        for site in found:
            for position in site.activations:
                operand = site.node.args[position]
                assert isinstance(operand, Node)
                edges[operand, site.node] = tensor_kind(site, position)
        self.rounding_of = {(r.producer, c): r for r in group(edges) for c in r.consumers}
        self.activations: dict[Rounding, Quantizer] = {}
        self.weights: list[tuple[Node, int, Quantizer]] = []
        self.weight_of: dict[str, Quantizer | None] = {}

    def run_node(self, n: Node) -> object:
        site = self.sites.get(n)
        if site is None:
            return super().run_node(n)
        args, kwargs = self.fetch_args_kwargs_from_env(n)
        output = n.target(*args, **kwargs)  # type: ignore[operator]
        roundings = {position: self.rounding_of[n.args[position], n] for position in site.activations}  # type: ignore[index]
        fresh = {p: r for p, r in roundings.items() if r not in self.activations}
        operands = {p: Operand(r.grid, args[p]) for p, r in fresh.items()}  # type: ignore[arg-type]
        name = str(n.args[site.weight].target) if site.weight is not None else ""  # type: ignore[union-attr]
        weight = args[site.weight] if site.weight is not None else None

        def multiply(others: Mapping[int, Tensor]) -> Tensor:
            return n.target(*(others.get(i, a) for i, a in enumerate(args)), **kwargs)  # type: ignore[operator]

        fitted = self.decide(Call(site, operands, weight, output, multiply))
        self.activations |= {r: fitted.operands[p] for p, r in fresh.items() if p in fitted.operands}
        if site.weight is not None:
            quantizer = self.weight_of.setdefault(name, fitted.weight)
            if quantizer is not None:
                self.weights.append((n, site.weight, quantizer))
        self.progress("choose grids", len(self.activations), len(set(self.rounding_of.values())))
        if not self.rounded:
            return output
        now = {p: self.activations[r](args[p]) for p, r in roundings.items() if r in self.activations}
        if site.weight is not None and (quantizer := self.weight_of[name]) is not None:
            now[site.weight] = quantizer()
        return multiply(now)
