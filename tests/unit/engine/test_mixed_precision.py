"""Layers that int8 leaves in floating point: no quantizer on them in the files, no int8 kernel in the engine."""

import numpy as np
import onnx
import pytest
import torch
from tiny_models import quantized

from martlet.core import store
from martlet.core.model import Model
from martlet.core.report import environment
from martlet.engine.onnx import to_onnx
from martlet.engine.openvino import OpenVINO
from martlet.graph.sites import sites

vnni = pytest.mark.skipif("vnni" not in environment()["cpu"], reason="no int8 dot products on this processor")
LEFT = ("blocks.0.attn.scores", "blocks.0.attn.values", "blocks.0.mlp.fc1", "blocks.1.attn.qkv", "head")
MOVES = {"Reshape", "Transpose", "Squeeze", "Unsqueeze", "Split", "VariadicSplit", "Slice", "StridedSlice", "Gather"}
QUANTIZED = {"DequantizeLinear", "FakeQuantize", "Multiply of integers"}


@pytest.fixture(scope="module")
def mixed(vit) -> Model:
    return quantized(vit, "openvino", float_layers=LEFT)


@pytest.fixture(scope="module")
def names(mixed) -> list[str]:
    return [site.name for site in sites(mixed.module)]


def check(operands: dict[str, list[str]], names: list[str]) -> None:
    """operands: the kinds of operation that give a multiplication's two operands, by its name."""
    assert {name for name in operands if name in names} == set(names)
    for name in names:
        assert [kind in QUANTIZED for kind in operands[name]] == [name not in LEFT] * 2, (name, operands[name])


def test_the_onnx_file_has_no_quantizer_there(mixed, names, tmp_path):
    to_onnx(mixed, tmp_path / "model.onnx")
    graph = onnx.load(tmp_path / "model.onnx").graph
    made = {output: node for node in graph.node for output in node.output}

    def kind(name: str) -> str:
        while name in made and made[name].op_type in MOVES:
            name = made[name].input[0]
        return made[name].op_type if name in made else "initializer"

    found = {n.name.partition("/")[0]: [kind(i) for i in n.input[:2]] for n in graph.node if multiplies(n.op_type)}
    check(found, names)
    floats = {t.name: t.dims for t in graph.initializer if t.data_type == onnx.TensorProto.FLOAT and len(t.dims) == 2}
    assert sorted(map(sorted, floats.values())) == [[10, 48], [48, 144], [48, 192]]  # head, qkv, fc1


def test_the_openvino_file_has_no_quantizer_there(mixed, names, lowered):
    import openvino as ov

    model = ov.Core().read_model(lowered(mixed, "openvino") / "model.xml")

    def kind(node: ov.Node) -> str:
        while node.get_type_name() in MOVES:
            node = node.input_value(0).get_node()
        above, inputs = node, 0
        while above.get_type_name() in ("Multiply", "Subtract", "Convert") and above.get_input_size() and inputs < 3:
            if above.get_type_name() == "Convert" and above.get_input_element_type(0) in (ov.Type.i8, ov.Type.u8):
                return "Multiply of integers"
            above, inputs = above.input_value(0).get_node(), inputs + 1
        return node.get_type_name()

    found = {
        node.get_friendly_name().partition("/")[0]: [kind(node.input_value(i).get_node()) for i in (0, 1)]
        for node in model.get_ordered_ops()
        if multiplies(node.get_type_name())
    }
    check(found, names)


def multiplies(kind: str) -> bool:
    return kind in ("MatMul", "Gemm", "Conv", "Convolution")


@vnni
@pytest.mark.parametrize("floating", ["f32", "bf16"])
def test_the_engine_runs_exactly_these_in_floating_point(mixed, names, lowered, images, floating):
    if floating not in OpenVINO().alternatives():
        pytest.skip(f"this processor has no {floating}")
    ops = OpenVINO().open(lowered(mixed, "openvino"), batch=3, precision=floating).profile(images, repeats=1)
    ran = {name: op.precision for op in ops if op.macs for name in op.name.split(" + ")}
    assert {name for name, precision in ran.items() if precision == "i8"} == set(names) - set(LEFT)
    assert {ran[name] for name in LEFT} <= {"f32", floating}  # of bf16 it makes an exception here and there
    assert ran["head"] == ran["blocks.0.mlp.fc1"] == floating


def test_a_reloaded_artifact_is_the_model_in_memory(vit, mixed, lowered, images):
    again = store.load(lowered(mixed, "openvino"))
    assert again.recipe.passes[0].settings() == {"float_layers": LEFT}
    x = torch.from_numpy(images)
    with torch.no_grad():
        original, simulated, reloaded = (m.module(x).numpy() for m in (vit, mixed, again.model()))
    np.testing.assert_array_equal(reloaded, simulated)
    error = np.linalg.norm(simulated - original)
    assert np.linalg.norm(again.open(batch=3)(images) - simulated) < 0.5 * error
