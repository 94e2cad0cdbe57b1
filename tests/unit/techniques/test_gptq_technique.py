"""gptq on tiny models: what it rounds and on which inputs, what it stores, and what the engines make of that."""

import copy
import functools
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from timm.models.vision_transformer import VisionTransformer
from tiny import Smooth, wrap
from torch import Tensor, nn
from torch.fx import GraphModule

from martlet import engine as engines
from martlet.core import pipeline, store
from martlet.core.errors import ArtifactError, NumericsError, RecipeError, UsageError
from martlet.core.model import Model
from martlet.core.recipe import Recipe
from martlet.core.technique import Context, silent
from martlet.engine.onnx import to_onnx
from martlet.functional.quantize.formats import IntegerGrid
from martlet.functional.quantize.gptq import gptq, input_hessian, output_error, round_to_nearest
from martlet.graph import sequential as module
from martlet.graph.bits import bit_map
from martlet.graph.observe import observe_calls
from martlet.graph.sites import sites
from martlet.graph.trace import trace
from martlet.measure import size
from martlet.nn.quantizers import PackedWeightQuantizer
from martlet.techniques.quantize.gptq import GPTQ
from martlet.techniques.quantize.int8 import Int8

SIZE = (16, 16)
MODELS: dict[str, dict[str, Any]] = {
    "class token": {},
    "no class token": {"class_token": False, "global_pool": "avg", "depth": 3},
    "registers": {"reg_tokens": 2, "qk_norm": True},
}


SMOOTH = functools.partial(Smooth, batches=(16, 16), size=SIZE, coarse=5, noise=0.1)


def model(**settings: Any) -> Model:
    torch.manual_seed(0)
    sizes = {"img_size": 16, "patch_size": 4, "embed_dim": 64, "depth": 1, "num_heads": 4, "num_classes": 5}
    vit = VisionTransformer(**(sizes | settings))  # type: ignore[arg-type]
    with torch.no_grad():
        for parameter in vit.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape))
    return wrap(vit, SIZE)


def compress(original: Model, **settings: Any) -> Model:
    return pipeline.run(original, Recipe((GPTQ(**settings),)), Context(images=SMOOTH()))


def images(n: int = 4, seed: int = 9) -> Tensor:
    return next(iter(SMOOTH(seed)))[:n]


def logits(module: nn.Module, x: Tensor) -> Tensor:
    with torch.no_grad():
        out = module(x)
    return out[0] if isinstance(out, (list, tuple)) else out


def error(reference: Tensor, other: Tensor) -> float:
    return ((reference - other).norm() / reference.norm()).item()


def quantizers(compressed: Model) -> dict[str, PackedWeightQuantizer]:
    named = compressed.module.named_modules()
    return {n.removesuffix(".weight_quantizer"): m for n, m in named if isinstance(m, PackedWeightQuantizer)}


def inputs_of(graph_module: GraphModule) -> dict[str, Tensor]:
    """The rows that each Linear reads, over the calibration images."""
    rows: dict[str, list[Tensor]] = {}

    def keep(name: str) -> Any:
        return lambda value, x, *rest: rows.setdefault(name, []).append(x.flatten(0, -2))

    watch = {site.node: keep(site.name) for site in sites(graph_module) if site.kind == "linear"}
    observe_calls(graph_module, SMOOTH(), watch, silent, "")
    return {name: torch.cat(parts) for name, parts in rows.items()}


@pytest.mark.sampled(4)
@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("settings", [{}, {"bits": 3, "group_size": 0}, {"bits": 5, "activation_order": True}])
def test_a_rebuilt_model_takes_the_state_dict_bit_for_bit(kind: str, settings: dict[str, Any]) -> None:
    compressed = compress(model(**MODELS[kind]), **settings)
    rebuilt = model(**MODELS[kind])
    pipeline.restore_(rebuilt, copy.deepcopy(compressed.steps))
    assert {n: t.shape for n, t in rebuilt.module.state_dict().items()} == {
        n: t.shape for n, t in compressed.module.state_dict().items()
    }
    rebuilt.module.load_state_dict(compressed.module.state_dict())
    assert torch.equal(logits(rebuilt.module, images()), logits(compressed.module, images()))


@pytest.mark.parametrize(("kind", "bits"), [*((kind, 3) for kind in MODELS), ("class token", 4)])
def test_every_linear_is_rounded_for_the_inputs_that_the_rounded_ones_before_it_give(kind: str, bits: int) -> None:
    original = model(**MODELS[kind])
    compressed = compress(original, bits=bits, activation_order=True, damping=0.02)
    assert isinstance(compressed.module, GraphModule)
    weights = {name: m.weight for name, m in original.module.named_modules() if isinstance(m, nn.Linear)}
    found = quantizers(compressed)
    assert found.keys() == weights.keys()
    assert len(found) == 4 * MODELS[kind].get("depth", 1) + 1

    def agreement(rows: dict[str, Tensor], name: str) -> float:
        seen, features = rows[name].shape
        damping = max(0.02, 0.3 * features / seen)
        grid = IntegerGrid(bits, symmetric=bits > 3)
        expected = gptq(weights[name], input_hessian(rows[name]), grid, 32, damping, activation_order=True)
        return (found[name].integers()[0] + 2 ** (bits - 1) == expected.codes).float().mean().item()

    after, before = inputs_of(compressed.module), inputs_of(trace(original.module, SIZE))
    assert min(agreement(after, name) for name in found) > 0.999  # batches of another size sum in another order
    assert agreement(before, "head") < 0.99  # inputs of the model as it was would show


@pytest.mark.parametrize("settings", [{"bits": 3}, {"bits": 4, "group_size": 0}, {"bits": 4, "activation_order": True}])
def test_outputs_err_less_than_rounded_to_nearest(monkeypatch: pytest.MonkeyPatch, settings: dict[str, Any]) -> None:
    original = model(depth=3)
    better = compress(original, **settings)
    monkeypatch.setattr(module, "gptq", lambda weight, hessian, grid, size, *_: round_to_nearest(weight, grid, size))
    nearest = compress(original, **settings)
    assert isinstance(better.module, GraphModule)
    rows = inputs_of(better.module)
    for name, first in quantizers(better).items():
        weight = original.module.get_submodule(name).weight
        hessian = input_hessian(rows[name])
        errors = [output_error(q() - weight, hessian).sum().item() for q in (first, quantizers(nearest)[name])]
        assert errors[0] < errors[1], name
    x = images(16)  # others than it was calibrated on
    exact = logits(original.module, x)
    assert error(exact, logits(better.module, x)) < error(exact, logits(nearest.module, x))


def test_few_rows_are_not_made_up_for_at_the_cost_of_others() -> None:
    """A classifier sees one row an image: 128 of 192 features, as ViT-Ti's."""
    generator = torch.Generator().manual_seed(0)
    mixing = torch.randn(192, 192, generator=generator)
    seen, others = (torch.randn(n, 192, generator=generator) @ mixing for n in (128, 2000))
    weight, grid = torch.randn(64, 192, generator=generator), IntegerGrid(4)

    def loss(rounded: Tensor, rows: Tensor) -> float:
        return output_error(rounded - weight, input_hessian(rows)).sum().item()

    found = GPTQ().round(seen, weight, None, grid, 32).weight
    nearest = round_to_nearest(weight, grid, 32).weight
    fitted = gptq(weight, input_hessian(seen), grid, 32, GPTQ().damping).weight
    assert loss(found, seen) < loss(nearest, seen)
    assert loss(found, others) < loss(nearest, others)
    assert loss(fitted, others) > loss(nearest, others)  # what the damping of many rows would do
    rows = torch.cat([seen] * 100)  # many: the damping asked for
    assert torch.equal(
        GPTQ().round(rows, weight, None, grid, 32).codes, gptq(weight, input_hessian(rows), grid, 32, 0.01).codes
    )


@pytest.mark.parametrize("bits", [2, 4, 8])  # from 3 to 4 the kind of grid changes too
def test_error_falls_as_bits_rise(bits: int) -> None:
    original = model()
    exact, x = logits(original.module, images()), images()
    fewer = compress(original, bits=bits) if bits < 8 else compress(original, bits=7)
    more = compress(original, bits=bits + 1) if bits < 8 else compress(original, bits=8)
    assert error(exact, logits(more.module, x)) < error(exact, logits(fewer.module, x))


def test_what_is_stored_is_as_small_as_it_says() -> None:
    original = model(embed_dim=48)
    compressed = compress(original)
    [step] = compressed.steps
    assert step.record["quantized"] == {"linear": 5}
    assert step.record["group_sizes"] == {"24": 4, "32": 1}  # 48 is no multiple of 32; 192 is
    linear = sum(m.weight.numel() for m in original.module.modules() if isinstance(m, nn.Linear))
    groups = sum(q.scale.numel() for q in quantizers(compressed).values())
    rest = size.weight_bytes(original.module) - 4 * linear
    assert size.weight_bytes(compressed.module) == linear // 2 + 4 * groups + rest
    assert size.params(compressed.module) == size.params(original.module)
    assert isinstance(compressed.module, GraphModule)
    found = bit_map(compressed.module, "bf16")
    assert (found["linear_weight"], found["linear_input"], found["conv_weight"]) == ("4", "bf16", "bf16")


@pytest.mark.parametrize(("bits", "simulated"), [(2, True), (3, True), (4, False), (5, True), (8, False)])
def test_only_widths_with_kernels_are_not_simulated(bits: int, simulated: bool) -> None:
    compressed = compress(model(), bits=bits)
    assert compressed.rounded
    assert engines.get("openvino").simulates(compressed) == simulated
    assert engines.get("torch").simulates(compressed)


@pytest.mark.sampled(3)
@pytest.mark.parametrize("settings", [{}, {"group_size": 0}, {"bits": 3}, {"bits": 8}, {"bits": 6, "group_size": 16}])
@pytest.mark.parametrize("target", ["openvino", "onnxruntime"])
def test_engines_give_the_logits_of_the_model(tmp_path, target: str, settings: dict[str, Any]) -> None:
    compressed = compress(model(**MODELS["registers"]), **settings)
    engine = engines.get(target)
    engine.lower(compressed, tmp_path)
    session = engine.open(tmp_path, batch=4, threads=2)
    expected = logits(compressed.module, images())
    assert error(expected, torch.from_numpy(session(images().numpy()))) < 1e-5
    ops = session.profile(images().numpy(), repeats=1)
    assert {op.precision for op in ops if op.macs} == {"f32"}  # no engine rounds the activations on its own


def test_openvino_multiplies_4_bit_weights(tmp_path) -> None:
    import openvino as ov

    compressed = compress(model(embed_dim=128))
    engine = engines.get("openvino")
    engine.lower(compressed, tmp_path)
    session = engine.open(tmp_path, batch=1, threads=2)
    nodes = session._compile().get_runtime_model().get_ordered_ops()  # type: ignore[attr-defined]
    linears = [n for n in nodes if n.get_rt_info()["layerType"].astype(str) == "FullyConnected"]
    assert len(linears) == 5
    assert all(ov.Type.i4 in [i.get_element_type() for i in node.inputs()] for node in linears)


def test_onnxruntime_multiplies_4_bit_weights(tmp_path) -> None:
    compressed = compress(model(embed_dim=128))
    engine = engines.get("onnxruntime")
    engine.lower(compressed, tmp_path)
    ops = engine.open(tmp_path, batch=1, threads=1).profile(images(1).numpy(), repeats=1)
    assert sum(op.kind == "MatMulNBits" for op in ops if op.macs) == 4  # and a Gemm, of the head
    assert sum(op.kind == "DequantizeLinear" for op in ops) == 1


@pytest.mark.sampled(2)
@pytest.mark.parametrize(("bits", "kind"), [(4, "INT4"), (3, "INT4"), (8, "INT8")])
@pytest.mark.parametrize("group_size", [0, 32])
def test_the_file_holds_integers_of_the_width(tmp_path, bits: int, kind: str, group_size: int) -> None:
    compressed = compress(model(), bits=bits, group_size=group_size)
    to_onnx(compressed, tmp_path / "model.onnx")
    proto = onnx.load(tmp_path / "model.onnx")
    onnx.checker.check_model(proto, full_check=True)
    tensors = {tensor.name: tensor for tensor in proto.graph.initializer}
    found = [node for node in proto.graph.node if node.op_type == "DequantizeLinear"]
    assert len(found) == 5
    turned = bits <= 4 or group_size > 0  # as MatMul takes them; the head is a Gemm
    values = {
        (q.integers()[0].T if turned and name != "head" else q.integers()[0]).numpy().tobytes()
        for name, q in quantizers(compressed).items()
    }
    for node in found:
        tensor, attributes = tensors[node.input[0]], {a.name: a.i for a in node.attribute}
        assert tensor.data_type == onnx.TensorProto.DataType.Value(kind)
        assert attributes.get("block_size", 0) == group_size
        assert onnx.numpy_helper.to_array(tensor).astype(np.int8).tobytes() in values
    assert sum(tensor.data_type == onnx.TensorProto.INT8 for tensor in tensors.values()) == (5 if bits == 8 else 0)


def test_the_artifact_says_that_it_is_simulated(tmp_path) -> None:
    engine = engines.get("openvino")
    for bits, simulated in ((4, False), (3, True)):
        folder = tmp_path / str(bits)
        folder.mkdir()
        compressed = compress(model(), bits=bits)
        store.seal(folder, compressed, "openvino", store.write_model(folder, compressed, engine))
        assert store.load(folder).manifest["model"]["simulated"] == simulated


class Tied(nn.Module):
    """Two Linears of one weight; the second's inputs are other ones."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.head = nn.Linear(768, 768), nn.Linear(768, 768), nn.Linear(768, 5)
        self.second.weight = self.first.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.second(self.first(x.flatten(1)).relu()))


def test_a_shared_weight_is_rounded_once() -> None:
    compressed = compress(wrap(Tied(), SIZE), damping=0.1)
    assert len(quantizers(compressed)) == 2
    rebuilt = wrap(Tied(), SIZE)
    pipeline.restore_(rebuilt, compressed.steps)
    rebuilt.module.load_state_dict(compressed.module.state_dict())
    assert torch.equal(logits(rebuilt.module, images()), logits(compressed.module, images()))


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"bits": 1}, "bits is 1; it can be 2 to 8"),
        ({"bits": 9}, "bits is 9; it can be 2 to 8"),
        ({"group_size": -1}, "group_size is -1; it can be 0"),
        ({"damping": 0.0}, "damping is 0; it has to be above 0"),
        ({"damping": float("nan")}, "damping is nan"),
    ],
)
def test_settings_out_of_range(settings: dict[str, Any], text: str) -> None:
    with pytest.raises(RecipeError, match=text):
        GPTQ(**settings)


def test_groups_that_divide_nothing_are_refused_by_the_name_of_the_linear() -> None:
    with pytest.raises(
        RecipeError, match=r"gptq: blocks\.0\.attn\.qkv has 62 input features, which no groups of 15 to 30"
    ):
        compress(model(embed_dim=62, num_heads=2), group_size=30)


def test_what_has_no_linear_is_refused() -> None:
    convolution = wrap(nn.Sequential(nn.Conv2d(3, 5, 16), nn.Flatten()))
    with pytest.raises(UsageError, match="gptq: tiny has no Linear"):
        compress(convolution)


def test_a_weight_that_is_not_finite_is_named() -> None:
    original = model()
    with torch.no_grad():
        original.module.get_parameter("blocks.0.mlp.fc1.weight")[0, 0] = float("nan")
    with pytest.raises(NumericsError, match=r"gptq: blocks\.0\.mlp\.fc1: .*NaN or infinite"):
        compress(original)


def test_activations_stay_free_and_weights_do_not() -> None:
    with pytest.raises(RecipeError, match=r"int8 requires 'float_weights', which passes\[0\] gptq breaks"):
        pipeline.run(model(), Recipe((GPTQ(), Int8())), Context(images=SMOOTH()))
    assert "float_activations" in compress(model()).facts


def test_a_record_of_another_graph_is_refused() -> None:
    compressed = compress(model())
    compressed.steps[0].record["rounding"]["weights"][0][0] = "linear_99"
    with pytest.raises(ArtifactError, match=r"no node .linear_99"):
        pipeline.restore_(model(), compressed.steps)


@pytest.mark.parametrize(("name", "bits"), [("gptq-w4", 4), ("gptq-w3", 3)])
def test_shipped_recipes(name: str, bits: int) -> None:
    passes = Recipe.load(name).passes
    assert [technique.name for technique in passes] == ["fuse", "gptq", "bf16"]
    assert passes[1] == GPTQ(bits=bits)


def test_without_compensation_every_weight_goes_to_the_nearest_code() -> None:
    original = model()
    compressed = compress(original, bits=3, compensate=False)
    weights = dict(original.module.named_parameters())
    for name, quantizer in quantizers(compressed).items():
        weight, rounded = weights[f"{name}.weight"], quantizer()
        step, zero = (
            its.repeat_interleave(quantizer.group_size, 1) for its in (quantizer.scale, quantizer.zero_point.float())
        )
        reached = weight.clamp(-zero * step, (7 - zero) * step)  # codes 0 to 7
        assert bool(((reached - rounded).abs() <= step / 2 * (1 + 1e-4)).all()), name
    assert error(logits(compress(original, bits=3).module, images()), logits(compressed.module, images())) > 1e-3
