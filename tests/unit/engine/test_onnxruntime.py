import builtins
import subprocess
import sys

import onnx
import pytest
from tiny_models import VIT_ATTENTION_MACS

from martlet.core.errors import EngineError
from martlet.engine.onnxruntime import ONNXRuntime, _attribute, _Product


def test_int8_linears_and_products_run_in_i8(int8, lowered, images):
    model = int8("onnxruntime")
    ops = ONNXRuntime().open(lowered(model, "onnxruntime"), batch=3).profile(images, repeats=2)
    assert sum(op.macs for op in ops if op.attention and op.precision == "i8") == VIT_ATTENTION_MACS
    linear = {op.name: op.precision for op in ops if op.macs and op.name.startswith("blocks")}
    assert set(linear.values()) == {"i8"}
    assert len(linear) == 12


def test_float32_is_all_it_computes_in(vit, tmp_path):
    from dataclasses import replace

    with pytest.raises(EngineError, match="onnxruntime computes in f32, not in bf16"):
        ONNXRuntime().lower(replace(vit, precision="bf16"), tmp_path)


def test_not_installed_says_what_to_type(monkeypatch):
    real = builtins.__import__

    def without(name, *args, **kwargs):
        if name == "onnxruntime":
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.delitem(sys.modules, "onnxruntime", raising=False)
    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(EngineError, match=r"pip install 'martlet\[onnxruntime\]'"):
        ONNXRuntime().version()


def test_the_file_is_plain_onnx(vit, lowered):
    model = onnx.load(lowered(vit, "onnxruntime") / "model.onnx")
    onnx.checker.check_model(model, full_check=True)  # which takes any operator of a domain that it doesn't know
    assert {node.domain for node in model.graph.node} == {""}
    assert len(model.functions) == 0


def test_fused_kernels_are_found_by_what_they_were_called():
    first = _Product("a.fc/MatMul", 5, False, ("a.fc/MatMul", "val_1"))
    second = _Product("a.fc/MatMul_2", 7, False, ("a.fc/MatMul_2", "val_2", "a/Relu", "relu_1"))
    executed = {"a.fc/MatMul/MatMulScaleFusion/": ("a.fc/MatMul/MatMulScaleFusion/",), "x": ("x", "relu_1_nchwc")}
    assert _attribute([first, second], executed) == {"a.fc/MatMul/MatMulScaleFusion/": first, "x": second}
    with pytest.raises(EngineError, match=r"a\.fc/MatMul_2 in 0 operations"):
        _attribute([first, second], {"a.fc/MatMul": ("a.fc/MatMul",)})


def test_running_a_file_needs_no_torch(vit, lowered):
    """A process that only runs the file, whose memory is measured, holds the engine and not what made the file."""
    code = (
        "import sys; from pathlib import Path; from martlet import engine; "
        "engine.get('onnxruntime').open(Path(sys.argv[1]), threads=1); "
        "print(*({'torch', 'timm', 'onnx', 'onnxruntime'} & set(sys.modules)))"
    )
    call = [sys.executable, "-c", code, lowered(vit, "onnxruntime")]
    assert subprocess.run(call, capture_output=True, text=True, check=True).stdout == "onnxruntime\n"
