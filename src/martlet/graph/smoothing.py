"""Scales the channels of a tensor in one place and undoes it in the weights that read it. Logits stay the same."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from martlet.core.technique import Batches, Progress
from martlet.functional.smoothing import Smoothing, search_smoothing
from martlet.graph import rounding
from martlet.graph.observe import observe
from martlet.graph.sites import aten, sites
from martlet.nn.quantizers import ChannelScale

ROWS = 64
"""Sample rows kept of each batch."""
WORTH_DB = 3.0
"""An operation of its own has to halve the error; one that folds into a LayerNorm costs nothing."""


@dataclass
class _Input:
    """What was seen of a tensor that feeds one Linear or several."""

    linears: list[Node]
    generator: torch.Generator
    low: Tensor | None = None
    high: Tensor | None = None
    rows: list[Tensor] = field(default_factory=list)

    def look(self, value: Tensor) -> None:
        flat = value.flatten(0, -2)  # (R, C)
        low, high = torch.aminmax(flat, dim=0)
        self.low = low if self.low is None else torch.minimum(self.low, low)
        self.high = high if self.high is None else torch.maximum(self.high, high)
        drawn = torch.randint(len(flat), (ROWS,), generator=self.generator)
        self.rows.append(flat[drawn])


def smooth_(graph_module: GraphModule, images: Batches, seed: int, progress: Progress) -> dict[str, Any]:
    """Smooths every Linear's input where that lowers the error of its output in 8 bits.

    Factors fold into the LayerNorm that gives the input, if Linears alone read it; else one multiplication is
    inserted, where it is worth one. Returns the record for `restore_` and counts by where the factors went.
    """
    generator = torch.Generator().manual_seed(seed)
    inputs = {node: _Input(linears, generator) for node, linears in _inputs(graph_module)}
    observe(graph_module, images, {n: seen.look for n, seen in inputs.items()}, progress, "observe inputs of Linears")
    folded, inserted = 0, []
    for i, (node, seen) in enumerate(inputs.items()):
        progress("smooth", i + 1, len(inputs))
        assert seen.low is not None and seen.high is not None
        weights = [rounding.tensor(graph_module, linear.args[1]) for linear in seen.linears]
        found = search_smoothing(torch.cat(seen.rows), seen.low, seen.high, torch.cat([w.detach() for w in weights]))
        norm = _foldable(node, seen.linears)
        if found.alpha is None or (not norm and found.gain_db < WORTH_DB):
            continue
        with torch.no_grad():
            for weight in weights:
                weight.mul_(found.factors)
            if norm:
                for parameter in node.args[2:4]:
                    rounding.tensor(graph_module, parameter).div_(found.factors)
                folded += 1
            else:
                _insert(graph_module, node, seen.linears, found)
                inserted.append([node.name, [linear.name for linear in seen.linears], len(found.factors)])
    graph_module.recompile()
    return {"into_layer_norm": folded, "multiplications": inserted}


def restore_(graph_module: GraphModule, saved: Mapping[str, Any]) -> None:
    """Inserts the multiplications again, with factors to be filled from a state dict."""
    nodes = {node.name: node for node in graph_module.graph.nodes}
    for name, linears, channels in saved["multiplications"]:
        ones = Smoothing(None, torch.ones(channels), 0.0)
        _insert(graph_module, nodes[name], [nodes[linear] for linear in linears], ones)
    graph_module.recompile()


def _inputs(graph_module: GraphModule) -> Iterator[tuple[Node, list[Node]]]:
    """Each tensor that Linears read, with them. A weight read twice can't be scaled for one reader alone."""
    readers: dict[Node, list[Node]] = {}
    for site in sites(graph_module):
        if site.node.target is aten.linear.default:
            weight, operand = site.node.args[1], site.node.args[0]
            assert isinstance(weight, Node) and isinstance(operand, Node)
            if len(weight.users) == 1:
                readers.setdefault(operand, []).append(site.node)
    yield from readers.items()


def _foldable(node: Node, linears: list[Node]) -> bool:
    return (
        node.target is aten.layer_norm.default
        and len(node.args) > 3
        and None not in node.args[2:4]
        and len(node.args[1]) == 1  # type: ignore[arg-type]
        and set(node.users) == set(linears)
        and all(len(parameter.users) == 1 for parameter in node.args[2:4])  # type: ignore[union-attr]
    )


def _insert(graph_module: GraphModule, node: Node, linears: list[Node], smoothing: Smoothing) -> None:
    name = f"smoothing.{node.name}"
    graph_module.add_submodule(name, ChannelScale(1 / smoothing.factors))
    with graph_module.graph.inserting_after(node):
        scaled = graph_module.graph.call_module(name, (node,))
    scaled.meta = {k: v for k, v in node.meta.items() if k in ("val", "nn_module_stack")}
    for linear in linears:
        linear.replace_input_with(node, scaled)
