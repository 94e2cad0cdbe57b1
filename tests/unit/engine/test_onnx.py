import onnx
import pytest
import torch
from onnx import numpy_helper
from torch import nn

from martlet import engine
from martlet.core import store
from martlet.core.errors import EngineError, MartletError
from martlet.core.model import Model
from martlet.data.preprocess import Preprocess
from martlet.engine.onnx import to_onnx


def test_one_file_with_named_nodes_and_a_free_batch(vit, tmp_path, capfd):
    to_onnx(vit, tmp_path / "model.onnx")
    assert capfd.readouterr() == ("", "")
    assert [path.name for path in tmp_path.iterdir()] == ["model.onnx"]
    model = onnx.load(tmp_path / "model.onnx")
    onnx.checker.check_model(model)
    [image], [logits] = model.graph.input, model.graph.output
    assert (image.name, logits.name) == ("images", "logits")
    assert [d.dim_param or d.dim_value for d in image.type.tensor_type.shape.dim] == ["batch", 3, 32, 32]
    names = [node.name for node in model.graph.node]
    assert len(set(names)) == len(names)
    assert {"blocks.0.attn.qkv/MatMul", "blocks.1.attn.scores/MatMul", "patch_embed.proj/Conv"} <= set(names)


def test_what_norms_multiply_by_is_in_the_linears_and_the_model_stays_as_it_is(vit, tmp_path):
    before = {name: tensor.clone() for name, tensor in vit.module.state_dict().items()}
    to_onnx(vit, tmp_path / "model.onnx")
    tensors = {t.name: numpy_helper.to_array(t) for t in onnx.load(tmp_path / "model.onnx").graph.initializer}
    assert not any(name.startswith("blocks.") and "norm" in name for name in tensors)
    after = vit.module.state_dict()
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())


def test_int8_weights_are_stored_as_integers_without_zero_points(int8, tmp_path):
    model = int8("openvino")
    code = model.module.code
    to_onnx(model, tmp_path / "model.onnx")
    assert model.module.code == code  # the model itself is left alone
    graph = onnx.load(tmp_path / "model.onnx").graph
    tensors = {tensor.name: tensor for tensor in graph.initializer}
    weights = [node for node in graph.node if node.op_type == "DequantizeLinear" and node.input[0] in tensors]
    assert len(weights) >= 10  # patches, four in each of two blocks, head
    assert all(len(node.input) == 2 for node in weights)
    assert all(tensors[node.input[0]].data_type == onnx.TensorProto.INT8 for node in weights)
    codes = numpy_helper.to_array(tensors[weights[1].input[0]])
    assert abs(codes.astype(int)).max() > 100  # the grid is used
    used = {name for node in graph.node for name in node.input}
    assert set(tensors) <= used


class Rolling(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.roll(x, (1, -2), (2, 3)).flatten(2)[:, :, :7].sum(1) * torch.arange(7)


def test_rolls_are_lookups(tmp_path):
    from onnx.reference import ReferenceEvaluator

    module = Rolling()
    model = Model(name="roll", module=module, preprocess=Preprocess(size=(4, 5)), num_classes=7, origin={})
    to_onnx(model, tmp_path / "model.onnx")
    proto = onnx.load(tmp_path / "model.onnx")
    assert [node.op_type for node in proto.graph.node].count("Gather") >= 2
    x = torch.randn(3, 3, 4, 5)
    [logits] = ReferenceEvaluator(proto).run(None, {"images": x.numpy()})  # type: ignore[misc]
    torch.testing.assert_close(torch.from_numpy(logits), module(x))


class Inexpressible(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.special.airy_ai(x.mean((2, 3)))


def test_what_onnx_lacks_is_one_line(tmp_path):
    model = Model(name="airy", module=Inexpressible(), preprocess=Preprocess(size=(4, 4)), num_classes=3, origin={})
    with pytest.raises(EngineError, match="airy can't be written as ONNX: ") as caught:
        to_onnx(model, tmp_path / "model.onnx")
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.iterdir())


def test_weights_too_large_for_protobuf_have_a_file_beside_it(vit, tmp_path, monkeypatch):
    monkeypatch.setattr("martlet.engine.onnx.LARGEST", 1000)
    images = torch.randn(2, 3, *vit.preprocess.size)
    with torch.no_grad():
        expected = vit.module(images)
    for name, files in (("onnxruntime", {"model.onnx", "model.onnx.data"}), ("openvino", {"model.xml", "model.bin"})):
        with store.writing(tmp_path / name) as folder:
            store.seal(folder, vit, name, store.write_model(folder, vit, engine.get(name)))
        moved = (tmp_path / name).rename(tmp_path / f"moved {name}")
        artifact = store.load(moved)
        assert files <= {path.name for path in moved.iterdir()}
        assert files <= {*artifact.manifest["engine_files"]}
        assert torch.allclose(torch.from_numpy(artifact.open(batch=2)(images.numpy())), expected, atol=1e-4), name
    text, weights = (tmp_path / "moved onnxruntime" / name for name in ("model.onnx", "model.onnx.data"))
    assert text.stat().st_size < 0.5 * weights.stat().st_size
    weights.write_bytes(weights.read_bytes()[:-4])
    with pytest.raises(MartletError, match=r"model\.onnx\.data is not what was written"):
        store.load(tmp_path / "moved onnxruntime").open()
