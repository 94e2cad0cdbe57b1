"""Strategies on a space whose front is known by trying everything; and a study that is stopped anywhere."""

import contextlib
import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import optuna
import pytest
from optuna.distributions import CategoricalDistribution, IntDistribution
from optuna.storages import InMemoryStorage
from optuna.trial import FrozenTrial

from martlet.core.errors import ArtifactError, UsageError
from martlet.core.facts import ALL_FACTS
from martlet.core.recipe import Recipe
from martlet.functional import pareto
from martlet.recipe_search import strategies
from martlet.recipe_search.strategies.greedy import neighbours
from martlet.recipe_search.strategies.linas import ALPHAS, COSTS, STARTUP, Predictor
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

    values: tuple[float, float]

    def __init__(self, on: bool, a: int, b: int, c: int = 0) -> None:
        object.__setattr__(self, "passes", ())
        loss = a * a + 2 * b + (0 if on else 6) + 0.5 * (c - 1) ** 2
        time = 20 - 3 * a - b * (1 + (a > 2)) - c + (2 if on else 0)
        object.__setattr__(self, "values", (float(loss), float(time)))


def everything() -> np.ndarray:
    rows = [Cost(True, *each).values for each in itertools.product(*map(range, SIZES.values()))]
    rows += [Cost(False, a, b).values for a, b in itertools.product(range(SIZES["a"]), range(SIZES["b"]))]
    return np.array(rows)


def study(path: Path, strategy: str, seed: int = 0) -> Study:
    return Study.open(path, 2, Space(), strategies.get(strategy), seed, ALL_FACTS)  # type: ignore[arg-type]


@contextlib.contextmanager
def in_memory() -> Iterator[None]:
    """Studies that are opened so write no file, which takes most of their time: files have tests of their own."""
    create = optuna.create_study
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(optuna, "create_study", lambda **its: create(**its | {"storage": InMemoryStorage()}))
        yield


def trials(strategy: str, batches: int, seed: int = 0) -> list[FrozenTrial]:
    """All trials after so many batches."""
    with in_memory():
        one = study(Path(), strategy, seed)
    for _ in range(batches):
        for number, recipe in one.batch():
            tell(one, number, recipe)
    return one.study.get_trials()


def tell(one: Study, number: int, recipe: Recipe | None) -> tuple[float, ...]:
    assert isinstance(recipe, Cost)
    one.tell(number, recipe.values, {"latency": recipe.values[1] / 12 - 1})
    return recipe.values


def told(strategy: str, batches: int, seed: int = 0) -> np.ndarray:
    """All values after so many batches."""
    return np.array([trial.values for trial in trials(strategy, batches, seed)])


def volume(rows: np.ndarray) -> float:
    return pareto.hypervolume(rows, WORST)


@pytest.mark.parametrize(
    "strategy",
    [pytest.param(s, marks=[] if s in ("tpe", "greedy") else pytest.mark.slow) for s in strategies.STRATEGIES],
)
def test_it_nears_the_front_that_trying_everything_finds(strategy: str) -> None:
    found, best = told(strategy, 5), everything()
    assert len(found) == 5 * BATCH
    assert volume(found) > 0.85 * volume(best)
    assert volume(found[:4]) < volume(found)
    assert set(map(tuple, found)) <= set(map(tuple, best))


@pytest.mark.slow
def test_the_default_beats_chance() -> None:
    def mean(strategy: str) -> float:
        return float(np.mean([volume(told(strategy, 4, seed)) for seed in range(3)]))

    assert mean("tpe") > mean("random")


@pytest.mark.parametrize(
    "strategy", ["tpe", *(pytest.param(s, marks=pytest.mark.slow) for s in ("nsga2", "linas", "greedy"))]
)
def test_stopped_anywhere_it_draws_what_it_would_have(strategy: str, tmp_path: Path) -> None:
    whole = told(strategy, 3)
    path, values = tmp_path / "broken.db", {}
    for stop in (1, 3, BATCH, 2, 5, BATCH):
        one = study(path, strategy)
        if stop == 2:  # stopped among draws
            one.study.sampler = one._sampler(len(one.study.get_trials()), frozenset())
            if len(one.study.get_trials()) % BATCH == 0 and one.study.get_trials()[-1].state.is_finished():
                one.recipes.draw(one.study.ask())
            continue
        for number, recipe in one.batch()[:stop]:
            values[number] = tell(one, number, recipe)
    n = min(len(values), len(whole))
    assert n >= 2 * BATCH
    assert [values[i] for i in range(n)] == [tuple(row) for row in whole[:n]]


@pytest.mark.parametrize("strategy", ["tpe", "greedy"])
def test_what_is_begun_with_is_drawn_first(strategy: str) -> None:
    starts = [{"switch": "off", "a": 5}, {"switch": "on", "a": 2, "b": 3, "c": 1}]
    with in_memory():
        one = Study.open(Path(), 2, Space(starts), strategies.get(strategy), 0, ALL_FACTS)  # type: ignore[arg-type]
    for number, recipe in one.batch():
        tell(one, number, recipe)
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


def choices(n: int, seed: int) -> list[dict[str, Any]]:
    """Bits of eight layers, and a choice that only some have."""
    rng = np.random.default_rng(seed)
    rows = [{f"bits{i}": int(rng.choice((4, 6, 8))) for i in range(8)} for _ in range(n)]
    return [row | ({"more": "yes"} if rng.random() < 0.5 else {}) for row in rows]


def cost(choice: dict[str, Any]) -> float:
    return 10.0 ** sum((8 - choice[f"bits{i}"]) * (i + 1) ** 1.3 / 30 for i in range(8)) * (
        3 if "more" in choice else 1
    )


def ridge(known: list[dict[str, Any]], values: list[float], wanted: list[dict[str, Any]], alpha: float) -> np.ndarray:
    """(XᵀX + αI)⁻¹ Xᵀy about the means, with a column for each value of each choice; ranks by counting."""
    pairs = sorted({pair for c in known for pair in c.items()}, key=str)
    x, new = (np.array([[float(c.get(k) == v) for k, v in pairs] for c in each]) for each in (known, wanted))
    y = np.array([sum(other < value for other in values) / (len(values) - 1) for value in values])
    weights = np.linalg.solve((x - x.mean(0)).T @ (x - x.mean(0)) + alpha * np.eye(len(pairs)), (x - x.mean(0)).T @ y)
    return y.mean() + (new - x.mean(0)) @ weights


def support(known: list[dict[str, Any]], values: list[float], wanted: list[dict[str, Any]], cost: float) -> np.ndarray:
    from sklearn.svm import SVR

    pairs = sorted({pair for c in known for pair in c.items()}, key=repr)
    x, new = (np.array([[float(c.get(k) == v) for k, v in pairs] for c in each]) for each in (known, wanted))
    y = [sum(other < value for other in values) / (len(values) - 1) for value in values]
    return SVR(C=cost, epsilon=0.0).fit(x, y).predict(new)


def test_predictors_are_ridge_or_support_vectors_on_ranks_and_rank_what_they_havent_seen() -> None:
    known, wanted = choices(40, 0), choices(40, 1)
    values = [cost(choice) for choice in known]
    assert len(set(values)) == 40
    found = Predictor(known, values)(wanted)
    options = [ridge(known, values, wanted, alpha) for alpha in ALPHAS] + [
        support(known, values, wanted, c) for c in COSTS
    ]
    assert any(np.allclose(found, option, atol=1e-6) for option in options)
    assert not np.allclose(found, ridge(known, values[::-1], wanted, 1.0), atol=1e-2)
    truth = np.array([cost(choice) for choice in wanted])
    assert np.corrcoef(found.argsort().argsort(), truth.argsort().argsort())[0, 1] > 0.8
    assert Predictor(known, values)([{"bits0": 99, "unheard": 1}]).shape == (1,)


def test_linas_draws_nothing_twice_and_beats_chance_once_it_predicts() -> None:
    chance = -(-STARTUP // BATCH)
    found = trials("linas", chance + 1)
    params = [tuple(sorted(trial.params.items())) for trial in found]
    assert len(set(params[chance * BATCH :])) == BATCH
    assert not set(params[chance * BATCH :]) & set(params[: chance * BATCH])
    assert volume(np.array([trial.values for trial in found])) > volume(told("random", chance + 1))


def test_bad_use(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="did you mean greedy"):
        strategies.get("gredy")
    (tmp_path / "study.db").write_text("no database")
    with pytest.raises(ArtifactError, match="is damaged"):
        study(tmp_path / "study.db", "tpe")
