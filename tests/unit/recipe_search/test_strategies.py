"""Strategies on a space whose front is known by trying everything; and a study that is stopped anywhere."""

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from optuna.distributions import CategoricalDistribution, IntDistribution

from martlet.core.errors import ArtifactError, UsageError
from martlet.core.facts import ALL_FACTS
from martlet.core.recipe import Recipe
from martlet.functional import pareto
from martlet.recipe_search import strategies
from martlet.recipe_search.strategies.greedy import neighbours
from martlet.recipe_search.study import BATCH, Study

SIZES = {"a": 6, "b": 5, "c": 4}
WORST = (40.0, 40.0)


class Space:
    """Three numbers and a switch; draws are told by what they cost, and recipes aren't needed."""

    def __init__(self, starts: Sequence[dict[str, Any]] = ()) -> None:
        self._starts = [*starts]

    def starts(self) -> list[dict[str, Any]]:
        return self._starts

    def without(self, names: frozenset[str]) -> dict[str, Any]:
        return dict.fromkeys(names, "off")

    def draw(self, trial: Any) -> Any:
        on = trial.suggest_categorical("switch", ["on", "off"]) == "on"
        values = {name: trial.suggest_int(name, 0, n - 1) for name, n in SIZES.items() if on or name != "c"}
        return Cost(on, **values)


class Cost(Recipe):
    """What a draw loses and takes."""

    def __init__(self, on: bool, a: int, b: int, c: int = 0) -> None:
        object.__setattr__(self, "passes", ())
        loss = a * a + 2 * b + (0 if on else 6) + 0.5 * (c - 1) ** 2
        time = 20 - 3 * a - b * (1 + (a > 2)) - c + (2 if on else 0)
        object.__setattr__(self, "values", (float(loss), float(time)))


def everything() -> np.ndarray:
    rows = [Cost(True, *each).values for each in itertools.product(*map(range, SIZES.values()))]  # type: ignore[attr-defined]
    rows += [Cost(False, a, b).values for a, b in itertools.product(range(SIZES["a"]), range(SIZES["b"]))]  # type: ignore[attr-defined]
    return np.array(rows)


def study(path: Path, strategy: str, seed: int = 0) -> Study:
    return Study.open(path, 2, Space(), strategies.get(strategy), seed, ALL_FACTS)  # type: ignore[arg-type]


def told(path: Path, strategy: str, batches: int, seed: int = 0) -> np.ndarray:
    """All values after so many batches."""
    one = study(path, strategy, seed)
    for _ in range(batches):
        for number, recipe in one.batch():
            assert recipe is not None
            values = recipe.values  # type: ignore[attr-defined]
            one.tell(number, values, {"latency": values[1] / 12 - 1})
    return np.array([t.values for t in one.study.get_trials()])


def volume(rows: np.ndarray) -> float:
    return pareto.hypervolume(rows, WORST)


@pytest.mark.parametrize(
    "strategy",
    [pytest.param(s, marks=[] if s in ("tpe", "greedy") else pytest.mark.slow) for s in strategies.STRATEGIES],
)
def test_it_nears_the_front_that_trying_everything_finds(strategy: str, tmp_path: Path) -> None:
    found, best = told(tmp_path / "study.db", strategy, 5), everything()
    assert len(found) == 5 * BATCH
    assert volume(found) > 0.85 * volume(best)
    assert volume(found[:4]) < volume(found)
    assert set(map(tuple, found)) <= set(map(tuple, best))


@pytest.mark.slow
def test_the_default_beats_chance(tmp_path: Path) -> None:
    def mean(strategy: str) -> float:
        return float(np.mean([volume(told(tmp_path / f"{strategy}{s}.db", strategy, 4, seed=s)) for s in range(3)]))

    assert mean("tpe") > mean("random")


@pytest.mark.parametrize("strategy", ["tpe", *(pytest.param(s, marks=pytest.mark.slow) for s in ("nsga2", "greedy"))])
def test_stopped_anywhere_it_draws_what_it_would_have(strategy: str, tmp_path: Path) -> None:
    whole = told(tmp_path / "whole.db", strategy, 3)
    path, values = tmp_path / "broken.db", {}
    for stop in (1, 3, BATCH, 2, 5, BATCH):
        one = study(path, strategy)
        if stop == 2:  # stopped among draws
            one.study.sampler = one.sampler(one.seed + len(one.study.get_trials()))
            if len(one.study.get_trials()) % BATCH == 0 and one.study.get_trials()[-1].state.is_finished():
                one.recipes.draw(one.study.ask())
            continue
        for number, recipe in one.batch()[:stop]:
            assert recipe is not None
            values[number] = recipe.values  # type: ignore[attr-defined]
            one.tell(number, values[number], {"latency": values[number][1] / 12 - 1})
    n = min(len(values), len(whole))
    assert n >= 2 * BATCH
    assert [values[i] for i in range(n)] == [tuple(row) for row in whole[:n]]


@pytest.mark.parametrize("strategy", ["tpe", "greedy"])
def test_what_is_begun_with_is_drawn_first(strategy: str, tmp_path: Path) -> None:
    starts = [{"switch": "off", "a": 5}, {"switch": "on", "a": 2, "b": 3, "c": 1}]
    one = Study.open(tmp_path / "s.db", 2, Space(starts), strategies.get(strategy), 0, ALL_FACTS)  # type: ignore[arg-type]
    for number, recipe in one.batch():
        one.tell(number, recipe.values)  # type: ignore[union-attr]
    drawn = [trial.params for trial in one.study.get_trials()]
    assert [{k: params[k] for k in start} for params, start in zip(drawn, starts, strict=False)] == starts
    assert "c" not in drawn[0]
    assert any(params["a"] != 5 and params != starts[1] for params in drawn[2:])
    assert len(one.batch(frozenset({"switch"}))) == BATCH  # what is out isn't drawn
    assert {trial.params["switch"] for trial in one.study.get_trials()[BATCH:]} == {"off"}


def test_a_draw_that_fails_is_told_and_left_out(tmp_path: Path) -> None:
    one = study(tmp_path / "study.db", "tpe")
    for number, _ in one.batch():
        one.tell(number, None)
    assert one.finished() == 1
    assert len(one.batch()) == BATCH


def test_neighbours_are_one_step_away() -> None:
    assert neighbours(IntDistribution(0, 5), 0) == [1]
    assert neighbours(IntDistribution(0, 5), 3) == [2, 4]
    assert neighbours(CategoricalDistribution(["x", "y", "z"]), "y") == ["x", "z"]


def test_bad_use(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="did you mean greedy"):
        strategies.get("gredy")
    (tmp_path / "study.db").write_text("no database")
    with pytest.raises(ArtifactError, match="is damaged"):
        study(tmp_path / "study.db", "tpe")
