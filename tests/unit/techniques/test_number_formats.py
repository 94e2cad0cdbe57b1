"""weight_only and fp8 against the formats' definitions in float64, and what engines make of their files."""

import copy
import functools
from collections import Counter

import numpy as np
import openvino as ov
import pytest
import torch
from tiny import Smooth, error, images, logits, model, vit, wrap
from torch import nn

from martlet import engine as engines
from martlet.core import pipeline
from martlet.core.errors import EngineError, NumericsError, RecipeError, UsageError
from martlet.core.model import Model
from martlet.core.recipe import Recipe
from martlet.core.technique import Context, Technique
from martlet.functional.quantize import affine
from martlet.functional.quantize.formats import float8, normal_float4
from martlet.graph.bits import bit_map
from martlet.nn.quantizers import ActivationQuantizer, PackedWeightQuantizer, WeightQuantizer, build, structure
from martlet.techniques.quantize.fp8 import FP8
from martlet.techniques.quantize.int8 import Int8
from martlet.techniques.quantize.weight_only import FORMATS, WeightOnly

VALUES = {
    "int4": [float(v) for v in range(-7, 8)],
    "int8": [float(v) for v in range(-127, 128)],
    "nf4": [*normal_float4()],  # compared with the published table in test_formats.py
    "power_of_two": sorted([0.0, *(s * 2.0**-k for s in (-1, 1) for k in range(7))]),
    "fp8_e4m3": [*float8(4)],  # compared with PyTorch's in test_formats.py
    "fp8_e5m2": [*float8(5)],
}


class Convolutions(nn.Module):
    """A plain and a grouped convolution, a transposed one, which stays in floating point, and a Linear."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, stride=2, padding=1)
        self.grouped = nn.Conv2d(8, 8, 3, padding=1, groups=4)
        self.up = nn.ConvTranspose2d(8, 4, 2, stride=2)
        self.head = nn.Linear(4, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.up(torch.relu(self.grouped(torch.relu(self.stem(x))))).mean((2, 3)))


@functools.cache
def original(name: str) -> Model:
    torch.manual_seed(0)
    return wrap(Convolutions()) if name == "convolutions" else model(name)


def run(of: Model, technique: Technique) -> Model:
    return pipeline.run(of, Recipe((technique,)), Context(images=Smooth()))


@functools.cache
def done(name: str, technique: Technique) -> Model:
    return run(original(name), technique)


def wide() -> Model:
    """Every weight has more than 8192 elements; the exporter computes with smaller ones itself."""
    torch.manual_seed(0)
    return wrap(vit(embed_dim=128, num_heads=4, num_classes=96))


def oracle(row: np.ndarray, size: int, format: str) -> np.ndarray:
    """A row, (I,), rounded group by group: to the nearest value at the scale with the least squared error."""
    table, rounded = np.array(VALUES[format]), []
    for group in row.reshape(-1, size):
        whole = (abs(group).max() or 1.0) / abs(table).max()
        parts = [1.0] if format.startswith("fp8") else [1 - i / 100 for i in range(51)]
        tries = []
        for part in parts:
            scale = whole * part
            tries.append(table[abs(group[:, None] / scale - table).argmin(1)] * scale)
        rounded.append(min(tries, key=lambda t: ((t - group) ** 2).sum()))
    return np.concatenate(rounded)


def weights(name: str, technique: Technique) -> list[tuple[np.ndarray, np.ndarray, int]]:
    """Each weight's rows as they were and as they are, (O, I), and how many columns share a scale."""
    found, before = [], dict(original(name).module.named_parameters())
    for path, quantizer in done(name, technique).module.named_modules():
        if isinstance(quantizer, (PackedWeightQuantizer, WeightQuantizer)):
            weight, now = before[path.removesuffix("_quantizer")].detach(), quantizer()
            assert now.shape == weight.shape
            rows = [w.movedim(quantizer.axis, 0).flatten(1).double().numpy() for w in (weight, now)]
            size = quantizer.group_size if isinstance(quantizer, PackedWeightQuantizer) else rows[0].shape[1]
            found.append((*rows, size))
    return found


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("name", ["class token", "convolutions"])
def test_every_weight_is_rounded_as_defined(name: str, format: str) -> None:
    found = weights(name, WeightOnly(format=format, group_size=16))
    assert len(found) == (3 if name == "convolutions" else 6)
    wide = {rows.shape[1] for rows, _, size in found if size == rows.shape[1]}
    assert format in ("int4", "nf4", "power_of_two") or wide == {rows.shape[1] for rows, _, _ in found}
    for before, after, size in found:
        expected = np.stack([oracle(row, size, format) for row in before[:8]])
        # a weight half way between two values may go either way in float32
        differ = ~np.isclose(after[:8], expected, rtol=1e-5, atol=1e-7 * abs(before).max())
        assert differ.mean() < 0.002


@pytest.mark.parametrize("format", FORMATS)
def test_rounding_as_another_format_would_show(format: str) -> None:
    other = {"int4": "nf4", "nf4": "int4", "fp8_e4m3": "fp8_e5m2", "fp8_e5m2": "fp8_e4m3"}.get(format, "int4")
    before, after, size = weights("class token", WeightOnly(format=format, group_size=16))[1]
    expected = np.stack([oracle(row, size, other) for row in before[:8]])
    assert (~np.isclose(after[:8], expected, rtol=1e-5)).mean() > 0.1


@pytest.mark.parametrize(("name", "bits"), [("fp8_e4m3", 4), ("fp8_e5m2", 5)])
def test_an_activation_goes_to_the_nearest_8_bit_float_and_saturates(name: str, bits: int) -> None:
    quantizer = build({"kind": "ActivationQuantizer", "format": name})
    assert isinstance(quantizer, ActivationQuantizer)
    quantizer.scale.fill_(0.25)
    table = np.array(float8(bits))
    x = torch.cat([torch.randn(500), torch.linspace(-1, 1, 801) * 0.3 * float(table[-1]), torch.tensor([0.0, 1e-9])])
    exact = x.double().numpy()
    least = abs(exact[:, None] - table * 0.25).min(1)  # which of two is taken half way, test_formats.py says
    assert np.array_equal(abs(quantizer(x).double().numpy() - exact), least)
    assert set(quantizer(x).double().tolist()) <= set((table * 0.25).tolist())
    assert quantizer(torch.tensor([1e30, -1e30])).tolist() == [table[-1] * 0.25, -table[-1] * 0.25]
    assert structure(quantizer) == {"kind": "ActivationQuantizer", "format": name}
    coarse = affine.quantize(x, quantizer.scale * 1.5, quantizer.zero_point)
    coarse = affine.dequantize(coarse, quantizer.scale * 1.5, quantizer.zero_point)
    assert not np.array_equal(abs(coarse.double().numpy() - exact), least)  # the comparison can fail


@pytest.mark.parametrize("name", ["class token", "registers and qk-norm", "swin", "convolutions"])
def test_fp8_rounds_all_that_is_multiplied_with_the_greatest_value_at_the_formats_end(name: str) -> None:
    compressed = done(name, FP8())
    bits = bit_map(compressed.module, "f32")  # type: ignore[arg-type]
    kinds = {"linear_input", "linear_weight", "q", "k", "v", "attention_probabilities"} & set(bits)
    assert {bits[kind] for kind in kinds} == {"fp8_e4m3"}
    assert bits["residual"] == "f32"
    first = next(m for m in compressed.module.modules() if isinstance(m, ActivationQuantizer))
    seen = torch.cat(list(Smooth())).abs().max()
    assert first.scale.item() == pytest.approx(seen.item() / 448)  # the image's
    x, exact = images(), logits(original(name).module, images())
    found = [error(exact, logits(done(name, t).module, x)) for t in (FP8(), FP8(weights="e5m2", activations="e5m2"))]
    assert 0 < found[0] < found[1] < 0.5


@pytest.mark.sampled(4)
@pytest.mark.parametrize("technique", [*(WeightOnly(format=f, group_size=16) for f in FORMATS), FP8()], ids=str)
@pytest.mark.parametrize("name", ["registers and qk-norm", "convolutions"])
def test_a_rebuilt_model_takes_the_state_dict_bit_for_bit(name: str, technique: Technique) -> None:
    compressed, rebuilt = done(name, technique), original(name).copy()
    pipeline.restore_(rebuilt, copy.deepcopy(compressed.steps))
    rebuilt.module.load_state_dict(compressed.module.state_dict())
    assert torch.equal(logits(rebuilt.module, images()), logits(compressed.module, images()))
    assert rebuilt.formats == compressed.formats


@pytest.mark.sampled(5)
@pytest.mark.parametrize("technique", [*(WeightOnly(format=f, group_size=16) for f in FORMATS), FP8()], ids=str)
@pytest.mark.parametrize("name", ["registers and qk-norm", "convolutions"])
@pytest.mark.parametrize("target", ["openvino", "onnxruntime"])
def test_engines_give_the_logits_of_the_model(tmp_path, target: str, name: str, technique: Technique) -> None:
    compressed, engine = done(name, technique), engines.get(target)
    if isinstance(technique, FP8) and target == "openvino":
        with pytest.raises(EngineError, match="rounds activations to 8-bit floats, which openvino leaves out"):
            engine.lower(compressed, tmp_path)
        return
    engine.lower(compressed, tmp_path)
    x = images()
    out = torch.from_numpy(engine.open(tmp_path, batch=len(x), threads=1)(x.numpy()))
    # an activation half way between two floats may go either way; it is one of thousands
    assert error(logits(compressed.module, x), out) < (1e-2 if isinstance(technique, FP8) else 1e-5)
    assert error(logits(original(name).module, x), out) > 1e-4  # the comparison can fail


@pytest.mark.sampled(2)
@pytest.mark.parametrize(
    ("technique", "kind", "simulated"),
    [
        (WeightOnly(format="int4"), "i4", ["torch"]),
        (WeightOnly(format="nf4"), "nf4", ["torch", "onnxruntime"]),
        (WeightOnly(format="int8"), "i8", ["torch"]),
        (WeightOnly(format="fp8_e4m3"), "f32", ["torch", "onnxruntime", "openvino"]),
        (WeightOnly(format="power_of_two"), "f32", ["torch", "onnxruntime", "openvino"]),
    ],
    ids=str,
)
def test_what_openvino_keeps_compressed_is_what_it_doesnt_simulate(tmp_path, technique, kind, simulated) -> None:
    compressed = run(wide(), technique)
    engine = engines.get("openvino")
    engine.lower(compressed, tmp_path)
    session = engine.open(tmp_path, batch=1, threads=1)
    ops = session.profile(images(1).numpy(), repeats=1)
    assert Counter(op.weights for op in ops if op.kind == "FullyConnected") == {kind: 5}
    assert [
        name for name in ("torch", "onnxruntime", "openvino") if engines.get(name).simulates(compressed)
    ] == simulated
    bits = bit_map(compressed.module, "bf16")  # type: ignore[arg-type]
    assert bits["linear_weight"] == {"int4": "4", "int8": "8"}.get(technique.format, technique.format)
    assert bits["linear_input"] == "bf16"


@pytest.mark.parametrize("target", ["openvino", pytest.param("onnxruntime", marks=pytest.mark.slow)])
def test_transposes_of_rounded_activations_stay(tmp_path, target: str) -> None:
    engine = engines.get(target)
    compressed = run(original("swin"), Int8())
    engine.lower(compressed, tmp_path)
    x = images()
    out = torch.from_numpy(engine.open(tmp_path, batch=len(x), threads=1)(x.numpy()))
    assert error(logits(compressed.module, x), out) < 0.1


def test_an_nf4_file_of_openvino_has_16_values_and_no_lookup(tmp_path) -> None:
    engines.get("openvino").lower(run(wide(), WeightOnly(format="nf4")), tmp_path)
    kinds = Counter(
        (op.get_type_name(), str(op.get_element_type()) if op.get_type_name() == "Constant" else "")
        for op in ov.Core().read_model(tmp_path / "model.xml").get_ordered_ops()
    )
    assert kinds["Constant", str(ov.Type.nf4)] == 6
    assert kinds["Constant", str(ov.Type.u4)] == 0


def test_groups_are_the_largest_that_divide() -> None:
    sizes = done("class token", WeightOnly()).steps[0].record["group_sizes"]
    assert sizes == {"24": 4, "32": 2}  # 48 is no multiple of 32; 192 is
    assert done("class token", WeightOnly(group_size=0)).steps[0].record["group_sizes"] == {"48": 4, "192": 2}


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda: WeightOnly(format="nf"), "no format 'nf'; did you mean nf4"),
        (lambda: WeightOnly(group_size=-1), "group_size is -1; it can be 0"),
        (lambda: FP8(weights="e3m4"), "fp8: weights is 'e3m4'; it can be e4m3 or e5m2"),
        (lambda: FP8(activations="int8"), "fp8: activations is 'int8'; it can be e4m3 or e5m2"),
    ],
)
def test_settings_out_of_range(make, text: str) -> None:
    with pytest.raises(RecipeError, match=text):
        make()


def test_groups_that_divide_nothing_are_refused_by_the_name_of_the_layer() -> None:
    with pytest.raises(RecipeError, match=r"weight_only: stem has 27 input features, which no groups of 10 to 20"):
        run(original("convolutions"), WeightOnly(group_size=20))
    run(original("convolutions"), WeightOnly(group_size=20, format="int8"))  # one scale a row


@pytest.mark.parametrize("technique", [WeightOnly(), FP8()], ids=str)
def test_what_has_nothing_to_quantize_and_what_is_not_finite_is_refused(technique: Technique) -> None:
    with pytest.raises(UsageError, match=f"{technique.name}: tiny has no Linear"):
        run(wrap(nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten())), technique)
    broken = original("convolutions").copy()
    with torch.no_grad():
        broken.module.get_parameter("head.weight")[0, 0] = float("nan")
    with pytest.raises(NumericsError, match=f"{technique.name}: the weight of head is NaN or infinite"):
        run(broken, technique)
    with torch.no_grad():
        broken.module.get_parameter("head.weight")[0, 0] = 1.0
        broken.module.get_parameter("stem.bias")[0] = float("inf")
    if isinstance(technique, FP8):
        with pytest.raises(NumericsError, match="fp8: an input of grouped is NaN or infinite"):
            run(broken, technique)
