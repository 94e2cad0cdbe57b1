"""All engines give the logits of torch, and count the MACs that paper and pencil give."""

import numpy as np
import pytest
import torch
from tiny_models import CONV_MACS, VIT_ATTENTION_MACS, VIT_MACS

from martlet import engine as engines
from martlet.core.errors import EngineError, UsageError
from martlet.measure import macs


@pytest.mark.parametrize("name", ["vit", "conv"])
@pytest.mark.parametrize("engine", ["openvino", "onnxruntime"])
def test_logits_are_those_of_torch(request, lowered, images, name, engine):
    model = request.getfixturevalue(name)
    session = engines.get(engine).open(lowered(model, engine), batch=3)
    with torch.no_grad():
        expected = model.module(torch.from_numpy(images)).numpy()
    logits = session(images)
    assert logits.dtype == np.float32
    assert logits.shape == expected.shape
    assert np.abs(logits - expected).max() < 1e-3 * np.abs(expected).max()
    assert np.abs(session(-images) - expected).max() > 0.01 * np.abs(expected).max()  # the comparison can fail


@pytest.mark.parametrize("engine", ["openvino", "onnxruntime", "torch"])
def test_macs_of_a_vit_are_all_attributed(vit, lowered, images, engine):
    ops = engines.get(engine).open(lowered(vit, engine), batch=3).profile(images, repeats=2)
    assert sum(op.macs for op in ops) == VIT_MACS == macs.macs(vit)
    assert sum(op.macs for op in ops if op.attention) == VIT_ATTENTION_MACS
    assert {op.precision for op in ops if op.macs} == {"f32"}
    names = {part for op in ops for part in op.name.split(" + ") if op.macs}
    assert {"patch_embed.proj", "blocks.0.attn.qkv", "blocks.1.attn.scores", "blocks.1.mlp.fc2", "head"} <= names
    assert sum(op.microseconds for op in ops) > 0


@pytest.mark.parametrize("engine", ["openvino", "onnxruntime"])
def test_macs_of_convolutions_are_all_attributed(conv, lowered, images, engine):
    ops = engines.get(engine).open(lowered(conv, engine), batch=3).profile(images, repeats=2)
    assert sum(op.macs for op in ops) == CONV_MACS == macs.macs(conv)
    assert not any(op.attention for op in ops)


@pytest.mark.parametrize("engine", ["openvino", "onnxruntime"])
def test_int8_keeps_close_to_its_simulation(vit, int8, lowered, images, engine):
    model = int8(engine)
    session = engines.get(engine).open(lowered(model, engine), batch=3)
    with torch.no_grad():
        simulated = model.module(torch.from_numpy(images)).numpy()
        original = vit.module(torch.from_numpy(images)).numpy()
    # Kernels may round a half the other way; that is far less than the rounding itself.
    assert np.linalg.norm(session(images) - simulated) < 0.5 * np.linalg.norm(simulated - original)


def test_unknown_engine_names_the_nearest():
    with pytest.raises(UsageError, match="did you mean openvino"):
        engines.get("openvin")


@pytest.mark.parametrize("engine", ["openvino", "onnxruntime"])
def test_missing_and_damaged_files_are_one_line(tmp_path, engine):
    with pytest.raises(EngineError, match="has no model"):
        engines.get(engine).open(tmp_path)
    for name in ("model.xml", "model.bin", "model.onnx"):
        (tmp_path / name).write_bytes(b"damaged")
    with pytest.raises(EngineError, match=f"{engine} can't open") as caught:
        engines.get(engine).open(tmp_path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("engine", ["openvino", "onnxruntime", "torch"])
def test_unknown_precision_is_refused(tmp_path, engine):
    with pytest.raises(EngineError, match=f"{engine} computes in f32.*not in int3"):
        engines.get(engine).open(tmp_path, precision="int3")


@pytest.mark.parametrize("engine", ["openvino", "onnxruntime"])
def test_another_batch_is_a_defect_of_the_caller(vit, lowered, images, engine):
    session = engines.get(engine).open(lowered(vit, engine), batch=2)
    with pytest.raises(ValueError, match=r"takes float32 \(2, 3, H, W\)"):
        session(images)


@pytest.mark.parametrize("engine", ["openvino", "onnxruntime", "torch"])
def test_threads_are_as_asked(vit, lowered, engine):
    assert engines.get(engine).open(lowered(vit, engine), threads=1).threads == 1
