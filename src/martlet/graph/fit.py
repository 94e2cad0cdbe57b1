"""Runs a traced graph once over some images and decides, product by product, how operands are rounded.

What is held in memory is what the graph holds: a tensor is gone once nothing needs it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from martlet.core.kept import Kept
from martlet.core.technique import Progress
from martlet.graph.rounding import Edge, Rounding, group
from martlet.graph.sites import SOFTMAX, Site, aten, source
from martlet.graph.trace import Walk
from martlet.nn.quantizers import Quantizer, build, structure

SAVE_SECONDS = 20.0
"""How much of choosing grids may be lost when a run is stopped."""

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


def remembered(decide: Callable[[Call], Fitted], kept: Kept, key: str) -> Callable[[Call], Fitted]:
    """`decide` for a run that may be stopped: it saves what was decided every SAVE_SECONDS, and asks for the rest only.

    key: of all that a decision depends on. The calls come in the same order each time.
    """
    tensors, found = kept.load(key) or ({}, [])
    saved, calls = time.monotonic(), 0

    def ask(call: Call) -> Fitted:
        nonlocal saved, calls
        calls += 1
        if calls <= len(found):
            return _restored(tensors, found[calls - 1], calls - 1)
        fitted = decide(call)
        quantizers = {str(position): quantizer for position, quantizer in fitted.operands.items()}
        quantizers |= {} if fitted.weight is None else {"weight": fitted.weight}
        found.append({place: structure(quantizer) for place, quantizer in quantizers.items()})
        for place, quantizer in quantizers.items():
            tensors.update({f"{calls - 1}.{place}.{name}": t for name, t in quantizer.state_dict().items()})
        if time.monotonic() - saved > SAVE_SECONDS:
            kept.save(key, tensors, found)
            saved = time.monotonic()
        return fitted

    return ask


def _restored(tensors: Mapping[str, Tensor], structures: Mapping[str, Any], number: int) -> Fitted:
    quantizers: dict[str, Quantizer] = {}
    for place, its in structures.items():
        quantizers[place], prefix = build(its), f"{number}.{place}."
        state = {name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)}
        quantizers[place].load_state_dict(state)
    weight = quantizers.pop("weight", None)
    return Fitted({int(position): quantizer for position, quantizer in quantizers.items()}, weight)


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
