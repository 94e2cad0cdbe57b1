"""svd, afm and comcat are their papers': slow float64 versions, by NumPy alone, and faults that they find."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from martlet.core import pipeline
from martlet.core.errors import RecipeError
from martlet.core.model import Model
from martlet.core.recipe import Recipe
from martlet.core.technique import Context, Technique
from martlet.data.calibration import First
from martlet.functional.structure.low_rank import Factors, of_heads, of_outputs, of_weight
from martlet.nn.low_rank import LowRankLinear
from martlet.source import load_model
from martlet.techniques.low_rank import afm
from martlet.techniques.low_rank.afm import AFM
from martlet.techniques.low_rank.comcat import COMCAT
from martlet.techniques.low_rank.svd import SVD
from martlet.vit.structure import read_attention
from martlet.vit.view import view

TINY = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 3, "num_heads": 3}
MODELS = {
    "class token": TINY,
    "no class token": TINY | {"class_token": False, "global_pool": "avg"},
    "registers, no bias": TINY | {"reg_tokens": 2, "qkv_bias": False},
}


class Smooth:
    """Images in which neighbouring pixels are alike, so that outputs have directions in which little happens."""

    num_images = 12

    def __iter__(self):
        generator = torch.Generator().manual_seed(5)
        for _ in range(3):
            yield nn.functional.interpolate(torch.randn(4, 3, 6, 6, generator=generator), 32, mode="bicubic")


def build(kwargs: dict[str, object]) -> Model:
    model = load_model("timm:vit_tiny_patch16_224", model_kwargs=kwargs, num_classes=10, seed=3)
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for parameter in model.module.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model


def apply(model: Model, technique: Technique) -> Model:
    return pipeline.run(model, Recipe((technique,)), Context(images=Smooth()))


def logits(model: Model) -> Tensor:
    with torch.no_grad():
        return torch.cat([model.module(x) for x in Smooth()])


def nearest(matrix: np.ndarray, rank: int) -> np.ndarray:
    """Eckart and Young: the sum of the first terms s u vᵀ."""
    u, s, vt = np.linalg.svd(matrix)
    return sum(s[i] * np.outer(u[:, i], vt[i]) for i in range(rank))  # type: ignore[return-value]


@pytest.mark.parametrize(("outputs", "inputs"), [(7, 5), (4, 9)])
def test_a_weight_of_each_rank_is_the_nearest(outputs: int, inputs: int) -> None:
    weight = torch.randn(outputs, inputs, dtype=torch.float64)
    factors = of_weight(weight, None)
    for rank in range(1, min(outputs, inputs) + 1):
        thin = factors.at(rank)
        expected = nearest(weight.numpy(), rank)
        np.testing.assert_allclose((thin.up @ thin.down).numpy(), expected, atol=1e-12)
        lost = ((weight.numpy() - expected) ** 2).sum() / (weight.numpy() ** 2).sum()
        assert factors.lost(rank) == pytest.approx(lost, abs=1e-12)
    wrong = Factors(factors.up.flip(1), factors.down.flip(0), None, factors.spectrum).at(2)  # the least come first
    assert np.abs((wrong.up @ wrong.down).numpy() - nearest(weight.numpy(), 2)).max() > 0.1


def principal(y: np.ndarray, rank: int) -> np.ndarray:
    """Outputs (S, O) moved onto their first principal components around their mean, one row after the other."""
    mean = y.mean(0)
    covariance = sum(np.outer(row - mean, row - mean) for row in y) / len(y)
    values, vectors = np.linalg.eigh(covariance)
    kept = [vectors[:, i] for i in np.argsort(-values)[:rank]]
    return np.array([mean + sum(v * (v @ (row - mean)) for v in kept) for row in y])


@pytest.mark.parametrize("bias", [True, False])
def test_outputs_of_each_rank_are_the_principal_components(bias: bool) -> None:
    x = torch.randn(40, 6, dtype=torch.float64) @ torch.randn(6, 6, dtype=torch.float64) + 2
    weight = torch.randn(5, 6, dtype=torch.float64)
    its = torch.randn(5, dtype=torch.float64) if bias else None
    y = nn.functional.linear(x, weight, its)
    factors = of_outputs(weight, its, y.mean(0), torch.cov(y.T, correction=0))
    for rank in range(1, 6):
        thin = factors.at(rank)
        np.testing.assert_allclose(
            nn.functional.linear(x @ thin.down.T, thin.up, thin.bias).numpy(), principal(y.numpy(), rank), atol=1e-9
        )
    around_zero = Factors(factors.up, factors.down, its, factors.spectrum).at(2)  # the mean isn't given back
    found = nn.functional.linear(x @ around_zero.down.T, around_zero.up, around_zero.bias).numpy()
    assert np.abs(found - principal(y.numpy(), 2)).max() > 0.1


@pytest.mark.parametrize("name", MODELS)
def test_scores_and_values_of_each_head_are_the_nearest_products(name: str) -> None:
    weights = read_attention(view(build(MODELS[name]).module).blocks[1].attention)
    found = of_heads(weights).at(3, 2)
    x = np.random.default_rng(0).standard_normal((5, 48))
    for h in range(3):
        q, k, v = (getattr(weights, name)[h].numpy() for name in ("q", "k", "v"))
        query = np.concatenate([q, weights.q_bias[h].numpy()[:, None]], 1)  # (D, C + 1), a token ending in 1
        scores = np.concatenate([x, np.ones((5, 1))], 1) @ nearest(query.T @ k, 3) @ x.T
        mine = (x @ found.q[h].numpy().T + found.q_bias[h].numpy()) @ (x @ found.k[h].numpy().T).T
        np.testing.assert_allclose(mine, scores, atol=1e-9)
        product = nearest(weights.proj[:, h].numpy() @ v, 2)
        np.testing.assert_allclose(found.proj[:, h].numpy() @ found.v[h].numpy(), product, atol=1e-9)
    apart = nearest(weights.q[0].numpy(), 3).T @ nearest(weights.k[0].numpy(), 3)  # each matrix by itself
    together = nearest(weights.q[0].numpy().T @ weights.k[0].numpy(), 3)
    whole = weights.q[0].numpy().T @ weights.k[0].numpy()
    assert ((whole - together) ** 2).sum() < ((whole - apart) ** 2).sum()


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("technique", [SVD(ratio=0.0), AFM(ratio=0.0), COMCAT(ratio=0.0)], ids=lambda t: t.name)
def test_nothing_removed_leaves_the_logits(name: str, technique: Technique) -> None:
    model = build(MODELS[name])
    exact = logits(model)
    torch.testing.assert_close(logits(apply(model, technique)), exact, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", MODELS)
def test_the_more_goes_the_more_is_lost_and_images_help(name: str) -> None:
    model = build(MODELS[name])
    exact = logits(model)

    def error(technique: Technique) -> float:
        return float((logits(apply(model, technique)) - exact).norm() / exact.norm())

    little, much = (error(AFM(ratio=ratio, multiple=2)) for ratio in (0.2, 0.4))
    assert 0 < little < much < error(SVD(ratio=0.4, multiple=2))


def test_what_was_asked_goes_and_what_would_cost_more_stays() -> None:
    model = build(TINY)
    linears = sum(m.weight.numel() for m in model.module.modules() if isinstance(m, nn.Linear))
    done = apply(model, SVD(ratio=0.3, count="params", multiple=1))
    thin = [m for m in done.module.modules() if isinstance(m, LowRankLinear)]
    left = sum(m.weight.numel() for m in done.module.modules() if isinstance(m, nn.Linear))
    assert thin
    assert left <= 0.7 * linears
    assert all(m.rank * (m.in_features + m.out_features) < m.in_features * m.out_features for m in thin)


def test_a_linear_that_gave_few_outputs_stays_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of six class tokens, five directions hold all there is, and the other logits would be constant."""
    model, technique = build(TINY), AFM(ratio=0.3, multiple=2, count="params")
    images, others = First(Smooth(), 6), list(First(Smooth(), 6, 6))

    def lost(factorized: Model) -> float:
        with torch.no_grad():
            exact, found = (torch.cat([m.module(x) for x in others]) for m in (model, factorized))
        return float((found - exact).norm() / exact.norm())

    done = pipeline.run(model, Recipe((technique,)), Context(images=images))
    assert done.steps[0].record["ranks"]
    assert "head" in done.steps[0].record["left_whole"]
    monkeypatch.setattr(afm, "SEEN", 0)
    blind = pipeline.run(model, Recipe((technique,)), Context(images=images))
    assert blind.steps[0].record["ranks"]["head"] == 6
    assert lost(done) < lost(blind)
    monkeypatch.undo()
    with pytest.raises(RecipeError, match=r"^afm: 2 images are too few for the principal components"):
        pipeline.run(model, Recipe((technique,)), Context(images=First(Smooth(), 2)))


@pytest.mark.parametrize("technique", [SVD(ratio=0.99), AFM(ratio=0.99), COMCAT(ratio=0.99)], ids=lambda t: t.name)
def test_a_ratio_that_empties_layers_is_refused(technique: Technique) -> None:
    with pytest.raises(RecipeError, match=rf"^{technique.name}: ratio 0.99 can't be reached in timm:vit_tiny"):
        apply(build(TINY), technique)


def test_blocks_whose_tokens_are_reduced_after_it_multiply_by_both_factors() -> None:
    """And never by their product, which would be computed anew in every call, and which int8 can't round."""
    from martlet.graph.sites import sites

    thin = apply(build(TINY), SVD(ratio=0.3, multiple=4, allocation="same"))
    found = pipeline.traced(pipeline.run(thin, Recipe.load("tps"), Context()))
    every = list(sites(found.module))  # type: ignore[arg-type]
    assert {"blocks.1.attn.qkv.down", "blocks.1.attn.qkv.up", "blocks.1.attn.proj.down"} <= {s.name for s in every}
    assert all(s.node.args[s.weight].op == "get_attr" for s in every if s.weight is not None)  # type: ignore[union-attr]
