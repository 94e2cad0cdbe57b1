"""As-ViT's search and scaling against slow versions: autograd and Adam of torch, ranks by counting, all by loops."""

import itertools

import numpy as np
import pytest
import torch

from martlet.recipe_search.scaling.growth import WIDER, Size, best, grow, growths
from martlet.recipe_search.scaling.topology import MOMENTUM, RATE, WINDOW, Policy, Rewards, reinforce

SPACE = {"kernel": (4, 5, 6, 7), "splits": (1, 2, 4), "expansion": (2, 3, 4, 5, 6)}


def judged(choices: dict[str, int]) -> dict[str, float]:
    """Two measures that agree that an expansion of 5 and few splits are good, and not on the kernel."""
    stretch = 3.0 * choices["kernel"] - (choices["expansion"] - 5) ** 2 - choices["splits"]
    return {"stretch": stretch, "condition": -2.0 * choices["kernel"] - 3 * (choices["expansion"] - 5) ** 2}


def oracle(drawn: list[dict[str, int]], seed: int, rate: float = RATE) -> dict[str, torch.Tensor]:
    """Logits after these draws: the loss -(reward - baseline) log p, its gradient by autograd, torch's Adam."""
    rng = np.random.default_rng(seed)
    logits = {n: torch.tensor(1e-3 * rng.standard_normal(len(v)), requires_grad=True) for n, v in SPACE.items()}
    optimizer = torch.optim.Adam(logits.values(), lr=rate)
    history: list[dict[str, float]] = []
    top = bottom = 0.0
    for choices in drawn:
        history.append(judged(choices))
        reward = 0.0
        for name in history[0] if len(history) > 1 else ():
            recent = [each[name] for each in history[-WINDOW:]]
            reward += (history[-1][name] - history[-2][name]) / (max(recent) - min(recent) + 1e-6)
        top, bottom = MOMENTUM * top + (1 - MOMENTUM) * reward, MOMENTUM * bottom + 1 - MOMENTUM
        log_p = sum(torch.log_softmax(logits[n], 0)[SPACE[n].index(v)] for n, v in choices.items())
        optimizer.zero_grad()
        (-log_p * (reward - top / bottom)).backward()  # type: ignore[union-attr]
        optimizer.step()
    return logits


def run(steps: int, seed: int = 3) -> tuple[list[dict[str, int]], dict[str, int]]:
    found = list(reinforce(SPACE, judged, steps=steps, seed=seed))
    return [choices for choices, _, _ in found], found[-1][2]


@pytest.mark.parametrize("steps", [1, 2, WINDOW + 15])
def test_the_policy_is_what_autograd_makes_of_the_same_draws(steps: int) -> None:
    drawn, probable = run(steps)
    expected = oracle(drawn, seed=3)
    assert probable == {n: SPACE[n][int(logits.argmax())] for n, logits in expected.items()}
    policy, rewards = Policy(SPACE, np.random.default_rng(3)), Rewards()
    top = bottom = 0.0
    for choices in drawn:
        reward = rewards(judged(choices))
        top, bottom = MOMENTUM * top + (1 - MOMENTUM) * reward, MOMENTUM * bottom + 1 - MOMENTUM
        policy.learn({n: SPACE[n].index(v) for n, v in choices.items()}, reward - top / bottom)
    for name, logits in expected.items():
        np.testing.assert_allclose(policy.logits[name], logits.detach().numpy(), atol=1e-9)


def test_this_can_fail() -> None:
    drawn, _ = run(30)
    right, wrong = oracle(drawn, seed=3), oracle(drawn, seed=3, rate=0.5 * RATE)
    assert any(not torch.allclose(right[n], wrong[n], atol=1e-3) for n in SPACE)


def test_it_finds_what_the_measures_ask_for_and_draws_the_same_again() -> None:
    drawn, probable = run(400)
    assert probable["expansion"] == 5
    assert run(400) == (drawn, probable)
    assert len({tuple(choices.values()) for choices in drawn[:50]}) > 20


def slow_best(measured: list[dict[str, float]]) -> set[int]:
    """All with the least sum of ranks; a rank is how many different values are better."""
    sums = [
        sum(len({other[name] for other in measured if other[name] > its[name]}) for name in its) for its in measured
    ]
    return {i for i, total in enumerate(sums) if total == min(sums)}


def test_the_best_sum_of_ranks_by_counting() -> None:
    rng = np.random.default_rng(0)
    decided = 0
    for _ in range(200):
        measured = [{"a": float(a), "b": float(b)} for a, b in rng.integers(0, 5, (7, 2))]
        expected = slow_best(measured)
        found = best(measured)
        assert found in expected
        decided += len(expected) == 1
    assert decided > 50
    wide = [{"a": 1.00, "b": 5.0}, {"a": 1.01, "b": 4.0}]  # equal sums: b differs more, so its best is taken
    assert best(wide) == 0
    assert best([{"a": 1.0, "b": 5.0}, {"a": 9.0, "b": 4.9}]) == 1


def test_growing_takes_one_block_and_a_wider_width_a_step() -> None:
    def gain(size: Size) -> dict[str, float]:
        return {"a": size.width + 3.0 * size.depths[1], "b": -float(size.depths[0])}

    way = [size for size, _ in grow(Size((1, 1, 1), 20), gain, lambda size: size.width <= 60)]
    assert all(size.width <= 60 for size in way)
    for before, after in itertools.pairwise([Size((1, 1, 1), 20), *way]):
        options = growths(before)
        assert {sum(o.depths) for o in options} == {sum(before.depths) + 1}
        assert {o.width for o in options} == {round(before.width * (1 + share)) for share in WIDER}
        fitting = [o for o in options if o.width <= 60]
        assert fitting.index(after) in slow_best([gain(o) for o in fitting])
    assert way[-1].depths[1] > way[-1].depths[0]
    assert not list(grow(Size((1,), 60), gain, lambda size: False))
