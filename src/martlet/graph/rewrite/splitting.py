"""Splits channels with outliers into equal parts, so that a tensor's range shrinks and its weights stay as they are.

Source: Zhao et al., Improving Neural Network Quantization without Retraining using Outlier Channel Splitting, 2019,
arXiv 1901.09504, section 3. Differs: a channel is split into as many parts as its range needs, not in two at a time.
"""

from __future__ import annotations

from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node

from martlet.core.technique import Batches, Progress
from martlet.functional.quantize.splitting import split_counts
from martlet.graph import rounding
from martlet.graph.observe import observe_gradients
from martlet.graph.sites import aten
from martlet.nn.quantizers import ChannelScale

POINTWISE = (aten.gelu.default, aten.relu.default, aten.silu.default, aten.hardswish.default)
EXTRA = (16, 32)
"""How many channels may be added: multiples of what the engines' int8 kernels take at once."""
WORTH_DB = 6.0
"""What the rounding error of the tensor must fall by."""


@dataclass
class _Seen:
    """Range of each channel, and what an error in each costs."""

    low: Tensor | None = None
    high: Tensor | None = None
    importance: Tensor | None = None

    def look(self, values: Sequence[Tensor], gradients: Sequence[Tensor]) -> None:
        low, high = torch.aminmax(values[0].flatten(0, -2), dim=0)  # (C)
        weight = gradients[0].square().flatten(0, -2).sum(0)
        self.low = low if self.low is None else torch.minimum(self.low, low)
        self.high = high if self.high is None else torch.maximum(self.high, high)
        self.importance = weight if self.importance is None else self.importance + weight


@dataclass(frozen=True)
class _Pair:
    """Linear, activation function, Linear, each read by the next alone."""

    before: Node
    activation: Node
    after: Node


def split_(
    graph_module: GraphModule, images: Batches, seed: int, progress: Progress, rounded: Container[Node] | None = None
) -> list[list[Any]]:
    """Splits channels between the Linears of each MLP where that lowers the rounding error. Logits stay the same.

    The Linear before gives a channel several times, one factor a channel divides, and the Linear after reads them all
    with the same weights. Returns the record for `restore_`: names of the second Linears and their new widths.

    rounded: the Linears whose inputs are rounded, as the others stay in floating point; None is all.
    """
    seen = {pair: _Seen() for pair in _pairs(graph_module) if rounded is None or pair.after in rounded}
    watch = [([pair.activation], s.look) for pair, s in seen.items()]
    if watch:
        observe_gradients(graph_module, images, watch, seed, progress, "observe activations of MLPs")
    record: list[list[Any]] = []
    for pair, s in seen.items():
        assert s.low is not None and s.high is not None and s.importance is not None
        found = split_counts(s.low, s.high, s.importance, EXTRA)
        if found.gain_db >= WORTH_DB:
            _apply(graph_module, pair, torch.arange(len(s.low)).repeat_interleave(found.counts), found.counts)
            record.append([pair.after.name, int(found.counts.sum())])
    graph_module.recompile()
    return record


def restore_(graph_module: GraphModule, record: Sequence[Sequence[Any]]) -> None:
    """Widens the same MLPs again, with values to be filled from a state dict."""
    widths: Mapping[str, int] = dict(record)  # type: ignore[arg-type]
    for pair in _pairs(graph_module):
        if pair.after.name in widths:
            width, channels = widths[pair.after.name], len(rounding.tensor(graph_module, pair.before.args[1]))
            counts = torch.ones(channels, dtype=torch.long)
            counts[0] += width - channels
            _apply(graph_module, pair, torch.arange(channels).repeat_interleave(counts), counts)
    graph_module.recompile()


def _pairs(graph_module: GraphModule) -> list[_Pair]:
    pairs = []
    for node in graph_module.graph.nodes:
        if node.target in POINTWISE and len(node.users) == 1:
            before, after = node.args[0], next(iter(node.users))
            linear = before.target is aten.linear.default and after.target is aten.linear.default
            if linear and len(before.users) == 1 and len(before.args[1].users) == len(after.args[1].users) == 1:
                pairs.append(_Pair(before, node, after))
    return pairs


def _apply(graph_module: GraphModule, pair: _Pair, index: Tensor, counts: Tensor) -> None:
    """index (C'): which old channel each new one is a part of; counts (C): into how many parts each is split."""
    for parameter, axis in ((pair.before.args[1], 0), (_bias(pair.before), 0), (pair.after.args[1], 1)):
        if parameter is not None:
            old = rounding.tensor(graph_module, parameter)
            new = nn.Parameter(old.detach().index_select(axis, index), requires_grad=False)
            owner, _, leaf = str(parameter.target).rpartition(".")  # type: ignore[union-attr]
            setattr(graph_module.get_submodule(owner), leaf, new)
    name = f"splitting.{pair.activation.name}"
    graph_module.add_submodule(name, ChannelScale(1.0 / counts[index]))
    with graph_module.graph.inserting_after(pair.activation):
        scaled = graph_module.graph.call_module(name, (pair.activation,))
    scaled.meta = {k: v for k, v in pair.activation.meta.items() if k == "nn_module_stack"}
    pair.after.replace_input_with(pair.activation, scaled)


def _bias(linear: Node) -> object:
    return linear.args[2] if len(linear.args) > 2 else None
