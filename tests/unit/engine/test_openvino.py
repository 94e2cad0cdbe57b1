import subprocess
import sys

import numpy as np
import pytest
import torch
from tiny_models import VIT_ATTENTION_MACS, VIT_MACS, quantized

from martlet import engine as engines
from martlet.core.errors import EngineError
from martlet.core.model import Model
from martlet.core.report import environment
from martlet.engine.openvino import OpenVINO, OpenVINOSession, _executed, _Node, _Product
from martlet.graph.sites import sites, source
from martlet.models.random_weights import randomize_
from martlet.nn.quantizers import ActivationQuantizer
from martlet.source import load_model
from martlet.techniques.quantize import int8 as int8_technique

vnni = pytest.mark.skipif("vnni" not in environment()["cpu"], reason="no int8 dot products on this processor")


def macs_by(ops, attention: bool) -> dict[str, int]:
    found: dict[str, int] = {}
    for op in ops:
        if op.macs and op.attention == attention:
            found[op.precision] = found.get(op.precision, 0) + op.macs
    return found


def profile(model: Model, lowered, images: np.ndarray, precision: str = "f32"):
    return OpenVINO().open(lowered(model, "openvino"), batch=3, precision=precision).profile(images, repeats=2)


def test_files_hold_float32_weights(vit, lowered):
    folder = lowered(vit, "openvino")
    params = sum(p.numel() for p in vit.module.parameters())
    assert (folder / "model.bin").stat().st_size > 0.98 * 4 * params  # equal tensors are stored once


def test_int8_files_are_a_quarter(vit, int8, lowered):
    whole, small = (lowered(model, "openvino") / "model.bin" for model in (vit, int8("openvino")))
    assert small.stat().st_size < 0.4 * whole.stat().st_size  # norms, biases and position embeddings stay float32


@vnni
def test_every_product_of_an_int8_vit_runs_in_i8(int8, lowered, images):
    ops = profile(int8("openvino"), lowered, images)
    assert macs_by(ops, attention=True) == {"i8": VIT_ATTENTION_MACS}
    assert macs_by(ops, attention=False) == {"i8": VIT_MACS - VIT_ATTENTION_MACS}


@vnni
def test_attention_left_in_float_is_seen(vit, lowered, images):
    ops = profile(quantized(vit, "openvino", attention=False), lowered, images)
    assert macs_by(ops, attention=True) == {"f32": VIT_ATTENTION_MACS}
    assert macs_by(ops, attention=False) == {"i8": VIT_MACS - VIT_ATTENTION_MACS}


@vnni
@pytest.mark.parametrize("left", ["first", "second"])
def test_two_products_in_one_kernel_are_told_apart(vit, lowered, images, left, monkeypatch):
    """With one product's rounding taken out, half of the attention's MACs are float and half int8."""
    monkeypatch.setattr(int8_technique, "share_grids_", lambda graph_module, quantizers: dict(quantizers))
    model = quantized(vit, "openvino")
    products = [site for site in sites(model.module) if site.is_attention]  # type: ignore[arg-type]
    for site in products[0 if left == "first" else 1 :: 2]:
        for position in site.activations:
            for node in _quantizers_above(model.module, site.node.args[position]):
                node.replace_all_uses_with(node.args[0])
                model.module.graph.erase_node(node)  # type: ignore[union-attr, operator]
    model.module.recompile()  # type: ignore[operator]
    products = [site for site in sites(model.module) if site.is_attention]  # type: ignore[arg-type]
    ops = profile(model, lowered, images)
    assert macs_by(ops, attention=True) == {"i8": VIT_ATTENTION_MACS // 2, "f32": VIT_ATTENTION_MACS // 2}
    named = {name: op.precision for op in ops if op.attention for name in op.name.split(" + ")}
    assert named[products[0].name] == ("f32" if left == "first" else "i8")
    assert named[products[1].name] == ("i8" if left == "first" else "f32")


def _quantizers_above(module: torch.nn.Module, node) -> list:
    found = []
    while True:
        node = source(node)
        if node.op != "call_module" or not isinstance(module.get_submodule(node.target), ActivationQuantizer):
            return found
        found.append(node)
        node = node.args[0]


def test_bf16_is_what_the_kernels_say(vit, lowered, images):
    if "bf16" not in OpenVINO().alternatives():
        pytest.skip("this processor has no bf16")
    ops = profile(vit, lowered, images, precision="bf16")
    assert macs_by(ops, attention=False).keys() == {"bf16"} == macs_by(ops, attention=True).keys()


def test_a_precision_that_the_machine_lacks_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(OpenVINO, "alternatives", lambda self: ("f32",))
    with pytest.raises(EngineError, match="this machine has no fast bf16 in openvino; it has f32"):
        OpenVINO().open(tmp_path, precision="bf16")


def test_bf16_that_is_emulated_is_no_alternative(monkeypatch):
    flags = frozenset({"avx2", "avx512f", "avx512_vnni"})  # Cascade Lake, for which OpenVINO lists BF16
    monkeypatch.setattr("martlet.engine.openvino.cpu_flags", lambda: flags)
    assert "bf16" not in OpenVINO().alternatives()
    listed = OpenVINO.alternatives(OpenVINO())
    monkeypatch.setattr("martlet.engine.openvino.cpu_flags", lambda: flags | {"avx512_bf16"})
    assert set(OpenVINO().alternatives()) - set(listed) <= {"bf16"}


def test_profiling_leaves_the_session_uncounted(vit, lowered, images):
    session = OpenVINO().open(lowered(vit, "openvino"), batch=3)
    assert isinstance(session, OpenVINOSession)
    session.profile(images, repeats=1)
    assert session._request.get_compiled_model().get_property("PERF_COUNT") == "NO"


def test_without_the_plugin_s_answer_a_fused_kernel_is_unknown(vit, lowered, images, monkeypatch):
    session = OpenVINO().open(lowered(vit, "openvino"), batch=3)
    compile_ = OpenVINOSession._compile

    def unsupported(self, **more):
        if "SNIPPETS_MODE" in more:
            raise RuntimeError("NotFound: Unsupported property SNIPPETS_MODE")
        return compile_(self, **more)

    monkeypatch.setattr(OpenVINOSession, "_compile", unsupported)
    fused = [op for op in session.profile(images, repeats=1) if op.kind == "Subgraph" and op.macs]
    assert all(op.precision == "unknown" for op in fused)


def test_a_product_that_is_nowhere_or_twice_is_an_error():
    product = _Product(10, False, ("fc/MatMul", "fc/Add"))
    node = _Node("n", "FullyConnected", "f32", ("fc/Add",), "f32")
    assert _executed([product], [node])["n"] == [product]
    with pytest.raises(EngineError, match=r"fc/MatMul in 0 operations"):
        _executed([product], [])
    with pytest.raises(EngineError, match=r"fc/MatMul in 2 operations"):
        _executed([product], [node, node._replace(name="m")])


def test_opening_imports_no_torch(vit, lowered):
    code = (
        "import sys; from pathlib import Path; from martlet import engine; import numpy as np;"
        "s = engine.get('openvino').open(Path(sys.argv[1])); print(s(np.zeros((1, 3, 32, 32), np.float32)).shape);"
        "assert 'torch' not in sys.modules"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(lowered(vit, "openvino"))], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "(1, 10)"


@pytest.mark.parametrize("heads", [2, 4])
def test_as_many_tokens_as_heads_give_the_right_logits(heads, tmp_path):
    """Four of each: OpenVINO takes one transposition for another where it fuses them, and is a third off."""
    kwargs = {"img_size": 32, "patch_size": 16, "embed_dim": 20 * heads, "depth": 1, "num_heads": heads}
    model = load_model(
        "timm:vit_tiny_patch16_224",
        model_kwargs=kwargs | {"class_token": False, "global_pool": "avg"},
        num_classes=10,
        preprocess={"size": (32, 32)},
    )
    randomize_(model.module)
    x = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = model.module(x).numpy()
    OpenVINO().lower(model, tmp_path)
    session = OpenVINO().open(tmp_path, batch=3)
    assert np.abs(session(x.numpy()) - expected).max() < 1e-4 * np.abs(expected).max()
    assert np.abs(expected[0] - expected[1]).max() > 0.01 * np.abs(expected).max()
    assert ("SNIPPETS_MODE" in session._config) == (heads == 4)


def test_version_is_a_version():
    assert int(engines.get("openvino").version().split(".")[0]) >= 2026
