"""Scales the channels of a tensor in one place and undoes it in the weights that read it. Logits stay the same."""

from __future__ import annotations

from collections.abc import Container, Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from martlet.core.technique import Batches, Progress
from martlet.functional.quantize.smoothing import search_smoothing
from martlet.graph import rounding
from martlet.graph.observe import observe_gradients
from martlet.graph.sites import aten, sites

ROWS = 56
"""Sample rows kept of each batch, besides each image's first: a class token is one among hundreds, and decides."""


@dataclass
class _Input:
    """What was seen of a tensor that feeds one Linear or several."""

    linears: list[Node]
    generator: torch.Generator
    low: Tensor | None = None
    high: Tensor | None = None
    rows: list[Tensor] = field(default_factory=list)
    importance: list[Tensor] = field(default_factory=list)

    def look(self, values: Sequence[Tensor], gradients: Sequence[Tensor]) -> None:
        value = values[0]
        flat = value.flatten(0, -2)  # (R, C)
        low, high = torch.aminmax(flat, dim=0)
        self.low = low if self.low is None else torch.minimum(self.low, low)
        self.high = high if self.high is None else torch.maximum(self.high, high)
        tokens = len(flat) // len(value)
        first = torch.arange(0, len(flat), tokens)
        drawn = torch.cat([first, torch.randint(len(flat), (ROWS,), generator=self.generator)])
        self.rows.append(flat[drawn])
        outputs = torch.cat([gradient.flatten(0, -2)[drawn] for gradient in gradients[1:]], 1)  # (r, O)
        share = torch.ones(len(drawn), 1)  # the drawn stand for all the others
        share[len(first) :] = (len(flat) - len(first)) / ROWS
        self.importance.append(outputs.square() * share)


def smooth_(
    graph_module: GraphModule, images: Batches, seed: int, progress: Progress, rounded: Container[Node] | None = None
) -> int:
    """Smooths the output of each LayerNorm that Linears alone read, where that lowers the error of theirs in 8 bits.

    Factors fold into the LayerNorm and the Linears. Returns how many LayerNorms changed.

    rounded: the Linears whose error counts, as the others stay in floating point; None is all.
    """
    generator = torch.Generator().manual_seed(seed)
    readers = {node: linears for node, linears in _inputs(graph_module) if _foldable(node, linears)}
    judges = {node: [n for n in linears if rounded is None or n in rounded] for node, linears in readers.items()}
    inputs = {node: _Input(linears, generator) for node, linears in judges.items() if linears}
    watch = [([node, *seen.linears], seen.look) for node, seen in inputs.items()]
    if watch:
        observe_gradients(graph_module, images, watch, seed, progress, "observe inputs of Linears")
    smoothed = 0
    for i, (node, seen) in enumerate(inputs.items()):
        progress("smooth", i + 1, len(inputs))
        assert seen.low is not None and seen.high is not None
        weight = torch.cat(
            [rounding.tensor(graph_module, linear.args[1]).detach() for linear in seen.linears]
        )  # (O, C)
        found = search_smoothing(torch.cat(seen.rows), seen.low, seen.high, weight, torch.cat(seen.importance))
        if found.alpha is None:
            continue
        with torch.no_grad():
            for linear in readers[node]:
                rounding.tensor(graph_module, linear.args[1]).mul_(found.factors)
            for parameter in node.args[2:4]:
                rounding.tensor(graph_module, parameter).div_(found.factors)
        smoothed += 1
    return smoothed


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
