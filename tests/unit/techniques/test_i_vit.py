"""i_vit: the graph is walked from the quantized image to the logits, and what it computes is close to the model."""

import copy
import functools
from pathlib import Path
from typing import Any

import pytest
import torch
from timm.models.vision_transformer import VisionTransformer
from tiny import Smooth, wrap
from torch import Tensor, nn
from torch.fx import Node

from martlet.core import pipeline, store
from martlet.core.errors import EngineError, UsageError
from martlet.core.model import Model
from martlet.core.recipe import Recipe
from martlet.core.technique import Context, silent
from martlet.data import open_images
from martlet.data.batches import batches
from martlet.data.calibration import Calibration
from martlet.engine.openvino import OpenVINO
from martlet.engine.torch import Torch
from martlet.functional.quantize.integer import SIGMOID_SLOPE, shift_gelu
from martlet.graph.bits import bit_map
from martlet.graph.integer import Request
from martlet.graph.observe import observe_calls
from martlet.graph.trace import trace
from martlet.measure import layers, macs, size
from martlet.nn.integer import IntegerLayerNorm, ShiftGELU, Shiftmax
from martlet.source import load_model
from martlet.techniques.quantize import i_vit as module
from martlet.techniques.quantize.i_vit import IViT

SIZE = (16, 16)
MODELS: dict[str, dict[str, Any]] = {
    "class token": {},
    "no class token": {"class_token": False, "global_pool": "avg", "depth": 2},
    "registers and qk-norm": {"reg_tokens": 2, "qk_norm": True},
    "layer scale, overlapping patches": {"init_values": 0.3},
}
IN, OUT = torch.ops.martlet.quantize.default, torch.ops.martlet.dequantize.default


SMOOTH = functools.partial(Smooth, batches=(8, 8), size=SIZE, coarse=5, noise=0.1)


def model(kind: str = "class token", seed: int = 0, **settings: Any) -> Model:
    torch.manual_seed(seed)
    sizes = {"img_size": 16, "patch_size": 4, "embed_dim": 48, "depth": 1, "num_heads": 3, "num_classes": 5}
    vit = VisionTransformer(**(sizes | MODELS[kind] | settings))  # type: ignore[arg-type]
    if "overlapping" in kind:
        vit.patch_embed.proj = nn.Conv2d(3, 48, 6, 4, 1)  # pyright: ignore[reportAttributeAccessIssue]
    with torch.no_grad():
        for parameter in vit.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape))
    return wrap(vit, SIZE)


def compress(original: Model) -> Model:
    return pipeline.run(original, Recipe((IViT(),)), Context(images=SMOOTH()))


def logits(module: nn.Module, n: int = 8, seed: int = 9) -> Tensor:
    with torch.no_grad():
        return module(next(iter(SMOOTH(seed)))[:n])


def error(reference: Tensor, other: Tensor) -> float:
    return ((reference - other).norm() / reference.norm()).item()


def floating_operations(module: nn.Module, size: tuple[int, int] = SIZE) -> list[str]:
    """Every operation between what quantizes the image and what gives the logits their scale that touches a float.

    Goes through the exported graph, in which the layers' own arithmetic stands as operations of PyTorch.

    Raises:
        AssertionError: the image goes somewhere else than into the way in, the logits come from elsewhere than the way
            out, or there is nothing in between.
    """
    batch = {0: torch.export.Dim("batch", min=1, max=64)}
    program = torch.export.export(module, (torch.zeros(2, 3, *size),), dynamic_shapes=(batch,))
    nodes = list(program.graph.nodes)
    image = next(node for node in nodes if node.op == "placeholder" and node.meta["val"].shape[1:] == (3, *size))
    ways_in = [user for user in image.users if user.target is not torch.ops.aten.sym_size.int]
    way_in, way_out = ways_in[0], nodes[-1].all_input_nodes[0]
    assert [way.target for way in ways_in] == [IN]
    assert way_out.target is OUT
    on_path, work = set[Node](), [way_out.args[0]]
    while work:
        node = work.pop()
        if isinstance(node, Node) and node not in on_path and node is not way_in:
            on_path.add(node)
            work += node.all_input_nodes
    assert any(way_in in node.all_input_nodes for node in on_path)
    found = []
    for node in on_path - {image}:
        values = node.meta["val"] if isinstance(node.meta["val"], (tuple, list)) else [node.meta["val"]]
        if any(isinstance(value, Tensor) and value.is_floating_point() for value in values):
            found.append(str(node.target))
        assert not any(isinstance(argument, float) for argument in node.args)
    return found


@pytest.fixture(scope="module", params=MODELS)
def pair(request: pytest.FixtureRequest) -> tuple[Model, Model]:
    original = model(request.param)
    return original, compress(original)


@pytest.fixture(scope="module")
def tiny() -> tuple[Model, Model]:
    original = model()
    return original, compress(original)


def test_no_operation_between_the_image_and_the_logits_is_in_floating_point(pair: tuple[Model, Model]) -> None:
    assert floating_operations(pair[1].module) == []


@pytest.mark.parametrize("layer", [Shiftmax, ShiftGELU, IntegerLayerNorm])
def test_the_walk_finds_a_floating_point_operation(
    layer: type[nn.Module], tiny: tuple[Model, Model], monkeypatch: pytest.MonkeyPatch
) -> None:
    compressed = tiny[1]
    exact = layer.forward
    monkeypatch.setattr(layer, "forward", lambda self, codes: exact(self, codes.float().round().to(codes.dtype)))
    assert set(floating_operations(compressed.module)) == {"aten.to.dtype", "aten.round.default"}


def test_the_walk_finds_a_way_around_the_quantizer(tiny: tuple[Model, Model]) -> None:
    with pytest.raises(AssertionError):
        floating_operations(Around(tiny[1].module))


class Around(nn.Module):
    """Lets the image itself take part in the logits."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, images: Tensor) -> Tensor:
        return self.module(images) + images.mean()


def test_logits_are_close(pair: tuple[Model, Model]) -> None:
    original, compressed = pair
    assert error(logits(original.module), logits(compressed.module)) < 0.1


def test_closeness_can_fail(tiny: tuple[Model, Model], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("martlet.nn.integer.shiftmax", lambda codes, one, bits: codes.abs() % 2**15)
    original, compressed = tiny
    assert error(logits(original.module), logits(compressed.module)) > 0.1


def test_what_gelu_lacks_is_its_mean_error_in_each_channel() -> None:
    graph_module = trace(model().module, SIZE)
    [gelu] = [node for node in graph_module.graph.nodes if node.target is torch.ops.aten.gelu.default]
    scale, seen = 2.0**-11 / SIGMOID_SLOPE, []
    observe_calls(graph_module, SMOOTH(), {gelu: lambda value, x: seen.append(x.flatten(0, -2))}, silent, "")
    x = torch.cat(seen)
    codes = shift_gelu((x / scale).round().long(), 2**11, 16)
    expected = (nn.functional.gelu(x.double()) - codes.double() * scale / 2**15).mean(0)
    request = Request((gelu.args[0],), 16, 1 / SIGMOID_SLOPE)
    found = module.gelu_lacks(graph_module, {request: scale}, SMOOTH(), Context())[gelu]
    assert torch.allclose(found, expected, atol=1e-6)
    assert float(expected.abs().max()) > 1e-4


def test_logits_of_an_image_do_not_depend_on_its_batch(pair: tuple[Model, Model]) -> None:
    together = logits(pair[1].module, 3)
    images = next(iter(SMOOTH(9)))[:3]
    with torch.no_grad():
        assert torch.equal(together, torch.cat([pair[1].module(image[None]) for image in images]))


def test_a_rebuilt_model_takes_the_state_dict_bit_for_bit(pair: tuple[Model, Model]) -> None:
    original, compressed = pair
    rebuilt = original.copy()
    with torch.no_grad():
        for parameter in rebuilt.module.parameters():
            parameter.copy_(torch.randn(parameter.shape))
    pipeline.restore_(rebuilt, copy.deepcopy(compressed.steps))
    saved, there = compressed.module.state_dict(), rebuilt.module.state_dict()
    assert {n: (t.shape, t.dtype) for n, t in there.items()} == {n: (t.shape, t.dtype) for n, t in saved.items()}
    rebuilt.module.load_state_dict(saved)
    assert torch.equal(logits(rebuilt.module), logits(compressed.module))


def test_it_is_all_integers_and_says_that_it_is_simulated(pair: tuple[Model, Model]) -> None:
    original, compressed = pair
    floats = {name for name, t in compressed.module.state_dict().items() if t.is_floating_point()}
    assert all(name.endswith("scale") for name in floats)
    assert compressed.simulated
    assert Torch().simulates(compressed)
    assert macs.macs(compressed) == macs.macs(original)
    assert size.weight_bytes(compressed.module) < size.weight_bytes(original.module)


def test_the_bit_map_tells_every_kind_of_tensor(tiny: tuple[Model, Model]) -> None:
    assert bit_map(tiny[1].module, "f32") == {  # type: ignore[arg-type]
        "linear_input": "8",
        "linear_weight": "8",
        "q": "8",
        "k": "8",
        "attention_probabilities": "16",
        "v": "8",
        "first_layer": "input 8, weight 8",
        "last_layer": "input 8, weight 8",
        "layer_norm_output": "8",
        "softmax_output": "16",
        "gelu_output": "8",
        "residual": "16",
    }


def test_layers_are_compared_by_name(tiny: tuple[Model, Model]) -> None:
    found = {layer["name"]: layer["sqnr_db"] for layer in layers.layer_errors(*tiny, next(iter(SMOOTH())))}
    assert {"blocks.0.attn.qkv", "blocks.0.attn.scores", "blocks.0.mlp.fc2", "head"} <= found.keys()
    assert min(found.values()) > 15


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"act_layer": nn.SiLU}, r"silu \(silu"),
        ({"norm_layer": nn.BatchNorm1d}, "batch_norm"),
        ({"act_layer": nn.Tanh}, r"tanh \(tanh"),
    ],
)
def test_an_operation_without_an_integer_form_is_named(settings: dict[str, Any], named: str) -> None:
    original = model(**({"act_layer": settings["act_layer"]} if "act_layer" in settings else {}))
    if "norm_layer" in settings:
        original.module.norm = Transposed()  # type: ignore[assignment]
    before = {name: tensor.clone() for name, tensor in original.module.state_dict().items()}
    with pytest.raises(UsageError, match=f"i_vit: tiny has .*{named}.*which has no integer form here"):
        compress(original)
    assert all(torch.equal(before[name], tensor) for name, tensor in original.module.state_dict().items())


class Transposed(nn.Module):
    """A batch norm over channels that nothing before takes in."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(48)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x.mT).mT


def test_engines_without_the_operations_say_which_has_them(tmp_path: Any, tiny: tuple[Model, Model]) -> None:
    with pytest.raises(EngineError, match=r"tiny computes with integers alone.*--engine torch"):
        store.write_model(tmp_path, tiny[1], OpenVINO())


@pytest.mark.slow
def test_real_weights_lose_less_than_two_points(assets: Path) -> None:
    """ViT-Ti on 500 images, of which 406 are right in floating point; 64 others choose the scales."""
    name = "vit_tiny_patch16_224"
    original = load_model(f"timm:{name}", weights=assets / f"weights/{name}.in1k.safetensors")
    images = Calibration(open_images(assets / "data/imagenet1k-val-227px"), original.preprocess, n=64)
    compressed = pipeline.run(original, Recipe.load("i-vit"), Context(images=images))
    assert floating_operations(compressed.module, original.preprocess.size) == []
    right = 0
    with torch.inference_mode():
        for array, labels, _ in batches(open_images(assets / "data/imagenet1k-sample"), original.preprocess, 10):
            right += int((compressed.module(torch.from_numpy(array)).argmax(1) == torch.tensor(labels)).sum())
    assert right >= 406 - 10
