"""From a traced graph in floating point to one that computes the same with integers alone, operation by operation.

The new graph follows from the structure of the old one; its buffers, from the weights and from the scales that are
given. So one that is built with any scales at all takes the state dict of another.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Graph, GraphModule, Node
from torch.fx.node import map_arg

from martlet.functional.quantize.integer import SIGMOID_SLOPE
from martlet.graph.probe import PROBE_BATCH, call, shapes
from martlet.graph.rounding import tensor
from martlet.graph.sites import CONVOLUTIONS, SHAPE_ONLY, SOFTMAX, aten
from martlet.nn.integer import (
    ImageQuantizer,
    IntegerLayerNorm,
    IntegerWeight,
    LogitDequantizer,
    Requantize,
    ShiftGELU,
    Shiftmax,
)
from martlet.nn.quantizers import ChannelScale

OPERAND_BITS = 8
"""Of weights and of whatever is multiplied with them or with each other, but for softmax."""
WIDE_BITS = 16
"""Of everything else: residuals, inputs of softmax, GELU and LayerNorm, outputs of softmax, the sigmoid in GELU."""
NORM_BITS = 30
PADS = (aten.pad.default, aten.constant_pad_nd.default)
SCALINGS = (aten.mul.Tensor, aten.div.Tensor)
SIZES = (operator.mul, operator.add, operator.sub, operator.floordiv)
"""Arithmetic on whole numbers that the number of images gives."""


class UnsupportedOperation(Exception):
    """An operation that has no integer form here. The text names it."""


@dataclass(frozen=True)
class Request:
    """A scale that is wanted: codes of `bits` bits that hold the values of all `nodes`.

    unit: the scale has to be this times a power of two; 0 is any.
    """

    nodes: tuple[Node, ...]
    bits: int
    unit: float = 0.0


@dataclass(frozen=True)
class Scales:
    """Where scales come from.

    weight: of each output channel, (O,), of a weight (O, I). gelu: what is added to each of the C channels of a GELU's
    output, where it is rounded.
    """

    activation: Callable[[Request], float]
    weight: Callable[[Tensor], Tensor]
    gelu: Callable[[Node, int], Tensor] = lambda gelu, channels: torch.zeros(channels)

    @classmethod
    def none(cls, seen: Callable[[Request], object] = lambda request: None) -> Scales:
        """Any at all, for the structure alone; `seen` is told what is requested."""

        def activation(request: Request) -> float:
            seen(request)
            return request.unit or 1.0

        return cls(activation, lambda weight: torch.ones(len(weight)))


@dataclass(frozen=True)
class _Codes:
    """What a node of the new graph stands for: scale · codes + offset; float64, and broadcast from the last axes."""

    node: Node
    scale: Tensor
    offset: Tensor


def integerize(graph_module: GraphModule, scales: Scales) -> GraphModule:
    """The same graph from images to logits, with integers from an `ImageQuantizer` to a `LogitDequantizer`.

    Raises:
        UnsupportedOperation: the graph has an operation without an integer form.
    """
    return _Builder(graph_module, scales).build()


class _Builder:
    """Goes through the old graph once.

    results: of each operation that computes, its codes as they come, at whatever scale that is. They move to a scale
    that a consumer asks for (`at`) behind the operation, before anything that only moves values.
    """

    def __init__(self, graph_module: GraphModule, scales: Scales) -> None:
        self.old, self.scales = graph_module, scales
        self.module = GraphModule(nn.Module(), Graph())
        self.graph = self.module.graph
        self.shapes = shapes(graph_module)
        self.image = next(node for node in graph_module.graph.nodes if node.op == "placeholder")
        self.constants = _constants(graph_module)
        self.results: dict[Node, _Codes] = {}
        self.moved: dict[tuple[Node, Request, float, torch.dtype], Node] = {}
        self.lengths: dict[Node, Any] = {}
        self.like: Node | None = None

    def build(self) -> GraphModule:
        rules: dict[object, Callable[[Node], None]] = {
            aten.linear.default: self._linear,
            **dict.fromkeys(CONVOLUTIONS, self._convolution),
            aten.matmul.default: self._product,
            aten.bmm.default: self._product,
            aten.add.Tensor: self._add,
            aten.cat.default: self._cat,
            aten.layer_norm.default: self._layer_norm,
            **dict.fromkeys(SOFTMAX, self._softmax),
            aten.gelu.default: self._gelu,
            aten.mean.dim: self._mean,
            **dict.fromkeys(SCALINGS, self._scale),
            aten.split_with_sizes.default: self._split,
        }
        for node in self.old.graph.nodes:
            self.like = node
            if node is self.image:
                self.new_image = self.graph.placeholder(node.name)
                self.new_image.meta = {"val": node.meta["val"]}
            elif node.op == "output":
                self._output(node)
            elif node in self.constants or node in self.results or not _has_tensors(self.shapes[node]):
                continue
            elif rule := self._channel_scale if self._scales_channels(node) else rules.get(node.target):
                rule(node)
            elif not self._only_moves(node):
                raise UnsupportedOperation(self._describe(node))
        self.graph.eliminate_dead_code()
        self.graph.lint()
        self.module.delete_all_unused_submodules()
        self.module.recompile()
        return self.module

    # codes at a scale

    def at(self, node: Node, request: Request, factor: float = 1.0, dtype: torch.dtype = torch.int32) -> Node:
        """Codes of factor · a node of the old graph, at the scale that is requested."""
        key = node, request, factor, dtype
        if key not in self.moved:
            self.moved[key] = self._at(node, request, factor, dtype)
        return self.moved[key]

    def _at(self, node: Node, request: Request, factor: float, dtype: torch.dtype) -> Node:
        scale = self.scales.activation(request) / factor
        if node in self.constants:
            limit = 2 ** (request.bits - 1)
            codes = torch.round(self.constants[node].double() / scale).clamp(-limit, limit - 1)
            return self._buffer(f"{_owner(node)}_codes", codes.to(dtype))
        if node in self.results:
            result = self.results[node]
            module = Requantize(result.scale / scale, result.offset / scale, request.bits, dtype)
            return self._call_module(f"{node.name}.codes", module, result.node)
        if node is self.image:
            if request.bits != OPERAND_BITS:
                raise UnsupportedOperation("arithmetic on the image before the first Linear or convolution")
            codes = self._call_module(f"{node.name}.codes", ImageQuantizer(scale), self.new_image)
            return codes if dtype == torch.int8 else self._call(aten.to.dtype, codes, dtype)
        source = node.args[0]
        assert isinstance(source, Node)
        if (number := self._number(node)) is not None:
            return self.at(source, request, factor * number, dtype)
        return self._move(node, self.at(source, request, factor, dtype))

    def _operand(self, node: object, dtype: torch.dtype) -> tuple[Node, float]:
        """What a multiplication takes, and its scale: in int32 a softmax as it comes, anything else at 8 bits."""
        assert isinstance(node, Node)
        moves, above = [], node
        while above.target in SHAPE_ONLY and isinstance(above.args[0], Node):
            moves.append(above)
            above = above.args[0]
        if above.target in SOFTMAX and above in self.results and dtype == torch.int32:
            codes = self.results[above]
            new = codes.node
            for move in reversed(moves):
                new = self._move(move, new)
            return new, float(codes.scale)
        request = Request((node,), OPERAND_BITS)
        return self.at(node, request, dtype=dtype), self.scales.activation(request)

    def _wide(self, node: object, unit: float = 0.0) -> tuple[Node, float]:
        """What anything but a multiplication takes, and its scale."""
        assert isinstance(node, Node)
        request = Request((node,), WIDE_BITS, unit)
        return self.at(node, request), self.scales.activation(request)

    # operations

    def _linear(self, node: Node) -> None:
        x, weight, *bias = node.args
        self._multiply(node, x, weight, self._constant(weight), bias[0] if bias else None)

    def _multiply(self, node: Node, x: object, name: object, weight: Tensor, bias: object) -> None:
        """x (…, I) with a weight (O, I)."""
        codes, scale = self._operand(x, torch.int8)
        rows = self._call(aten.reshape.default, codes, [-1, weight.shape[1]])
        output, scales = self._rows(node, rows, scale, name, weight, bias)
        shape = self.shapes[node].shape
        self._result(node, self._call(aten.reshape.default, output, [-1, *shape[1:]]), scales)

    def _rows(
        self, node: Node, rows: Node, scale: float, name: object, weight: Tensor, bias: object
    ) -> tuple[Node, Tensor]:
        """int32 (R, O) of rows (R, I) and a weight (O, I), and the scale of each column."""
        weight_scale = self.scales.weight(weight)
        label = str(name.target) if isinstance(name, Node) and name.op == "get_attr" else f"{node.name}.weight"
        quantizer = self._call_module(f"{label}_quantizer", IntegerWeight.of(weight, weight_scale))
        output = self._call(aten._int_mm.default, rows, quantizer)
        scales = scale * weight_scale.double()  # (O,)
        if bias is not None:
            limit = 2**30
            codes = torch.round(self._constant(bias).double() / scales).clamp(-limit, limit)
            output = self._call(aten.add.Tensor, output, self._buffer(f"{_owner(bias)}_codes", codes.to(torch.int32)))
        return output, scales

    def _convolution(self, node: Node) -> None:
        x, weight_node, *rest = node.args
        weight, bias = self._constant(weight_node), rest[0] if rest else None
        names = ("stride", "padding", "dilation", "groups")
        if node.target is aten.convolution.default:
            names = ("stride", "padding", "dilation", "transposed", "output_padding", "groups")
        options: dict[str, Any] = dict(zip(names, rest[1:], strict=False))
        stride, padding, dilation = (
            [*value] * (3 - len(value)) if isinstance(value, list | tuple) else [value]
            for value in (options.get("stride", [1]), options.get("padding", [0]), options.get("dilation", [1]))
        )
        plain = options.get("groups", 1) == 1 and not options.get("transposed") and dilation == [1, 1]
        if weight.ndim != 4 or not plain or len(padding) != 2:
            raise UnsupportedOperation(f"{self._describe(node)} that is not a plain one over two axes")
        codes, scale = self._operand(x, torch.int8)
        if any(padding):
            codes = self._call(aten.constant_pad_nd.default, codes, [padding[1], padding[1], padding[0], padding[0]], 0)
        patches = self._call(aten.unfold.default, codes, 2, weight.shape[2], stride[0])
        patches = self._call(aten.unfold.default, patches, 3, weight.shape[3], stride[1])  # (B, C, H, W, kh, kw)
        patches = self._call(aten.permute.default, patches, [0, 2, 3, 1, 4, 5])  # (B, H, W, C, kh, kw)
        rows = self._call(aten.reshape.default, patches, [-1, weight[0].numel()])
        output, scales = self._rows(node, rows, scale, weight_node, weight.flatten(1), bias)
        _, channels, height, width = self.shapes[node].shape
        output = self._call(aten.reshape.default, output, [-1, height, width, channels])
        self._result(node, self._call(aten.permute.default, output, [0, 3, 1, 2]), scales.reshape(-1, 1, 1))

    def _product(self, node: Node) -> None:
        first, second = node.args[:2]
        if isinstance(second, Node) and second in self.constants and self.constants[second].ndim == 2:
            return self._multiply(node, first, second, self.constants[second].mT, None)
        (a, scale_a), (b, scale_b) = (self._operand(operand, torch.int32) for operand in (first, second))
        self._result(node, self._call(node.target, a, b), torch.tensor(scale_a * scale_b, dtype=torch.float64))

    def _add(self, node: Node) -> None:
        if node.kwargs or not all(isinstance(a, Node) for a in node.args):
            raise UnsupportedOperation(self._describe(node))
        x, y = node.args
        assert isinstance(x, Node) and isinstance(y, Node)
        if x in self.results and y in self.constants and self.constants[y].ndim == 1:
            result = self.results[x]
            self._result(node, result.node, result.scale, result.offset + self.constants[y].double())
            return
        request, limit = Request((x, y, node), WIDE_BITS), 2 ** (WIDE_BITS - 1)
        total = self._call(aten.add.Tensor, self.at(x, request), self.at(y, request))
        total = self._call(aten.clamp.default, total, -limit, limit - 1)
        self._result(node, total, self._scalar(request))

    def _cat(self, node: Node) -> None:
        parts, *rest = node.args
        assert isinstance(parts, list | tuple)
        request = Request((node,), WIDE_BITS)
        codes = [self.at(part, request) for part in parts]  # type: ignore[arg-type]
        self._result(node, self._call(aten.cat.default, codes, *rest), self._scalar(request))

    def _layer_norm(self, node: Node) -> None:
        x, normalized, *rest = node.args
        weight, bias, eps = (*rest, None, None, None)[:3]
        assert isinstance(normalized, list | tuple)
        if len(normalized) != 1:
            raise UnsupportedOperation(f"{self._describe(node)} over {len(normalized)} axes")
        codes, scale = self._wide(x)
        n = int(normalized[0])  # type: ignore[arg-type]
        epsilon = round(min(n * (1e-5 if eps is None else float(eps)) / scale**2, 2.0**60))  # type: ignore[arg-type]
        normal = self._call_module(f"{node.name}.norm", IntegerLayerNorm(epsilon, NORM_BITS), codes)
        gamma = torch.ones(n) if weight is None else self._constant(weight)
        beta = torch.zeros(n) if bias is None else self._constant(bias)
        self._result(node, normal, gamma.double() * math.sqrt(n) / 2**NORM_BITS, beta.double())

    def _softmax(self, node: Node) -> None:
        x, axis = node.args[:2]
        if axis not in (-1, self.shapes[node].ndim - 1):
            raise UnsupportedOperation(f"{self._describe(node)} over another axis than the last")
        codes, scale = self._wide(x, 1.0)
        softmax = self._call_module(f"{node.name}.shiftmax", Shiftmax(round(1 / scale), WIDE_BITS), codes)
        self._result(node, softmax, torch.tensor(2.0 ** (1 - WIDE_BITS), dtype=torch.float64))

    def _gelu(self, node: Node) -> None:
        codes, scale = self._wide(node.args[0], 1 / SIGMOID_SLOPE)
        one = round(1 / (SIGMOID_SLOPE * scale))
        gelu = self._call_module(f"{node.name}.shiftgelu", ShiftGELU(one, WIDE_BITS), codes)
        lack = self.scales.gelu(node, self.shapes[node].shape[-1])
        self._result(node, gelu, torch.tensor(scale * 2.0 ** (1 - WIDE_BITS), dtype=torch.float64), lack.double())

    def _mean(self, node: Node) -> None:
        x, *rest = node.args
        assert isinstance(x, Node)
        codes, scale = self._wide(x)
        count = self.shapes[x].numel() // self.shapes[node].numel()
        total = self._call(aten.sum.dim_IntList, codes, *rest)  # int64
        self._result(node, total, torch.tensor(scale / count, dtype=torch.float64))

    def _scale(self, node: Node) -> None:
        """By a number, a new meaning of the same codes; by a constant for each channel too, as they come."""
        if self._number(node) is not None:
            return
        x, constant = node.args
        if node.target is aten.mul.Tensor and x in self.constants:
            x, constant = constant, x
        if not isinstance(x, Node) or not isinstance(constant, Node) or constant not in self.constants:
            raise UnsupportedOperation(f"{self._describe(node)} of two tensors that depend on the image")
        by = self.constants[constant].double()
        by = by if node.target is aten.mul.Tensor else 1 / by
        by = by.reshape(by.shape[next((i for i, size in enumerate(by.shape) if size > 1), by.ndim) :])
        if x in self.results:
            result = self.results[x]
            self._result(node, result.node, result.scale * by, result.offset * by)
        else:
            codes, scale = self._wide(x)
            self._result(node, codes, scale * by)

    def _channel_scale(self, node: Node) -> None:
        module, [x] = self.old.get_submodule(str(node.target)), node.args
        assert isinstance(module, ChannelScale) and isinstance(x, Node)
        result = self.results[x]
        by = module.factor.double()
        self._result(node, result.node, result.scale * by, result.offset * by)

    def _split(self, node: Node) -> None:
        """Along the channels of a Linear, before anything is rounded: each piece to a scale of its own."""
        x, sizes, *axis = node.args
        assert isinstance(x, Node)
        last = axis in ([-1], [self.shapes[x].ndim - 1])
        if x not in self.results or not last or self.results[x].scale.ndim != 1:
            return
        result = self.results[x]
        pieces = self._call(aten.split_with_sizes.default, result.node, sizes, -1)
        starts = [sum(sizes[:i]) for i in range(len(sizes))]  # type: ignore[arg-type, index]
        for user in node.users:
            i = user.args[1]
            assert isinstance(i, int)
            part = slice(starts[i], starts[i] + sizes[i])  # type: ignore[index]
            offset = result.offset[part] if result.offset.ndim else result.offset
            self._result(user, self._call(operator.getitem, pieces, i), result.scale[part], offset)

    def _output(self, node: Node) -> None:
        [logits] = node.all_input_nodes
        request = Request((logits,), WIDE_BITS)
        codes = self.at(logits, request)
        values = self._call_module("logits", LogitDequantizer(self.scales.activation(request), WIDE_BITS), codes)
        self.graph.output(values)

    # nodes of the new graph

    def _call(self, target: Any, *args: Any) -> Node:
        assert self.like is not None
        return call(self.graph, self.like, target, *args)

    def _call_module(self, name: str, module: nn.Module, *args: Node) -> Node:
        name = self._free(name)
        self.module.add_submodule(name, module)
        return self.graph.call_module(name, args)

    def _buffer(self, name: str, value: Tensor) -> Node:
        name = self._free(name)
        owner, _, leaf = name.rpartition(".")
        if owner and owner not in dict(self.module.named_modules()):
            self.module.add_submodule(owner, nn.Module())
        self.module.get_submodule(owner).register_buffer(leaf, value)
        return self.graph.get_attr(name)

    def _free(self, name: str) -> str:
        """A name that nothing has yet."""
        taken = {*dict(self.module.named_modules()), *dict(self.module.named_buffers())}
        return next(n for n in (name, *(f"{name}_{i}" for i in range(2, 1000))) if n not in taken)

    def _move(self, node: Node, codes: Node) -> Node:
        """An operation that only moves values, on codes."""
        before, self.like = self.like, node
        rest = map_arg(node.args[1:], self._length)
        new = self._call(node.target, codes, *rest)
        new.kwargs = map_arg(node.kwargs, self._length)
        self.like = before
        return new

    def _length(self, node: Node) -> Any:
        """A whole number of the old graph: one that the number of images gives is computed again."""
        if node in self.lengths:
            return self.lengths[node]
        value = self.shapes[node]
        if node.target is aten.sym_size.int and node.args[1] == 0 and value % PROBE_BATCH == 0:
            new: Any = self._call(aten.sym_size.int, self.new_image, 0)
            if value != PROBE_BATCH:
                new = self._call(operator.mul, new, value // PROBE_BATCH)
        elif node.target in SIZES:
            new = self._call(node.target, *map_arg(node.args, self._length))
        else:
            new = int(value)
        self.lengths[node] = new
        return new

    def _result(self, node: Node, new: Node, scale: Tensor, offset: Tensor | None = None) -> None:
        offset = torch.zeros((), dtype=torch.float64) if offset is None else offset
        self.results[node] = _Codes(new, scale, offset)

    # what the old graph says

    def _only_moves(self, node: Node) -> bool:
        if node.target in PADS:
            value = node.args[2:] if node.target is aten.constant_pad_nd.default else node.args[3:]
            return not any(value) and node.args[2:3] in ((), ("constant",), (0,), (0.0,))
        return node.target in SHAPE_ONLY or self._number(node) is not None

    def _scales_channels(self, node: Node) -> bool:
        return node.op == "call_module" and isinstance(self.old.get_submodule(str(node.target)), ChannelScale)

    def _number(self, node: Node) -> float | None:
        """What a value is multiplied with, if it is one number."""
        if node.target not in SCALINGS:
            return None
        other = node.args[1]
        if isinstance(other, Node) and other in self.constants and self.constants[other].numel() == 1:
            other = float(self.constants[other])
        if not isinstance(other, int | float):
            return None
        return float(other) if node.target is aten.mul.Tensor else 1 / other

    def _constant(self, node: object) -> Tensor:
        if not isinstance(node, Node) or node not in self.constants:
            raise UnsupportedOperation(f"{self._describe(self.like)} with a parameter that depends on the image")  # type: ignore[arg-type]
        return self.constants[node].detach()

    def _scalar(self, request: Request) -> Tensor:
        return torch.tensor(self.scales.activation(request), dtype=torch.float64)

    def _describe(self, node: Node) -> str:
        target = str(node.target).removeprefix("aten.").partition(".")[0] if node.op == "call_function" else node.op
        return f"{target} ({node.name})"


def _constants(graph_module: GraphModule) -> Mapping[Node, Tensor]:
    """The value of every tensor that no image changes."""
    values: dict[Node, Any] = {}
    for node in graph_module.graph.nodes:
        if node.op == "get_attr":
            values[node] = tensor(graph_module, node).detach()
        elif node.op == "call_function" and all(n in values for n in node.all_input_nodes):
            args, kwargs = map_arg((node.args, node.kwargs), values.__getitem__)
            values[node] = node.target(*args, **kwargs)
    return {node: value for node, value in values.items() if isinstance(value, Tensor)}


def _has_tensors(value: object) -> bool:
    return isinstance(value, Tensor | tuple | list)


def _owner(node: object) -> str:
    """The name of a parameter, or of the operation that gives a constant."""
    assert isinstance(node, Node)
    return str(node.target) if node.op == "get_attr" else node.name
