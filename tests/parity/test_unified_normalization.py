"""unified_normalization's norms learn as its paper's do, step by step; and nothing is left of them in the graph."""

import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from martlet.core import pipeline, store
from martlet.core.errors import RecipeError
from martlet.core.model import Model
from martlet.core.recipe import Recipe
from martlet.core.technique import Context
from martlet.data.examples import Examples
from martlet.engine.torch import Torch
from martlet.functional.distillation import divergence
from martlet.functional.normalization import Pairs
from martlet.graph.trace import trace
from martlet.nn.unified_norm import MOMENTUM, STEADY, WINDOW, UnifiedNorm
from martlet.source import load_model
from martlet.techniques.norm.unified_normalization import UnifiedNormalization
from martlet.vit.norms import fold_, norm_sites, take_out_
from martlet.vit.view import view

TINY = {"img_size": 16, "patch_size": 8, "embed_dim": 12, "depth": 2, "num_heads": 3}
MODELS = {
    "class token": TINY,
    "no class token, no bias": TINY | {"class_token": False, "global_pool": "avg", "qkv_bias": False},
}
EPS = 1e-5
RARELY: dict[str, float] = {"epochs": 1.0, "rate": 1e-9}
OFTEN: dict[str, float] = {"epochs": 30.0, "rate": 1e-2}


class Noise:
    num_images = 12

    def __iter__(self) -> Iterator[Tensor]:
        generator = torch.Generator().manual_seed(5)
        for _ in range(2):
            yield 2 * torch.rand(6, 3, 16, 16, generator=generator) - 1


def model(name: str = "class token") -> Model:
    found = load_model("timm:vit_tiny_patch16_224", model_kwargs=MODELS[name], num_classes=5, seed=3)
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for parameter in found.module.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
    return found


def train(given: Model, **settings: Any) -> Model:
    technique = UnifiedNormalization(**{"batch": 4} | settings)
    return pipeline.run(given, Recipe((technique,)), Context(images=Noise(), seed=1))


class ByHand:
    """The layer, feature by feature, in plain numbers; from step 1, for one batch after the other."""

    def __init__(self, square: list[float], weight: list[float], bias: list[float], steady: int, keep: bool) -> None:
        features = len(square)
        self.square, self.weight, self.bias, self.steady, self.keep = square, weight, bias, steady, keep
        self.squares = [list(square) for _ in range(WINDOW)]
        self.pulls = [[0.0] * features for _ in range(WINDOW)]
        self.pull, self.step = [0.0] * features, 0

    def run(
        self, x: list[list[float]], gradient: list[list[float]]
    ) -> tuple[list[list[float]], list[list[float]], bool]:
        """What it gives, and the gradient by x; and whether the batch was left out."""
        self.step += 1
        now, n, c = self.step % WINDOW, len(x), len(self.square)
        roots = [math.sqrt(s) for row in self.squares for s in row]
        mean = sum(roots) / len(roots)
        spread = sum((r - mean) ** 2 for r in roots) / (len(roots) - 1)
        fresh = [sum(row[j] ** 2 for row in x) / n for j in range(c)]
        self.squares[now] = list(fresh)
        gm = [math.prod(row[j] for row in self.squares) ** (1 / WINDOW) for j in range(c)]
        am = [sum(row[j] for row in self.squares) / WINDOW for j in range(c)]
        outlier = any(a - g > WINDOW * spread for a, g in zip(am, gm, strict=True)) and not self.keep
        if outlier:
            self.squares[now] = list(self.square)
        used = fresh if outlier or self.step <= WINDOW else gm
        ratio = [math.sqrt((u + EPS) / (s + EPS)) for u, s in zip(used, self.square, strict=True)]
        ratio = [1.0 if outlier or self.step <= self.steady else min(max(r, 0.2), 5.0) for r in ratio]
        z = [[row[j] / math.sqrt(used[j] + EPS) for j in range(c)] for row in x]
        self.square = [MOMENTUM * s + (1 - MOMENTUM) * u for s, u in zip(self.square, used, strict=True)]
        y = [[row[j] * self.weight[j] + self.bias[j] for j in range(c)] for row in z]
        inner = [[g[j] * self.weight[j] * ratio[j] for j in range(c)] for g in gradient]
        found = [sum(g[j] * row[j] for g, row in zip(inner, z, strict=True)) / n for j in range(c)]
        self.pulls[now] = list(self.pull) if outlier else found
        mean_pull = (
            found if outlier or self.step <= WINDOW else [sum(p[j] for p in self.pulls) / WINDOW for j in range(c)]
        )
        self.pull = [MOMENTUM * a + (1 - MOMENTUM) * b for a, b in zip(self.pull, mean_pull, strict=True)]
        pull = mean_pull if outlier else self.pull
        rows = zip(inner, z, strict=True)
        by_x = [[(g[j] - pull[j] * row[j]) / math.sqrt(used[j] + EPS) for j in range(c)] for g, row in rows]
        return y, by_x, outlier


@pytest.mark.parametrize("steady", [STEADY, 2])
def test_steps_are_the_papers(steady: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("martlet.nn.unified_norm.STEADY", steady)
    torch.manual_seed(0)
    layer = UnifiedNorm(3, EPS).double()
    square, weight, bias = torch.tensor([1.0, 2.0, 0.5]), torch.tensor([0.5, 2.0, 1.0]), torch.tensor([0.1, 0.0, -1.0])
    layer.set_(square.double(), (weight / (square + EPS).sqrt()).double(), bias.double())
    values = (square.double().tolist(), layer.weight.tolist(), layer.bias.tolist())
    by_hand, careless = ByHand(*values, steady, keep=False), ByHand(*values, steady, keep=True)
    left_out, errors = [], []
    for step in range(9):
        x = torch.randn(2, 4, 3, dtype=torch.float64) * (1 + 0.3 * step) * (20 if step == 6 else 1)
        x.requires_grad_(True)
        gradient = torch.randn(2, 4, 3, dtype=torch.float64)
        y = layer.train()(x)
        y.backward(gradient)
        rows = x.detach().flatten(0, 1).tolist(), gradient.flatten(0, 1).tolist()
        expected_y, expected_x, outlier = by_hand.run(*rows)
        np.testing.assert_allclose(y.detach().flatten(0, 1).numpy(), expected_y, rtol=1e-9)
        assert x.grad is not None
        np.testing.assert_allclose(x.grad.flatten(0, 1).numpy(), expected_x, rtol=1e-7, atol=1e-12)
        left_out.append(outlier)
        errors.append(np.abs(y.detach().flatten(0, 1).numpy() - np.array(careless.run(*rows)[0])).max())
    assert left_out[6]
    assert not all(left_out)
    assert max(errors) > 1e-3  # a layer that lets outliers in gives something else, so this can fail
    np.testing.assert_allclose(layer.square.numpy(), by_hand.square, rtol=1e-9)
    x = torch.randn(5, 3, dtype=torch.float64)
    factor, shift = layer.affine()
    torch.testing.assert_close(layer.eval()(x), x * factor + shift)


def test_norms_begin_as_the_least_squares_of_layer_norms() -> None:
    x = torch.randn(50, 4, dtype=torch.float64) * torch.tensor([1.0, 2.0, 3.0, 0.1]) + 1
    y = torch.nn.functional.layer_norm(x, (4,))
    pairs = Pairs(4)
    for part in zip(x.split(20), y.split(20), strict=True):
        pairs.add_(*part)
    square, factor, shift = pairs.result()
    for j in range(4):
        rows = np.stack([x[:, j].numpy(), np.ones(50)], 1)
        expected = np.linalg.lstsq(rows, y[:, j].numpy(), rcond=None)[0]
        np.testing.assert_allclose([float(factor[j]), float(shift[j])], expected, rtol=1e-9)
    torch.testing.assert_close(square, x.square().mean(0))


@pytest.mark.parametrize("name", MODELS)
def test_linears_take_over_factors_and_shifts_exactly(name: str) -> None:
    given, generator = model(name).module.eval(), torch.Generator().manual_seed(7)
    sites = norm_sites(view(given), "unified_normalization")
    assert len(sites) == 5
    images = next(iter(Noise()))
    affine = [
        (torch.rand(12, generator=generator).double() + 0.5, torch.randn(12, generator=generator).double())
        for _ in sites
    ]
    handles = [
        site.norm.module.register_forward_hook(lambda _, args, __, f=f, s=s: args[0] * f.float() + s.float())
        for site, (f, s) in zip(sites, affine, strict=True)
    ]
    with torch.no_grad():
        expected = given(images)
    for handle in handles:
        handle.remove()
    for site, (factor, shift) in zip(sites, affine, strict=True):
        fold_(site, factor, shift)
    take_out_(view(given), sites)
    with torch.no_grad():
        torch.testing.assert_close(given(images), expected, rtol=1e-3, atol=1e-3)


def test_no_norm_is_left_training_helps_and_it_reloads(tmp_path: Any) -> None:
    given = model("no class token, no bias")

    @torch.no_grad()
    def error(done: Model) -> float:
        return sum(float(divergence(done.module(batch), given.module(batch))) for batch in Noise())

    little, much = (train(given, batch=12, augment="none", **its) for its in (RARELY, OFTEN))
    assert error(much) < 0.3 * error(little)
    graph = trace(much.module, (16, 16))
    names = {str(node.target) for node in graph.graph.nodes if node.op == "call_function"}
    assert not [name for name in names if "norm" in name or "rsqrt" in name]
    assert [n for n in trace(given.module, (16, 16)).graph.nodes if "norm" in str(n.target)]  # so this can fail
    with store.writing(tmp_path / "out") as folder:
        store.seal(folder, much, "torch", store.write_model(folder, much, Torch()))
    again = store.load(tmp_path / "out").model()
    images = next(iter(Noise()))
    assert torch.equal(again.module(images), much.module(images))
    with pytest.raises(RecipeError, match=r"^unified_normalization: blocks\.0\.norm1 is no LayerNorm but Identity"):
        train(again)


def test_norms_that_no_linear_can_take_over_are_named() -> None:
    kwargs = TINY | {"qk_norm": True}
    odd = load_model("timm:vit_tiny_patch16_224", model_kwargs=kwargs, num_classes=5, seed=3)
    with pytest.raises(RecipeError, match=r"^unified_normalization: no Linear beside blocks\.0\.attn\.q_norm can take"):
        train(odd)


def test_images_come_from_training_examples_too() -> None:
    examples = Examples.unlabelled(Noise(), model().preprocess)
    done = pipeline.run(model(), Recipe((UnifiedNormalization(batch=4, epochs=1.0),)), Context(training=examples))
    assert done.steps[0].record["steps"] == 3
