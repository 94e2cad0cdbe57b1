"""The gate against plain Python in float64: where images should leave, what it learns, and what it lets go.

That a fault would show is asked beside each.

Yao et al., ECO-M2F, 2024, arXiv 2404.15244, and facts of its code.
"""

import math

import numpy as np
import pytest
import torch

from martlet.core import pipeline, store
from martlet.core.errors import RecipeError
from martlet.core.recipe import Recipe
from martlet.core.technique import Context
from martlet.engine.torch import Torch
from martlet.functional import exits as solver
from martlet.graph.stages import run, stages
from martlet.nn.exit_heads import DepthGate
from martlet.source import load_model
from martlet.vit.exits import run_of

TINY = {"img_size": 16, "patch_size": 4, "embed_dim": 24, "depth": 3, "num_heads": 3}


class Noise:
    """Calibration images, brighter ones of which are of class 1."""

    num_images = 64

    def __init__(self, labelled: bool = False) -> None:
        generator = torch.Generator().manual_seed(5)
        self.images = torch.randn(self.num_images, 3, 16, 16, generator=generator)
        self.labels = (self.images.mean((1, 2, 3)) > 0).long().numpy() if labelled else None

    def __iter__(self):
        yield from self.images.split(16)


def recipe(text: str) -> Recipe:
    return Recipe.from_yaml(f"martlet: 1\npasses: [{text}]")


def apply(text: str, model=None, images=None):
    source = model or load_model("timm:vit_tiny_patch16_224", model_kwargs=TINY, num_classes=10, seed=3)
    return pipeline.run(source, recipe(text), Context(images=images or Noise(), seed=1))


@pytest.fixture(scope="module")
def exits():
    """With exits, not gated yet."""
    return apply("linear_exits: {epochs: 2, batch: 32}")


@pytest.fixture(scope="module")
def gated(exits):
    return apply("eco_m2f", exits)


def oracle_depth(quality, costs, beta) -> int:
    best = 0
    for k in range(len(costs)):
        if quality[k] - beta * costs[k] > quality[best] - beta * costs[best]:
            best = k
    return best


@pytest.mark.parametrize("beta", [0.0, 0.1, 0.7, 100.0])
def test_where_images_should_leave(beta):
    quality, costs = np.random.default_rng(0).uniform(size=(3, 40)), [0.3, 0.6, 1.0]
    wanted = [oracle_depth(column, costs, beta) for column in quality.T]
    assert solver.depths(quality, np.array(costs), beta).tolist() == wanted
    assert len({*wanted}) == (1 if beta == 100 else 3)


def test_the_regression_is_at_its_optimum():
    """Its loss, row by row, rises wherever a weight is moved; and a weight that isn't the optimum's would show."""
    rng = np.random.default_rng(1)
    features, labels = 3 + rng.normal(size=(40, 3)) * [1, 5, 0.2], rng.integers(0, 3, 40)
    weights, biases = solver.regression(features, labels, 3)
    mean, std = features.mean(0), features.std(0)

    def loss(w, b) -> float:
        total = sum((w[k][c] * std[c]) ** 2 for k in range(3) for c in range(3)) / 2
        for row, label in zip(features.tolist(), labels.tolist(), strict=True):
            scores = [sum(a * x for a, x in zip(w[k], row, strict=True)) + b[k] for k in range(3)]
            total += math.log(sum(math.exp(s - max(scores)) for s in scores)) + max(scores) - scores[label]
        return total

    least = loss(weights, biases)
    for k in range(3):
        for c in range(3):
            for step in (-0.05, 0.05):
                moved = weights.copy()
                moved[k, c] += step / std[c]
                assert loss(moved, biases - (moved - weights) @ mean) > least


def test_a_feature_that_never_changes_does_no_harm():
    features = np.hstack([np.ones((6, 1)), np.arange(6.0)[:, None]])
    weights, biases = solver.regression(features, np.array([0, 0, 0, 1, 1, 1]), 2)
    assert ((features @ weights.T + biases).argmax(1) == [0, 0, 0, 1, 1, 1]).all()


def test_how_sure_the_gate_is():
    gate = DepthGate(4, 3).double()
    x = torch.randn(20, 5, 4).double()
    found = gate(x).tolist()
    for i in range(20):
        pooled = [sum(x[i, n, c].item() for n in range(5)) / 5 for c in range(4)]
        scores = [
            math.exp(sum(w * v for w, v in zip(row, pooled, strict=True)) + b)
            for row, b in zip(gate.fc.weight.tolist(), gate.fc.bias.tolist(), strict=True)
        ]
        p = [s / sum(scores) for s in scores]
        wanted = [(1 + p[0] - max(p[1:])) / 2, (1 + max(p[:2]) - p[2]) / 2]
        assert found[i] == pytest.approx(wanted)
        leaves_at = next((k for k in range(2) if found[i][k] >= 0.5), 2)
        assert leaves_at == p.index(max(p))
        assert next((k for k in range(2) if found[i][k] < 0.5), 2) != leaves_at or leaves_at == 2


@torch.no_grad()
def chosen(model, images):
    """Where the gate says images should leave, by its own Linear."""
    answers, _ = run_of(model.module).answers(images)
    return model.module.gate.fc(answers[0].tokens.mean(1)).argmax(1)


def test_images_leave_where_the_gate_says_and_at_full_depth_get_the_hosts_logits(exits, gated, tmp_path):
    images, model = torch.cat([*Noise()])[:8], pipeline.traced(gated)
    wanted = chosen(gated, images)
    assert len(wanted.unique()) > 1
    with torch.inference_mode():
        found = [next(iter(given.values())) for given in run(stages(model.module), images)]
        expected = torch.stack(found)[wanted, torch.arange(8)]
        assert torch.allclose(gated.module(images), expected, atol=1e-5)
    with store.writing(tmp_path / "out") as folder:
        store.seal(folder, model, "torch", store.write_model(folder, model, Torch()))
    session = store.load(tmp_path / "out").open(batch=8)
    assert np.allclose(session(images.numpy()), expected.numpy(), atol=1e-5)
    assert session.exits.tolist() == wanted.tolist()
    session.leaving = False
    with torch.inference_mode():
        assert np.allclose(session(images.numpy()), exits.module(images).numpy(), atol=1e-5)


@pytest.mark.slow
def test_another_balance_trains_the_gate_alone_and_thresholds_for_a_budget_can_follow(gated):
    before = {name: value.clone() for name, value in gated.module.state_dict().items()}
    again = apply("eco_m2f: {beta: 10.0}", gated)
    after = again.module.state_dict()
    assert before.keys() == after.keys()
    assert {name for name in before if not torch.equal(before[name], after[name])} == {"gate.fc.weight", "gate.fc.bias"}
    record = again.steps[-1].record
    assert record["best_pct"] == record["share_pct"] == [100.0, 0.0, 0.0]  # what costs so much is used by none
    mean = 0.8 * record["gmacs"][-1]
    assert apply(f"deer: {{mean_gmacs: {mean}}}", gated).steps[-1].record["mean"] <= mean


def test_labels_say_what_is_right(exits):
    """An image is best left where its own class is likeliest."""
    images = Noise(labelled=True)
    record = apply("eco_m2f: {beta: 0.0}", exits, images).steps[-1].record
    with torch.no_grad():
        answers, last = run_of(exits.module).answers(images.images)
        logits = torch.stack([*(each.logits for each in answers), last]).softmax(2)
    best = [max(range(3), key=lambda k, i=i: logits[k, i, images.labels[i]].item()) for i in range(64)]
    assert record["labels"]
    assert record["best_pct"] == pytest.approx([100 * best.count(k) / 64 for k in range(3)], abs=1e-3)
    assert np.abs(np.array(record["best_pct"]) - record["share_pct"]).sum() < 40  # the gate finds most of them


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("eco_m2f", r"timm:\S+ has no exits to choose among; put linear_exits, lgvit or mue before it"),
        ("eco_m2f: {beta: -1.0}", "beta is -1.0; it has to be a number, and at least 0"),
    ],
)
def test_what_cannot_be_is_refused(text, message):
    with pytest.raises(RecipeError, match=message):
        apply(text)


def test_too_few_images_for_the_places(exits):
    images = Noise()
    images.num_images = 47
    with pytest.raises(
        RecipeError, match="47 calibration images are too few for 3 places to leave at; give 48 or more"
    ):
        apply("eco_m2f", exits, images)
