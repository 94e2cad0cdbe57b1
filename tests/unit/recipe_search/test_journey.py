"""What a search decides from what it has measured: who is asked further, and who is measured at the end."""

from typing import Any

import pytest

from martlet.core.errors import ArtifactError, UsageError
from martlet.core.recipe import Recipe
from martlet.recipe_search import folder as folders
from martlet.recipe_search.folder import Folder
from martlet.recipe_search.journey import COLLAPSED_PCT, FINALISTS, Journey
from martlet.recipe_search.limits import FAR, Limits
from martlet.recipe_search.screen import reason, screened

JOB = {"model": {"name": "a"}, "code": {"digest": "1"}, "seed": 0}


def entry(recipe: Recipe, ms: float, kl: float, drop_pct: float = 0.0) -> dict[str, Any]:
    return {
        "recipe": recipe.to_yaml(), "latency_ms": ms, "kl": kl, "drop_pct": drop_pct, "drop_high_pct": drop_pct,
        "file_bytes": 1e6,
    }  # fmt: skip


@pytest.fixture
def journey(tmp_path) -> Any:
    def make(measured: dict[str, tuple[float, float]], **limits: float) -> Journey:
        folder = Folder.open(tmp_path / "run", JOB, overwrite=True)
        for name, (ms, kl) in measured.items():
            recipe = Recipe.load(name)
            folder.put("measured", recipe.digest(), entry(recipe, ms, kl))
        unused: Any = None
        found = Journey(
            folder, Limits(**{"max_drop": 1.0} | limits), unused, unused, unused, unused, unused, unused, None, None,
            {}, unused, unused, None, unused,
        )  # fmt: skip
        found.references = {name: Recipe.load(name) for name in ("none", "bf16", "int8") if name in measured}
        return found

    return make


def test_int8_is_asked_further_only_where_floating_point_does_not_beat_it(journey) -> None:
    beaten = {"none": (10.0, 0.0), "bf16": (7.0, 0.001), "int8": (9.0, 0.01)}
    assert journey(beaten)._beaten("int8")
    assert not journey(beaten | {"int8": (6.0, 0.01)})._beaten("int8")  # faster
    assert not journey(beaten)._beaten("tps")  # no reference has it
    larger = journey(beaten, size_mb=1.0)
    small = Recipe.load("int8")
    larger.folder.put("measured", small.digest(), entry(small, 9.0, 0.01) | {"file_bytes": 3e5})
    assert not larger._beaten("int8")  # a limit to size is what it is for


def test_what_gains_nothing_alone_or_loses_far_too_much_is_out(journey, monkeypatch) -> None:
    one = journey({"none": (10.0, 0.0)})
    base, slow, lossy, good, failed = (frozenset(names) for names in ((), ("a",), ("b",), ("c",), ("d",)))
    entries = {
        base: {"latency_ms": 10.0, "kl": 0.0, "drop_pct": 0.0},
        slow: {"latency_ms": 11.0, "kl": 0.1, "drop_pct": 0.1},
        lossy: {"latency_ms": 5.0, "kl": 0.5, "drop_pct": FAR + 0.1, "agreement_pct": COLLAPSED_PCT},
        good: {"latency_ms": 9.0, "kl": 0.1, "drop_pct": 0.9, "agreement_pct": 99.0},
        failed: {"why": "it can't be"},
    }

    class Recipes:
        def starts(self) -> list:
            return [*entries]

        def alone(self, start: Any) -> tuple:
            return start, start

    one.recipes = Recipes()
    monkeypatch.setattr(one, "_screened", lambda recipe: entries[recipe])
    monkeypatch.setattr(one, "_predicted", lambda entry, clock: entry)
    monkeypatch.setattr(one, "clock", lambda: None)
    assert one.out() == {"a", "b", "d"}
    one.limits = Limits(latency_ms=8.0)  # no drop is too much
    assert one.out() == {"a", "d"}
    entries[lossy]["agreement_pct"] -= 0.1  # but nothing is left of it
    assert one.out() == {"a", "b", "d"}
    entries.pop(base)
    assert one.out() == frozenset()


def test_what_fails_costs_its_candidate_and_says_its_type() -> None:
    def broken(*_: object) -> Any:
        raise AssertionError

    assert screened(broken, "recipe")["why"] == "AssertionError"  # type: ignore[arg-type]
    assert reason(ValueError("no\nmore")) == "ValueError: no"
    assert reason(UsageError("say this")) == "say this"


def test_finalists_keep_the_budget_first_and_the_nearest_follow(journey) -> None:
    one = journey({"none": (10.0, 0.0)})
    drops = {5 + i: 2.0 - 0.1 * i for i in range(20)}  # the slower, the less is lost
    for ms, drop_pct in drops.items():
        recipe = Recipe(Recipe.load("fuse").passes * ms)  # any that differ
        one.folder.put("measured", recipe.digest(), entry(recipe, float(ms), 1e-3 * (40 - ms), drop_pct))
    told = [one.measured[digest] for digest in one.finalists()]
    assert len(told) == 1 + FINALISTS  # and the untouched model
    assert one.chosen()["latency_ms"] == 15  # the fastest that loses one point at most
    assert one.chosen() in told
    assert all(values["drop_pct"] <= 1 for values in told)
    tight = journey({"none": (10.0, 0.0)}, max_drop=0.1)
    for ms, drop_pct in {6: 3.0, 7: 0.5, 8: 0.05}.items():
        recipe = Recipe(Recipe.load("fuse").passes * ms)
        tight.folder.put("measured", recipe.digest(), entry(recipe, float(ms), drop_pct, drop_pct))
    assert [tight.measured[digest]["latency_ms"] for digest in tight.finalists()] == [10.0, 8.0, 7.0, 6.0]


def test_times_side_by_side_choose_among_finalists_and_what_they_lose_there_does_not(journey) -> None:
    one = journey({"none": (10.0, 0.0)})
    recipes = {ms: Recipe(Recipe.load("fuse").passes * int(10 * ms)) for ms in (6.5, 6.9, 5.0)}
    for ms, recipe in recipes.items():
        one.folder.put("measured", recipe.digest(), entry(recipe, ms, 0.0, 3.0 if ms == 5.0 else 0.7 - ms / 10))
    assert one.chosen()["latency_ms"] == 6.5
    together = {6.5: 7.2, 6.9: 6.8, 5.0: 5.0}
    final = {recipes[ms].digest(): {"latency_ms": other, "drop_pct": 9.0} for ms, other in together.items()}
    one.folder.put("final", one._final_key, final | {one.references["none"].digest(): {"latency_ms": 10.0}})
    assert one.chosen()["recipe"] == recipes[6.9].to_yaml()  # that of 5 ms had lost too much in the search


def test_a_folder_of_another_model_code_or_version_is_refused(tmp_path, monkeypatch) -> None:
    path = tmp_path / "run"
    Folder.open(path, JOB, overwrite=False)
    assert Folder.open(path, JOB, overwrite=False).path == path
    for key, changed in {"model": {"name": "b"}, "code": {"digest": "2"}, "seed": 1}.items():
        with pytest.raises(UsageError, match=f"is a search with another {key} .*add --overwrite to begin anew"):
            Folder.open(path, JOB | {key: changed}, overwrite=False)
    monkeypatch.setattr(folders, "VERSION", folders.VERSION + 1)
    with pytest.raises(ArtifactError, match="is damaged or of another version"):
        Folder.open(path, JOB, overwrite=False)
