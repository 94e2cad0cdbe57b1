"""What every method for few bits owes its users, asked of all of them on tiny models with odd features."""

import json
import re

import pytest
import torch
from tiny import MODELS, Smooth, compress, error, images, logits, model, vit, wrap
from torch import nn
from torch.fx import GraphModule

from martlet import engine as engines
from martlet.core import pipeline, registry
from martlet.core.errors import NumericsError, RecipeError, UsageError
from martlet.core.model import Model
from martlet.core.recipe import Recipe, shipped
from martlet.core.technique import Context, Technique
from martlet.graph.bits import bit_map
from martlet.graph.low_bit import LowBit
from martlet.graph.sites import sites
from martlet.nn.quantizers import TableQuantizer
from martlet.techniques.quantize.mambaquant import MambaQuant
from martlet.techniques.quantize.quarot import QuaRot
from martlet.techniques.quantize.repq_vit import RepQViT
from martlet.techniques.quantize.uniform import Uniform

NAMES = tuple(name for name in registry.entries() if issubclass(registry.technique(name), LowBit))
OFTEN = {"uniform", "repq_vit", "adalog", "is_vit"}
"""Methods that between them use all that methods share; the others are asked by make test-all."""
EACH = [pytest.param(name, marks=[pytest.mark.slow] if name not in OFTEN else []) for name in NAMES]
PAIRS = [
    pytest.param(
        kind,
        name,
        marks=[] if name == "repq_vit" or (kind == "class token" and name in OFTEN) else [pytest.mark.slow],
    )
    for kind in MODELS
    for name in NAMES
]
"""Every model with every method; all models with one of them, and one with most, in every run."""


@pytest.fixture(scope="module")
def compressed():
    """Of a model and a technique, four bits, each made once; no test may change it."""
    kept: dict[tuple[str, str], Model] = {}

    def of(kind: str, name: str) -> Model:
        if (kind, name) not in kept:
            kept[kind, name] = compress(model(kind), name)
        return kept[kind, name]

    return of


def widths(text: str, branches: int) -> set[str]:
    """Of a bit map's entry, but for so many products that are in floating point on purpose."""
    found = set(text.split(", "))
    return {width.split()[0] for width in found - {f"f32 ({branches})"}}


@pytest.mark.parametrize(("kind", "name"), PAIRS)
def test_every_product_is_rounded_to_its_bits(compressed, kind: str, name: str) -> None:
    done = compressed(kind, name)
    assert isinstance(done.module, GraphModule)
    found = list(sites(done.module))
    [step] = done.steps
    branches = 2 * len(step.record.get("ranks", {}))
    assert sum(step.record["quantized"].values()) == len(found) - branches
    bits = bit_map(done.module, "f32")
    rounded = (
        "linear_weight",
        "conv_weight",
        "linear_input",
        "q",
        "k",
        "v",
        "attention_probabilities",
        "softmax_output",
    )
    assert {width for part in rounded for width in widths(bits[part], branches)} == {"4"}
    assert bits["conv_input"] == "8"  # the image
    assert bits["first_layer"] == "input 8, weight 4"
    assert bits["last_layer"] == "input 4, weight 4"
    assert bits["residual"] == "f32"
    x = images()
    assert 1e-3 < error(logits(model(kind).module, x), logits(done.module, x)) < 1.5


@pytest.mark.parametrize(("kind", "name"), PAIRS)
def test_a_rebuilt_model_takes_the_state_dict_bit_for_bit(compressed, kind: str, name: str) -> None:
    done = compressed(kind, name)
    [step] = done.steps
    record = json.loads(json.dumps(step.record))
    rebuilt = model(kind)
    step.technique.restore_(rebuilt, record)
    state = done.module.state_dict()
    assert {n: t.shape for n, t in rebuilt.module.state_dict().items()} == {n: t.shape for n, t in state.items()}
    rebuilt.module.load_state_dict(state)
    assert torch.equal(logits(rebuilt.module, images()), logits(done.module, images()))


@pytest.mark.sampled(2)
@pytest.mark.parametrize(
    ("kind", "name"),
    [
        *(pytest.param("class token", *each.values, marks=each.marks) for each in EACH),
        ("registers and qk-norm", "uniform"),
    ],
)
def test_engines_agree_with_torch(compressed, tmp_path, kind: str, name: str) -> None:
    done, x = compressed(kind, name), images()
    expected = logits(done.module, x)
    for target in ("openvino", "onnxruntime"):
        (tmp_path / target).mkdir()
        engine = engines.get(target)
        engine.lower(done, tmp_path / target)
        found = torch.from_numpy(engine.open(tmp_path / target, batch=len(x), threads=1)(x.numpy()))
        # A last bit may take a value across an edge, and others with it; that is far less than the rounding itself.
        assert error(expected, found) < 0.5 * error(expected, logits(model(kind).module, x)), target
        assert error(logits(model(kind).module, x), found) > 0.05  # the comparison can fail


@pytest.mark.parametrize("name", EACH)
@pytest.mark.parametrize("field", ["weight_bits", "activation_bits"])
@pytest.mark.parametrize("bits", [1, 9, 0, -4])
def test_impossible_bits_are_one_clear_error(name: str, field: str, bits: int) -> None:
    with pytest.raises(RecipeError, match=rf"^{name}: {field} is {bits}; it can be 2 to 8$"):
        registry.technique(name)(**{field: bits})


@pytest.mark.parametrize("name", EACH)
@pytest.mark.parametrize(("weight_bits", "activation_bits"), [(2, 3), (8, 8)])
def test_other_bits_are_as_asked(name: str, weight_bits: int, activation_bits: int) -> None:
    done = compress(model("class token"), name, weight_bits=weight_bits, activation_bits=activation_bits)
    assert isinstance(done.module, GraphModule)
    bits = bit_map(done.module, "f32")
    branches = 2 * len(done.steps[0].record.get("ranks", {}))
    assert widths(bits["linear_weight"], branches) == {str(weight_bits)}
    assert widths(bits["linear_input"], branches) == {str(activation_bits)}
    assert bool(torch.isfinite(logits(done.module, images())).all())


@pytest.mark.parametrize("name", EACH)
def test_error_falls_as_bits_rise(name: str) -> None:
    original, x = model("class token"), images(8)
    exact = logits(original.module, x)
    errors = [
        error(exact, logits(compress(original, name, weight_bits=n, activation_bits=n).module, x)) for n in (3, 5, 8)
    ]
    assert errors[0] > 1.5 * errors[1] > 1.5 * 1.5 * errors[2]
    assert errors[2] < 0.15


@pytest.mark.parametrize("name", EACH)
def test_eight_bits_need_no_simulation_where_grids_are_even(name: str) -> None:
    """What is left to simulate with 8 bits is what has a table, a grid for each head, or noise; never a weight."""
    done = compress(model("class token"), name, weight_bits=8, activation_bits=8)
    tables = [module for module in done.module.modules() if isinstance(module, TableQuantizer)]
    assert engines.get("openvino").simulates(done) == bool(tables)
    assert all(table.values is not None or table.scale.ndim for table in tables)
    if name == "uniform":
        assert not tables


@pytest.mark.parametrize("name", EACH)
def test_fewer_bits_are_simulated(compressed, name: str) -> None:
    assert all(engines.get(engine).simulates(compressed("class token", name)) for engine in ("openvino", "onnxruntime"))


@pytest.mark.parametrize("name", EACH)
def test_an_activation_that_is_not_finite_is_one_clear_error(name: str) -> None:
    original = model("class token")
    with torch.no_grad():
        original.module.get_parameter("blocks.0.norm2.weight")[3] = float("inf")
    where = r"an input of blocks\.0\.mlp\.fc1|blocks\.0\.norm2 gives a value that|a gradient of the logits"
    with pytest.raises(NumericsError, match=rf"^({name}: )?({where}) is NaN or infinite$"):
        compress(original, name)


@pytest.mark.parametrize("name", EACH)
def test_constant_activations_are_kept_exactly(name: str) -> None:
    """An MLP that is switched off gives zeros, and a softmax over one token ones."""
    original = wrap(vit(img_size=32, patch_size=32, class_token=False, global_pool="avg", depth=1))
    with torch.no_grad():
        for part in ("weight", "bias"):
            original.module.get_parameter(f"blocks.0.mlp.fc1.{part}").zero_()
    done = compress(original, name)
    assert isinstance(done.module, GraphModule)
    for site in sites(done.module):
        constant = {"blocks.0.mlp.fc2": 0.0, "blocks.0.attn.values": 1.0}.get(site.name)
        if constant is not None:
            quantizer = done.module.get_submodule(str(site.node.args[0].target))  # type: ignore[union-attr]
            assert quantizer(torch.full((1, 3, 1, 1), constant)).unique().tolist() == [constant]
    assert bool(torch.isfinite(logits(done.module, images())).all())


@pytest.mark.parametrize("name", EACH)
def test_a_model_that_multiplies_nothing_is_refused(name: str) -> None:
    nothing = wrap(nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten()))
    with pytest.raises(
        UsageError, match=rf"^{name}: tiny has no Linear, convolution or attention product to quantize$"
    ):
        compress(nothing, name)


@pytest.mark.parametrize("name", EACH)
def test_results_are_reproducible(compressed, name: str) -> None:
    first, second = compressed("class token", name), compress(model("class token"), name)
    assert first.steps[0].record == second.steps[0].record
    states = [m.module.state_dict() for m in (first, second)]
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])


@pytest.mark.parametrize("name", EACH)
def test_layer_norms_that_cannot_be_changed_are_counted(compressed, name: str) -> None:
    for kind, expected in (("class token", (2, 2)), ("no biases", (0, 2))):
        record = compressed(kind, name).steps[0].record
        if "layer_norms" in record:
            assert (record["reparameterized"], record["layer_norms"]) == expected


def test_recipes_take_their_bits_from_the_name() -> None:
    named = [name for name in shipped() if any(isinstance(t, LowBit) for t in Recipe.load(name).passes)]
    assert {name.replace("-", "_") for name in named} >= set(NAMES) - {"adalog"}
    for name in named:
        [technique] = [t for t in Recipe.load(f"{name}-w3a5").passes if isinstance(t, LowBit)]
        assert (technique.weight_bits, technique.activation_bits) == (3, 5)
        with pytest.raises(RecipeError, match=re.escape("weight_bits is 9; it can be 2 to 8")):
            Recipe.load(f"{name}-w9a4")


@pytest.mark.parametrize(
    ("technique", "said"),
    [
        (RepQViT(), "no LayerNorm is read by Linears alone"),
        (QuaRot(), "nothing was rotated"),
        (MambaQuant(), "nothing was rotated"),
    ],
)
def test_what_a_method_finds_nothing_of_is_said(technique: Technique, said: str) -> None:
    convolutions = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 5))
    context = Context(images=Smooth())
    for original, count in ((wrap(convolutions), 1), (model("class token"), 0)):
        [step] = pipeline.run(original, Recipe((technique,)), context).steps
        assert sum(said in line for line in step.record.get("left_out", [])) == count


def test_few_images_to_choose_grids_on_are_said() -> None:
    for few, said in ((Smooth(), ["32 calibration images are usual, and there are 12"]), (Smooth(batches=(32,)), [])):
        [step] = pipeline.run(model("class token"), Recipe((Uniform(),)), Context(images=few)).steps
        assert step.record.get("left_out", []) == said
