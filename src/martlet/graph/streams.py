"""Finds the residual streams of a traced graph: what LayerNorms read, all that writes it, and all that reads it.

Channel numbers are sent through the graph's own operations, so no library's layout is assumed.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from martlet.graph.probe import parameters, readers, shapes
from martlet.graph.rounding import tensor
from martlet.graph.sites import CONVOLUTIONS, aten, source


@dataclass(frozen=True, eq=False)
class Stream:
    """A residual stream of so many channels, and all that would have to be rotated with it.

    writers: Linears and convolutions whose outputs it is the sum of, with the LayerScale behind each, if any.
    parameters: tokens and position embeddings, with the axis of their channels. norms: the LayerNorms that read it,
    with the layers behind each. readers: layers that read it without one.
    """

    width: int
    writers: dict[Node, Node | None] = field(default_factory=dict)
    parameters: dict[Node, int] = field(default_factory=dict)
    norms: dict[Node, list[Node]] = field(default_factory=dict)
    readers: list[Node] = field(default_factory=list)

    @property
    def all_readers(self) -> list[Node]:
        return [*self.readers, *(reader for behind in self.norms.values() for reader in behind)]


@dataclass(frozen=True)
class Streams:
    """The streams that can be rotated; and how many LayerNorms read something that can't, by the reason."""

    found: list[Stream]
    left: dict[str, int]


def streams(graph_module: GraphModule) -> Streams:
    """Every residual stream that LayerNorms over its channels read."""
    values, found, left, seen = shapes(graph_module), list[Stream](), Counter[str](), set[Node]()
    for node in graph_module.graph.nodes:
        if node.target is not aten.layer_norm.default or len(node.args[1]) != 1 or node in seen:
            continue
        search = _Search(graph_module, values, int(node.args[1][0]))
        try:
            search.start(node)
        except _Stuck as error:
            left[str(error)] += 1
        else:
            found.append(search.stream)
            seen.update(search.stream.norms)
    return Streams(found, dict(left))


class _Stuck(Exception):
    """Why a stream can't be rotated."""


class _Search:
    """Follows a stream from one of its LayerNorms to all that writes and reads it."""

    def __init__(self, graph_module: GraphModule, values: Mapping[Node, Any], width: int) -> None:
        self.graph_module, self.values, self.width = graph_module, values, width
        self.stream = Stream(width)
        self.axes: dict[Node, int] = {}
        self.pending: list[tuple[Node, int]] = []
        self.uses: Counter[int] = Counter()
        for node in graph_module.graph.nodes:
            if node.op == "get_attr":
                self.uses[self._memory(node)] += len(node.users)

    def start(self, norm: Node) -> None:
        self._above(norm, norm.args[0], -1)
        while self.pending:
            node, axis = self.pending.pop()
            known = node in self.axes
            self._needs(self.axes.setdefault(node, axis) == axis, "its channels change their place")
            self._needs(self.values[node].shape[axis] == self.width, "more channels are put beside its own")
            if known:
                continue
            self._writes(node, axis)
            for consumer, operand, ids in self._readers(node, axis):
                self._reads(node, consumer, operand, ids)

    def _above(self, consumer: Node, operand: object, axis: int) -> None:
        """Goes on with what gives an operand."""
        if not isinstance(operand, Node):
            raise _Stuck("a number is added to it")
        node = source(operand)
        if node in self.axes:
            return
        for own in range(-self.values[node].ndim, 0):
            if self.values[node].shape[own] == self.width:
                for user, at, ids in self._readers(node, own):
                    if user is consumer and at is operand and _axis(ids, self.width) == axis:
                        self.pending.append((node, own))
                        return
        raise _Stuck("its channels can't be followed")

    def _writes(self, node: Node, axis: int) -> None:
        """What has to be rotated for a tensor of the stream to be."""
        own = parameters(node) if node.target is aten.linear.default or node.target in CONVOLUTIONS else []
        if (node.target is aten.linear.default and axis == -1) or (_is_plain_convolution(node) and axis == -3):
            self._needs(all(map(self._alone, own)), "a layer that writes it shares its weight")
            self.stream.writers.setdefault(node, None)
        elif node.op == "get_attr":
            self._needs(self._alone(node), "a parameter in it is read elsewhere too")
            self.stream.parameters[node] = axis
        elif node.target is aten.add.Tensor and not node.kwargs:
            for operand in node.args:
                self._above(node, operand, axis)
        elif node.target is aten.cat.default:
            for operand in node.args[0]:  # type: ignore[union-attr]
                self._above(node, operand, axis)
        elif node.target is aten.mul.Tensor and (found := self._layer_scale(node, axis)):
            writer, scale = found
            self.stream.writers[writer] = scale
            self._above(node, next(a for a in node.args if a is not scale), axis)
        elif node.target is aten.mean.dim:
            self._above(node, node.args[0], axis)
        else:
            raise _Stuck(f"{_kind(node)} gives it")

    def _reads(self, node: Node, consumer: Node, operand: Node, ids: Tensor) -> None:
        axis = _axis(ids, self.width)
        if axis is None:
            raise _Stuck(f"{_kind(consumer)} reads some of its channels")
        if consumer.target is aten.layer_norm.default and consumer.args[1] == [self.width] and axis == -1:
            self._norm(consumer)
        elif consumer.target in (aten.add.Tensor, aten.cat.default):
            self.pending.append((consumer, axis))
        elif consumer.target is aten.mean.dim:
            self._mean(consumer, ids)
        elif consumer.target is aten.mul.Tensor and (found := self._layer_scale(consumer, axis)) and found[0] is node:
            self.pending.append((consumer, axis))
        elif self._is_reader(consumer, operand, axis):
            if consumer not in self.stream.readers:
                self.stream.readers.append(consumer)
        else:
            raise _Stuck(f"{_kind(consumer)} reads it")

    def _norm(self, norm: Node) -> None:
        """A LayerNorm and all that reads it."""
        if norm in self.stream.norms:
            return
        scale, shift = ([*norm.args[2:4], None, None])[:2]
        self._needs(all(map(self._alone, filter(None, (scale, shift)))), "a LayerNorm shares its parameters")
        behind, pending = list[Node](), [(norm, -1)]
        while pending:
            node, axis = pending.pop()
            for consumer, operand, ids in self._readers(node, axis):
                at = _axis(ids, self.width)
                if consumer.target is aten.mean.dim and (kept := self._mean_axis(consumer, ids)) is not None:
                    pending.append((consumer, kept))
                    continue
                reads = at is not None and self._is_reader(consumer, operand, at)
                self._needs(reads, f"{_kind(consumer)} reads a norm")
                biased = len(consumer.args) > 2 and consumer.args[2] is not None
                self._needs(shift is None or biased, "a layer without a bias reads a norm that has one")
                behind += [] if consumer in behind else [consumer]
        self.stream.norms[norm] = behind

    def _mean(self, mean: Node, ids: Tensor) -> None:
        axis = self._mean_axis(mean, ids)
        if axis is None:
            raise _Stuck("a mean over its channels")
        self.pending.append((mean, axis))

    def _mean_axis(self, mean: Node, ids: Tensor) -> int | None:
        return _axis(ids.double().mean(*mean.args[1:]), self.width)  # type: ignore[arg-type]

    def _readers(self, node: Node, axis: int) -> list[tuple[Node, Node, Tensor]]:
        """As `readers`, where channels lie along an axis."""
        numbers = torch.arange(self.width, dtype=torch.int32).reshape(-1, *[1] * (-axis - 1))
        return readers(node, numbers.expand(self.values[node].shape), self.values)

    def _layer_scale(self, mul: Node, axis: int) -> tuple[Node, Node] | None:
        """(the layer whose output this alone reads and scales, the parameter with a factor for each channel)."""
        for x, scale in (mul.args, mul.args[::-1]):
            if not isinstance(x, Node) or not self._alone(scale):
                continue
            factors, writer = tensor(self.graph_module, scale), source(x)
            if -axis > factors.ndim or not factors.numel() == factors.shape[axis] == self.width:
                continue
            own = -1 if writer.target is aten.linear.default else -3
            if own == -3 and not _is_plain_convolution(writer):
                continue
            if [consumer for consumer, _, _ in self._readers(writer, own)] == [mul]:
                assert isinstance(scale, Node)
                return writer, scale
        return None

    def _is_reader(self, node: Node, operand: Node, axis: int) -> bool:
        """Whether a layer reads all channels of each token, and no other's."""
        if not node.args or node.args[0] is not operand:
            return False
        own = all(map(self._alone, parameters(node)))
        if node.target is aten.linear.default:
            return own and axis == -1
        if not _is_plain_convolution(node) or not own:
            return False
        return axis == -3 and set(tensor(self.graph_module, node.args[1]).shape[2:]) == {1} and not _is_padded(node)

    def _alone(self, node: object) -> bool:
        """A parameter that nothing else reads, under whatever name."""
        return isinstance(node, Node) and node.op == "get_attr" and self.uses[self._memory(node)] == 1

    def _memory(self, node: Node) -> int:
        return tensor(self.graph_module, node).untyped_storage().data_ptr()

    def _needs(self, condition: bool, reason: str) -> None:
        if not condition:
            raise _Stuck(reason)


def _axis(ids: Tensor, width: int) -> int | None:
    """The axis, from the last, along which channels are numbered in order, and alike everywhere else."""
    for axis in range(-ids.ndim, 0):
        if ids.shape[axis] == width:
            along = torch.arange(width, dtype=ids.dtype).reshape(-1, *[1] * (-axis - 1))
            if bool((ids == along).all()):
                return axis
    return None


def _kind(node: Node) -> str:
    return node.op if node.op != "call_function" else str(getattr(node.target, "overloadpacket", node.target))


def _is_plain_convolution(node: Node) -> bool:
    """A convolution of two dimensions, in one group and not transposed."""
    if node.target not in (aten.conv2d.default, aten.conv2d.padding):
        return False
    return len(node.args) < 7 or bool(node.args[6] == 1)


def _is_padded(node: Node) -> bool:
    padding = node.args[4] if len(node.args) > 4 else 0
    return padding not in (0, [0, 0], "valid")
