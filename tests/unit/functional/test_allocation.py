"""Allocations against trying everything; and that a worse one would show."""

import ctypes
import itertools
import os

import pytest
import torch

from martlet.functional.allocation import Choice, allocate_exactly, allocate_greedily


def layers(seed: int, budgets: int = 2, count: int = 5, settings: int = 4) -> list[list[Choice]]:
    """Costs that fall by about four with every bit, and uses that grow with it."""
    generator = torch.Generator().manual_seed(seed)
    found = []
    for _ in range(count):
        weight = torch.rand(budgets, generator=generator) * 9 + 1
        scale = 10 ** (3 * torch.rand(1, generator=generator).item())
        noise = torch.rand(settings, generator=generator) + 0.5
        found.append(
            [Choice(scale * noise[i].item() * 4.0**-i, tuple((weight * (3 + i)).tolist())) for i in range(settings)]
        )
    return found


def cost(its: list[list[Choice]], picked: list[int]) -> float:
    return sum(layer[i].cost for layer, i in zip(its, picked, strict=True))


def used(its: list[list[Choice]], picked: list[int], b: int) -> float:
    return sum(layer[i].uses[b] for layer, i in zip(its, picked, strict=True))


def average(its: list[list[Choice]], b: int) -> float:
    return sum(layer[1].uses[b] for layer in its)


def assert_is_the_best(its: list[list[Choice]], picked: list[int], budgets: list[float]) -> None:
    assert all(used(its, picked, b) <= budget * (1 + 1e-6) for b, budget in enumerate(budgets))
    fitting = [
        cost(its, list(other))
        for other in itertools.product(*(range(len(layer)) for layer in its))
        if all(used(its, list(other), b) <= budget * (1 + 1e-9) for b, budget in enumerate(budgets))
    ]
    assert cost(its, picked) == pytest.approx(min(fitting), rel=1e-6)


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("budgets", [1, 2])
def test_the_integer_programme_finds_the_least_cost(seed: int, budgets: int) -> None:
    its = layers(seed, budgets)
    limits = [average(its, b) for b in range(budgets)]
    picked = allocate_exactly(its, limits)
    assert_is_the_best(its, picked, limits)
    assert cost(its, picked) < cost(its, [1] * len(its))  # better than the same everywhere


def test_a_worse_allocation_shows() -> None:
    its = layers(0)
    limits = [average(its, b) for b in range(2)]
    picked = allocate_exactly(its, limits)
    for wrong in ([1] * 5, [3] * 5, [0] * 5, [(i + 1) % 4 for i in picked]):
        with pytest.raises(AssertionError):
            assert_is_the_best(its, wrong, limits)


def test_the_greedy_allocation_keeps_the_budgets_and_beats_the_same_everywhere() -> None:
    greedy = same = 0.0
    for seed in range(6):
        its = layers(seed, count=20)
        limits = [average(its, b) for b in range(2)]
        picked = allocate_greedily(its, limits)
        assert all(used(its, picked, b) <= limit * (1 + 1e-6) for b, limit in enumerate(limits))
        assert cost(its, allocate_exactly(its, limits)) <= cost(its, picked) * (1 + 1e-6)
        greedy, same = greedy + cost(its, picked), same + cost(its, [1] * 20)
    assert greedy < 0.9 * same


def test_settings_that_trade_one_budget_for_another_do_not_go_in_circles() -> None:
    its = [[Choice(1.0, (2.0, 3.0)), Choice(1.1, (3.0, 2.0)), Choice(5.0, (2.0, 2.0))]] * 3
    assert allocate_greedily(its, [6.0, 6.0]) == allocate_exactly(its, [6.0, 6.0]) == [2, 2, 2]


def test_enough_for_all_gives_each_its_best() -> None:
    its = layers(3)
    for allocate in (allocate_exactly, allocate_greedily):
        assert allocate(its, [1e9, 1e9]) == [3] * 5


def test_a_budget_that_nothing_uses_is_no_division_by_zero() -> None:
    its = [[Choice(2.0, (0.0,)), Choice(1.0, (0.0,))]]
    for allocate in (allocate_exactly, allocate_greedily):
        assert allocate(its, [0.0]) == [1]


@pytest.mark.parametrize("allocate", [allocate_exactly, allocate_greedily])
@pytest.mark.parametrize(
    ("its", "budgets"),
    [([], [1.0]), ([[]], [1.0]), ([[Choice(1.0, (2.0,))]], [1.0]), ([[Choice(1.0, (2.0,))]], [1.0, 2.0])],
)
def test_the_impossible_is_refused(allocate, its, budgets) -> None:
    with pytest.raises(ValueError, match=r"no choice|no setting|doesn't say"):
        allocate(its, budgets)


@pytest.mark.skipif(os.name != "posix", reason="C's own printing can't be reached")
def test_what_the_solver_prints_isnt_seen_and_what_others_print_is(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from scipy import optimize

    c, solve = ctypes.CDLL(None), optimize.milp

    def loud(*args, **kwargs):
        c.puts(b"a line of C's own")
        return solve(*args, **kwargs)

    monkeypatch.setattr(optimize, "milp", loud)
    c.puts(b"before")
    its = layers(0)
    allocate_exactly(its, [average(its, b) for b in range(2)])
    c.puts(b"after")
    c.fflush(None)
    print("last")
    assert capfd.readouterr().out.split() == ["before", "after", "last"]
    loud(1.0)
    c.fflush(None)
    assert "a line of C's own" in capfd.readouterr().out
