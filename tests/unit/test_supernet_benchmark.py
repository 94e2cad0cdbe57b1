"""benchmarks/supernet.py: shared weights are the cut networks' own, bytes are counted, and turns are fair."""

import sys
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import optuna
import pytest
import torch

from martlet.core.model import Model
from martlet.functional import pareto
from martlet.source import load_model

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
elastic = pytest.importorskip("setups.elastic")
supernet = pytest.importorskip("supernet")

CHOICE = {"depth": 3, **{f"heads{i}": n for i, n in enumerate((2, 4, 3, 3))}} | {
    f"hidden{i}": n for i, n in enumerate((64, 256, 128, 64))
}


@pytest.fixture(scope="module")
def model() -> Model:
    kwargs = {"img_size": 16, "patch_size": 8, "embed_dim": 32, "depth": 4, "num_heads": 4, "mlp_ratio": 8}
    return load_model("timm:vit_tiny_patch16_224", model_kwargs=kwargs, num_classes=10, seed=2)


@pytest.fixture(scope="module")
def images() -> torch.Tensor:
    return torch.randn(5, 3, 16, 16, generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def test_what_is_masked_in_training_is_what_is_cut(model: Model, images: torch.Tensor) -> None:
    ordered = elastic.ordered_(model.copy())
    torch.testing.assert_close(ordered.module(images), model.module(images), atol=1e-5, rtol=1e-4)
    now = CHOICE
    handles = list(elastic._masked(ordered.module, lambda: now))
    masked = ordered.module(images)
    now = elastic.WHOLE
    whole = ordered.module(images)
    for handle in handles:
        handle.remove()
    torch.testing.assert_close(elastic.subnet(ordered, CHOICE).module(images), masked, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(whole, model.module(images), atol=1e-5, rtol=1e-4)
    assert not torch.allclose(masked, whole, atol=1e-3)
    scores = elastic.unit_sums(elastic.each(torch.square, elastic.read_mlp(elastic.view(ordered.module).blocks[0].mlp)))
    assert bool((scores[:-1] >= scores[1:]).all())


def test_a_step_of_the_sandwich_is_three_losses_by_hand(model: Model, images: torch.Tensor) -> None:
    objective = elastic.Sandwich(0.1)
    labels, numbers = torch.arange(5), np.arange(5)
    batch = elastic.Batch(images=images, labels=labels, indices=numbers, seeds=numbers, step=7, steps=9)
    student = model.copy().module
    objective.prepare_(student)
    loss = float(objective.loss(student, batch).detach())
    objective.finish_(student)
    drawn = elastic.drawn_sizes(np.random.default_rng(7))
    with torch.no_grad():
        logits = model.module(images)
        by_hand = torch.nn.functional.cross_entropy(logits, labels, label_smoothing=0.1)
        for choice in (elastic.SMALLEST, drawn):
            p, q = logits.softmax(1), elastic.subnet(model, choice).module(images).log_softmax(1)
            by_hand = by_hand + (p * (p.log() - q)).sum(1).mean()
        torch.testing.assert_close(student(images), logits)  # left as it was
    assert loss == pytest.approx(float(by_hand) / 3, rel=1e-4)


def bench(model: Model, images: torch.Tensor) -> Any:
    labels = model.module(images).argmax(1)
    valid = elastic.Examples(torch.zeros(5, 3, 16, 16, dtype=torch.uint8), labels, model.preprocess, "none")
    return supernet.Bench(model, valid, images, valid)


def test_bytes_are_counted_by_hand_and_bits_change_what_is_computed(model: Model, images: torch.Tensor) -> None:
    its = bench(model, images)
    choice = elastic.SMALLEST | {f"{name}{i}": 4 if i == 1 else 8 for name in supernet.LINEARS for i in range(3)}
    rounded = its.rounded(choice)
    block = {"qkv": (48, 32), "proj": (32, 16), "fc1": (64, 32), "fc2": (32, 64)}
    weights = sum(o * i for o, i in block.values())
    rows = 3 * sum(o for o, _ in block.values()) + 32 + 10
    biases = 3 * (48 + 32 + 64 + 32 + 4 * 32) + 32 + 10 + 2 * 32 + 32 + 5 * 32  # norms, class token and positions too
    by_hand = 2 * weights + weights / 2 + 3 * 8 * 8 * 32 + 10 * 32 + 4 * (rows + biases)
    assert its.weight_bytes(rounded, choice) == by_hand
    with torch.no_grad():
        exact = elastic.subnet(model, choice).module(images)
        error = float((rounded.module(images) - exact).norm() / exact.norm())
        eight = its.rounded(elastic.SMALLEST)
        less = float((eight.module(images) - exact).norm() / exact.norm())
    assert 0 < less < 0.05 < error < 1


def test_both_ways_get_as_many_evaluations(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[dict[str, int]] = []

    def evaluate(choice: dict[str, int]) -> tuple[float, float]:
        asked.append(choice)
        size = sum(v for k, v in choice.items() if k.startswith(("heads", "hidden")))
        bits = [v for k, v in choice.items() if k.startswith(supernet.LINEARS)] or [8]
        return 1000 / size + 3 / float(np.mean(bits)), size * float(np.mean(bits))

    monkeypatch.setattr(supernet, "EVALUATIONS", 24)
    turns = supernet.one_after_the_other(evaluate, 0, lambda *_: None)
    assert len(asked) == len(turns) == 24
    assert all(("qkv0" in choice) is (i >= 12) for i, choice in enumerate(asked))
    members = pareto.front(supernet.points(turns[:12]))
    front = [t["choice"] for t, member in zip(turns[:12], members, strict=True) if member]
    sizes = [{k: c[k] for k in front[0]} for c in asked[12:]]
    assert all(each in front for each in sizes)
    whole = supernet.explore(supernet.together, evaluate, 24, "random", 0, lambda *_: None)
    again = supernet.explore(supernet.together, evaluate, 24, "random", 0, lambda *_: None)
    assert whole == again
    assert {t["choice"]["depth"] for t in whole} == set(elastic.DEPTH)
    trial = optuna.trial.FixedTrial({"member": 0, **{f"{n}{i}": 4 for n in supernet.LINEARS for i in range(4)}})
    assert partial(supernet.in_turn, front)(trial)["qkv0"] == 4
