"""int8 on tiny models: which grids it shares and chooses, what it rounds, and what a rebuilt model needs."""

import copy
from typing import Any

import pytest
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor
from torch.fx import GraphModule

from martlet.core import pipeline
from martlet.core.model import Model
from martlet.core.recipe import Recipe
from martlet.core.technique import Context, Int8Form
from martlet.data.preprocess import Preprocess
from martlet.graph import rounding
from martlet.graph.sites import sites
from martlet.graph.trace import trace
from martlet.nn.quantizers import ActivationQuantizer
from martlet.techniques.quantize import int8 as module
from martlet.techniques.quantize.int8 import Int8, choose_grids, place

SIZE = (16, 16)


class Noise:
    num_images = 16

    def __iter__(self):
        generator = torch.Generator().manual_seed(5)
        for _ in range(2):
            yield torch.randn(8, 3, *SIZE, generator=generator)


def model(**settings: Any) -> Model:
    torch.manual_seed(0)
    sizes = {"img_size": 16, "patch_size": 4, "embed_dim": 24, "depth": 3, "num_heads": 3, "num_classes": 5}
    vit = VisionTransformer(**(sizes | settings)).eval()  # type: ignore[arg-type]
    with torch.no_grad():
        for parameter in vit.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape))
    return Model(
        module=vit,
        num_classes=5,
        name="tiny",
        origin={"source": "test", "weights": "random"},
        preprocess=Preprocess(size=SIZE, resize=None, mean=(0.5,) * 3, std=(0.5,) * 3),
    )


def compress(original: Model, technique: Int8, form: Int8Form | None = None) -> Model:
    context = Context(images=Noise(), int8=form or Int8Form())
    return pipeline.run(original, Recipe((technique,)), context)


def logits(module: torch.nn.Module) -> Tensor:
    with torch.no_grad():
        out = module(torch.randn(6, 3, *SIZE, generator=torch.Generator().manual_seed(9)))
    return out[0] if isinstance(out, (list, tuple)) else out


def error(first: Tensor, second: Tensor) -> float:
    return ((first - second).norm() / first.norm()).item()


def rounded(compressed: Model) -> list[str]:
    return [producer for producer, *_ in compressed.steps[-1].record["rounding"]["activations"]]


@pytest.mark.sampled(1)
@pytest.mark.parametrize("settings", [{}, {"class_token": False, "global_pool": "avg"}, {"reg_tokens": 2}])
def test_q_k_and_v_of_one_linear_share_its_output_grid(settings: dict[str, Any]) -> None:
    original = model(**settings)
    shared = compress(original, Int8())
    apart = compress(original, Int8(), Int8Form(hoist=False))
    exact = logits(original.module)
    linears = [name for name in rounded(shared) if name.startswith("linear")]
    assert len(linears) == 3
    assert len(rounded(apart)) == len(rounded(shared)) + 2 * 3
    difference = error(logits(shared.module), logits(apart.module))
    assert difference < error(exact, logits(apart.module)) / 2  # the same roundings, but for ties


def test_a_shared_grid_that_is_not_scaled_to_fit_shows(monkeypatch: pytest.MonkeyPatch) -> None:
    original = model()
    apart = logits(compress(original, Int8(), Int8Form(hoist=False)).module)
    monkeypatch.setattr(module.attention, "scale_channels_", lambda *arguments, **factors: None)
    wrong = logits(compress(original, Int8()).module)
    assert error(apart, wrong) > error(logits(original.module), apart)


def test_normalized_q_and_k_keep_grids_of_their_own() -> None:
    compressed = compress(model(qk_norm=True), Int8())
    assert not [name for name in rounded(compressed) if name.startswith("linear")]


@pytest.mark.sampled(3)
@pytest.mark.parametrize("settings", [{}, {"qkv_bias": False}, {"qk_norm": True}, {"reg_tokens": 2}])
@pytest.mark.parametrize("ranges", ["logits", "mse"])
def test_a_rebuilt_model_takes_the_state_dict(settings: dict[str, Any], ranges: str) -> None:
    compressed = compress(model(**settings), Int8(ranges=ranges))
    rebuilt = model(**settings)
    pipeline.restore_(rebuilt, copy.deepcopy(compressed.steps))
    rebuilt.module.load_state_dict(compressed.module.state_dict())
    assert torch.equal(logits(rebuilt.module), logits(compressed.module))


def test_the_chosen_grid_is_the_best_in_the_logits_themselves() -> None:
    graph_module = trace(model().module, SIZE).requires_grad_(False)
    found = list(sites(graph_module))
    [r] = [r for r in rounding.group(place(graph_module, found, Int8Form())) if r.producer.name == "gelu_1"]
    highs = (0.1, 1.0, 4.0, 40.0)
    grids = [module.affine_parameters(torch.tensor(-0.2), torch.tensor(h), r.grid.dtype, False) for h in highs]
    best = choose_grids(graph_module, {r: grids}, Noise(), Context(images=Noise()))[r]
    images = torch.cat(list(Noise()))

    def cost(grid: tuple[Tensor, Tensor]) -> float:
        twin = GraphModule(graph_module, copy.deepcopy(graph_module.graph))
        nodes = {node.name: node for node in twin.graph.nodes}
        own = rounding.Rounding(nodes[r.producer.name], tuple(nodes[c.name] for c in r.consumers), r.grid)
        rounding.insert_activation_(twin, own, ActivationQuantizer(*grid))
        twin.recompile()
        return float((twin(images)[0] - graph_module(images)[0]).square().sum())

    costs = [cost(grid) for grid in grids]
    assert costs[best] == min(costs)
    assert max(costs) > 4 * min(costs)


def test_only_additions_between_convolutions_are_rounded() -> None:
    class Residual(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = torch.nn.Conv2d(3, 8, 4, 4), torch.nn.Conv2d(8, 8, 1)
            self.third, self.head = torch.nn.Conv2d(8, 8, 1), torch.nn.Linear(8, 5)

        def forward(self, images: Tensor) -> Tensor:
            x = self.first(images).relu()
            x = x + self.second(x)  # read by a convolution
            x = x + self.third(x)  # read by none
            return self.head(x.mean((2, 3)))

    graph_module = trace(Residual().eval(), SIZE)
    found = list(sites(graph_module))
    with_add = place(graph_module, found, Int8Form(add=True))
    additions = {consumer for _, consumer in with_add if "add" in consumer.name}
    assert len(additions) == 1
    assert not [c for _, c in place(graph_module, found, Int8Form()) if "add" in c.name]
