"""ONNX, the hub: the one file format that the engines read, with rounding as QuantizeLinear and DequantizeLinear."""

from __future__ import annotations

import ast
import contextlib
import copy
import io
import logging
import warnings
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch.fx import GraphModule

from martlet.core.errors import EngineError
from martlet.core.model import Model
from martlet.engine.base import BATCH, Piece, first_line, whole

if TYPE_CHECKING:
    import onnx
    import onnx_ir as ir

OPSET = 21
"""The first in which QuantizeLinear takes everything that is needed here, and that all engines read."""
LARGEST = 2_000_000_000
"""Bytes of weights in one file with the graph: protobuf writes none of over 2 GiB. More are in a file beside it."""


def to_onnx(model: Model, path: Path) -> list[str]:
    """Writes a whole model, from `images` (batch, 3, H, W) to `logits` (batch, K), as `write_onnx` does."""
    return write_onnx(whole(model), path)


def write_onnx(piece: Piece, path: Path) -> list[str]:
    """Writes one file for any batch, weights included; those of more than LARGEST bytes are in another, `NAME.data`.
    Returns the names.

    Nodes are named after the layer that they come from: `blocks.0.attn.qkv/MatMul`, `blocks.0.attn.scores/MatMul`.

    Raises:
        EngineError: the exporter can't write this model.
    """
    import onnx

    from martlet.graph.trace import trace
    from martlet.nn.integer import Integer
    from martlet.nn.quantizers import onnx_translations

    model, module = piece.model, piece.module
    if any(isinstance(part, Integer) for part in module.modules()):
        raise EngineError(
            f"{model.name} computes with integers alone, which only PyTorch runs here; compress it with --engine torch"
        )
    if not isinstance(module, GraphModule):
        module = trace(module, model.preprocess.size)
    try:
        with _quiet(), torch.no_grad():
            batch = torch.export.Dim(BATCH, min=1, max=1024)
            shapes = tuple({0: batch} for _ in piece.examples)
            program = torch.export.export(_prepared(module), piece.examples, dynamic_shapes=shapes)
            exported = torch.onnx.export(
                program,
                (),
                dynamo=True,
                opset_version=OPSET,
                input_names=[*piece.inputs],
                output_names=[*piece.outputs],
                custom_translation_table=onnx_translations(),
                verbose=False,
                optimize=False,
            )
            assert exported is not None
            _optimize_(exported.model)
    except Exception as error:
        raise EngineError(f"{model.name} can't be written as ONNX: {first_line(error)}") from error
    proto = exported.model_proto
    del program, exported  # what constant folding made of the weights is in it now
    _name_nodes_(proto.graph)
    _name_batch_(proto.graph)
    _narrow_(proto.graph)
    _transpose_groups_(proto.graph)
    _drop_zero_points_(proto.graph)
    if sum(len(weight.raw_data) for weight in proto.graph.initializer) <= LARGEST:
        onnx.save(proto, path)
        return [path.name]
    beside = f"{path.name}.data"
    onnx.save(proto, path, save_as_external_data=True, location=beside)
    return [path.name, beside]


def _prepared(module: GraphModule) -> GraphModule:
    """The same graph, in which each multiplication says its site's name to the exporter, rolls are lookups, and layer
    norms only normalize where Linears can do the rest.

    ONNX has no roll; written as slices that are joined, it would keep OpenVINO from multiplying what follows in int8.
    """
    from martlet.graph.rewrite.fold import fold_layer_norms_
    from martlet.graph.sites import sites

    twin = GraphModule(module, copy.deepcopy(module.graph))
    fold_layer_norms_(twin)
    for site in list(sites(twin)):
        stack = site.node.meta.get("nn_module_stack") or {}
        site.node.meta["nn_module_stack"] = {**stack, site.name: (site.name, type(site).__name__)}
    for node in twin.graph.find_nodes(op="call_function", target=torch.ops.aten.roll.default):
        x, shifts, dims = node.args
        with twin.graph.inserting_before(node):
            for shift, dim in zip(shifts, dims, strict=True):
                n = int(node.meta["val"].shape[dim])
                name = f"{node.name}_{dim}"
                twin.register_buffer(name, (torch.arange(n) - shift) % n)
                x = twin.graph.call_function(torch.ops.aten.index_select.default, (x, dim, twin.graph.get_attr(name)))
                x.meta = dict(node.meta)
        node.replace_all_uses_with(x)
        twin.graph.erase_node(node)
    _unpack_weights_(twin)
    twin.recompile()
    return twin


def _optimize_(model: ir.Model) -> None:
    """What the exporter does by default, less rules that find nothing in a graph of ours and cost a model of thousands
    of nodes minutes. The worst looks for slices that are a split, and for each node goes through all of them.
    """
    import onnx_ir.passes.common as passes
    from onnxscript.optimizer import fold_constants_ir
    from onnxscript.rewriter import RewritePass
    from onnxscript.rewriter.rules import common

    rewrite = RewritePass(
        [
            *common.mul_by_1_rule.commute(),
            *common.add_0_rule.commute(),
            common.sub_0_rule,
            common.div_by_1_rule,
            common.collapse_slice_rule,
            common.collapse_slice2_rule,
            common.materialize_reshape_shape_rule,
            common.cast_cast_rule,
            common.no_op_cast_rule,
            common.no_op_expand_rule,
            common.reshape_reshape_rule,
            common.no_op_transpose_rule,
            common.transpose_transpose_rule,
            common.unsqueeze_unsqueeze_rule,
            common.squeeze_reshape_1d_rule,
            common.normalize_pad_format_conv_rule,
            common.fuse_pad_into_conv_rule,
            common.remove_optional_bias_from_conv_rule,
        ]
    )
    passes.InlinePass()(model)
    for _ in range(2):  # what is rewritten may become constant
        changed = fold_constants_ir(model, onnx_shape_inference=True).modified
        changed |= rewrite(model).modified
        passes.RemoveUnusedNodesPass()(model)
        if not changed:
            break
    passes.RemoveUnusedFunctionsPass()(model)
    passes.RemoveUnusedOpsetsPass()(model)
    passes.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(model)
    passes.DeduplicateInitializersPass()(model)
    passes.CommonSubexpressionEliminationPass()(model)
    passes.OutputFixPass()(model)
    passes.NameFixPass()(model)


def _unpack_weights_(graph_module: GraphModule) -> None:
    """Packed weights become a byte each, which `_narrow_` packs again in ONNX's way."""
    from martlet.nn.quantizers import PackedWeightQuantizer

    graph = graph_module.graph
    for node in graph.find_nodes(op="call_module"):
        quantizer = graph_module.get_submodule(str(node.target))
        if not isinstance(quantizer, PackedWeightQuantizer):
            continue
        function, operands = quantizer.operation()
        rows, arguments = operands[0].shape, []  # (O, I), or (O, groups, n)
        with graph.inserting_before(node):
            for i, operand in enumerate(operands):
                if isinstance(operand, torch.Tensor):
                    graph_module.register_buffer(f"{node.name}_{i}", operand)
                    operand = graph.get_attr(f"{node.name}_{i}")
                arguments.append(operand)
            weight = graph.call_function(function, tuple(arguments))
            moved = [*range(1, quantizer.axis + 1), 0, *range(quantizer.axis + 1, len(quantizer.shape))]
            sizes = [quantizer.shape[quantizer.axis], *quantizer.shape[: quantizer.axis]]
            sizes += quantizer.shape[quantizer.axis + 1 :]
            if [*rows] != sizes:
                weight = graph.call_function(torch.ops.aten.reshape.default, (weight, sizes))
            if quantizer.axis != 0:
                weight = graph.call_function(torch.ops.aten.permute.default, (weight, moved))
        weight.meta = dict(node.meta)
        node.replace_all_uses_with(weight)
        graph.erase_node(node)


def _name_nodes_(graph: onnx.GraphProto) -> None:
    taken: Counter[str] = Counter()
    for node in graph.node:
        scopes = next((p.value for p in node.metadata_props if p.key == "pkg.torch.onnx.name_scopes"), "[]")
        path = next(iter(ast.literal_eval(scopes)[-2:-1]), "")
        if path.startswith("_empty"):  # the exporter's word for "from no module"
            path = ""
        if node.op_type == "Conv" and node.input[1].endswith(".weight"):  # its scope is the batch norm's, once folded
            path = node.input[1].removesuffix(".weight")
        name = f"{path}/{node.op_type}" if path else node.op_type
        taken[name] += 1
        node.name = name if taken[name] == 1 else f"{name}_{taken[name]}"
        del node.metadata_props[:]


def _name_batch_(graph: onnx.GraphProto) -> None:
    """Names the dynamic dimension, and drops the shapes in between, which engines infer."""
    for value in (*graph.input, *graph.output):
        value.type.tensor_type.shape.dim[0].dim_param = BATCH
        del value.metadata_props[:]
    del graph.value_info[:]


def _narrow_(graph: onnx.GraphProto) -> None:
    """Stores integers that are only read as 4-bit ones as these, two in a byte, the first in the low half."""
    from onnx import TensorProto, helper, numpy_helper

    tensors = {tensor.name: tensor for tensor in graph.initializer}
    for node in list(graph.node):
        to = helper.get_node_attr_value(node, "to") if node.op_type == "Cast" else None
        if to is not None and to in (TensorProto.INT4, TensorProto.UINT4):
            graph.initializer.append(_halves(node.output[0], numpy_helper.to_array(tensors[node.input[0]]), to))
            graph.node.remove(node)


def _halves(name: str, values: np.ndarray, kind: int) -> onnx.TensorProto:
    """Integers of a byte as a tensor of 4-bit ones."""
    from onnx import helper

    halves = np.pad(values.reshape(-1).view(np.uint8) & 15, (0, values.size % 2))
    return helper.make_tensor(name, kind, values.shape, (halves[::2] | halves[1::2] << 4).tobytes(), raw=True)


def _transpose_groups_(graph: onnx.GraphProto) -> None:
    """Stores weights of 4 bits or in groups as the product takes them, (I, O), and not as their transposes.

    Only so has ONNX Runtime a kernel that multiplies them; else it makes floats of them each time.
    """
    from onnx import TensorProto, numpy_helper

    tensors = {tensor.name: tensor for tensor in graph.initializer}
    made = {node.output[0]: node for node in graph.node}
    users = Counter(name for node in graph.node for name in node.input)
    for node in list(graph.node):
        above = made.get(node.input[0]) if node.op_type == "Transpose" else None
        if above is None or above.op_type != "DequantizeLinear" or users[above.output[0]] > 1:
            continue
        attributes = {attribute.name: attribute for attribute in above.attribute}
        weight = tensors.get(above.input[0])  # of an activation, there is none
        grouped = "block_size" in attributes and attributes["block_size"].i > 0
        if weight is None or not (grouped or weight.data_type == TensorProto.INT4):
            continue
        for i, name in enumerate(above.input):
            array, turned = numpy_helper.to_array(tensors[name]), f"{name}_transposed"
            if array.ndim == 2 and turned not in tensors:
                few = tensors[name].data_type == TensorProto.INT4
                array = np.ascontiguousarray(array.T)
                tensors[turned] = (
                    _halves(turned, array.astype(np.int8), TensorProto.INT4)
                    if few
                    else numpy_helper.from_array(array, turned)
                )
                graph.initializer.append(tensors[turned])
            above.input[i] = turned if array.ndim == 2 else name
        attributes["axis"].i = 1 - attributes["axis"].i
        above.output[0] = node.output[0]
        graph.node.remove(node)


def _drop_zero_points_(graph: onnx.GraphProto) -> None:
    """Leaves out the zero points of weights that are zero, as ONNX allows.

    The exporter merges equal tensors, and OpenVINO leaves a convolution and a Linear that share one in floating point.
    """
    from onnx import numpy_helper

    tensors = {tensor.name: tensor for tensor in graph.initializer}
    for node in graph.node:
        if node.op_type == "DequantizeLinear" and node.input[0] in tensors and len(node.input) == 3:
            zero_point = tensors.get(node.input[2])
            if zero_point is not None and not numpy_helper.to_array(zero_point).any():
                del node.input[2]
    used = {name for node in graph.node for name in node.input} | {value.name for value in graph.output}
    for tensor in tensors.values():
        if tensor.name not in used:
            graph.initializer.remove(tensor)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """The exporter talks through warnings, logging and print; what matters, it raises."""
    level = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    sink = io.StringIO()
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(sink), contextlib.redirect_stderr(sink):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(level)
