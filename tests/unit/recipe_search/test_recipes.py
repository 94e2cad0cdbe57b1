"""The space of whole recipes: what facts allow, every draw of it, and a technique that joins by declaring its part."""

import itertools
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import pytest
from optuna.trial import FixedTrial

from martlet import engine
from martlet.core.errors import RecipeError, UsageError
from martlet.core.facts import ALL_FACTS, Fact
from martlet.core.model import Model
from martlet.core.recipe import Recipe
from martlet.core.technique import Choices, Context, Stage, Technique
from martlet.recipe_search.explain import without
from martlet.recipe_search.recipes import Recipes, split, spread
from martlet.recipe_search.space import context
from martlet.techniques.exits.deer import DROPS, DeeR

FEW = "fuse | resolution | tome | tps | readout | int8 | weight_only | bf16"
"""Techniques of which any two of different groups go together; where two don't, their draws are told as failed."""


def recipes(only: str | None = None) -> Recipes:
    return Recipes.of(ALL_FACTS, context(engine.get("openvino")), Recipe.load(only) if only else None)


class Every(FixedTrial):
    """Takes choices in turn from a list of places, and says how many there were."""

    def __init__(self, places: list[int]) -> None:
        super().__init__({})
        self.places, self.sizes = places, []

    def _take(self, n: int) -> int:
        i = len(self.sizes)
        self.sizes.append(n)
        return self.places[i] if i < len(self.places) else 0

    def suggest_categorical(self, name: str, choices: Any) -> Any:
        return choices[self._take(len(choices))]

    def suggest_int(self, name: str, low: int, high: int, **_: Any) -> int:
        return low + self._take(high - low + 1)


def every(space: Recipes) -> list[Recipe]:
    """All draws there are, one after the other."""
    found, places = [], []
    while True:
        trial = Every(places)
        found.append(space.draw(trial))
        places = (places + [0] * len(trial.sizes))[: len(trial.sizes)]
        while places and places[-1] == trial.sizes[len(places) - 1] - 1:
            places.pop()
        if not places:
            return found
        places[-1] += 1


def test_techniques_stand_where_facts_allow_and_those_that_exclude_each_other_never_together() -> None:
    space = recipes()
    assert {"fuse", "tome", "tps", "readout", "int8", "weight_only", "bf16"} <= set(space.parts)
    assert {"evit", "gptq", "i_vit"}.isdisjoint(space.parts)  # need training, or only simulated
    group_of = {name: group for group in space.groups for name in group}
    assert group_of["tome"] == group_of["tps"] == group_of["readout"]
    assert group_of["int8"] == group_of["weight_only"]
    assert group_of["bf16"] == ("bf16",)
    space = recipes(FEW)
    group_of = {name: group for group in space.groups for name in group}
    for a, b in itertools.combinations(space.parts, 2):  # in the space's order, from different groups: legal
        if group_of[a] != group_of[b]:
            Recipe((space.parts[a].technique, space.parts[b].technique)).facts()


def test_every_draw_is_legal_and_all_are_different() -> None:
    space = recipes(FEW)
    found = every(space)
    assert len({recipe.digest() for recipe in found}) == len(found)
    for recipe in found:
        recipe.facts()
        assert recipe.passes[0].name == "fuse"
    names = {tuple(t.name for t in recipe.passes) for recipe in found}
    assert {("fuse",), ("fuse", "tps", "int8", "bf16"), ("fuse", "weight_only")} <= names


def test_a_front_is_one_more_choice() -> None:
    space = recipes("tps | int8 | bf16")
    before = len(every(space))
    space.fronts = {"tps": [{"r": ((3, 9),)}, {"r": ((2, 5), (3, 4))}, {"r": ((1, 9),)}]}
    assert len(every(space)) == 2 * before
    assert {
        t.settings()["r"][3] for r in every(space) for t in r.passes if t.name == "tps" and 3 in t.settings()["r"]
    } == {
        9,
        4,
    }


def test_a_search_begins_with_each_technique_alone_in_what_the_engine_can_do() -> None:
    space = recipes("fuse | tps | readout | int8 | bf16")
    space.fronts = {"tps": [{"r": ((3, 9),)}, {"r": ((2, 5),)}, {"r": ((1, 9),)}]}
    drawn = [space.draw(FixedTrial(start)) for start in space.starts()]
    names = [tuple(t.name for t in recipe.passes if t.name != "fuse") for recipe in drawn]
    assert names == [("bf16",), ("readout",), ("readout", "bf16"), ("tps", "bf16"), ("int8", "bf16")]
    assert [t.settings()["r"] for recipe in drawn for t in recipe.passes if t.name == "tps"] == [{2: 5}]
    assert {recipe.digest() for recipe in drawn} <= {recipe.digest() for recipe in every(space)}


def test_groups_that_are_out_are_left_out_and_starts_say_what_is_alone_in_them() -> None:
    space = recipes("fuse | tps | readout | int8 | bf16")
    alone = [space.alone(start)[0] for start in space.starts()]
    assert alone[0] == frozenset()
    assert set(alone[1:]) == {frozenset({name}) for name in ("tps", "readout", "int8")}
    assert space.without(frozenset({"int8", "tps"})) == {"int8": "none"}  # readout is in the group of tps
    assert set(space.without(frozenset({"tps", "readout"})).values()) == {"none"}


def test_only_what_the_recipe_has_with_what_it_says() -> None:
    space = recipes("fuse | int8")
    found = every(space)
    assert {t.name for recipe in found for t in recipe.passes} == {"fuse", "int8"}
    with pytest.raises(UsageError, match="fuse has nothing"):
        recipes("fuse")
    with pytest.raises(RecipeError):
        Recipe.load("int8 | fuse").facts()


@dataclass(frozen=True, kw_only=True)
class Prune(Technique):
    """A technique of another family."""

    name: ClassVar[str] = "prune"
    stage: ClassVar[Stage] = Stage.MODULE
    summary: ClassVar[str] = "prune"
    requires: ClassVar[frozenset[Fact]] = frozenset({Fact.FLOAT_WEIGHTS})
    amount_ratio: float = 0.5

    def space(self) -> Choices:
        return Choices(settings={"amount_ratio": (0.25, 0.5)})

    def apply_(self, model: Model, context: Context) -> dict[str, Any]:
        return {}


def test_a_new_family_joins_by_declaring_its_part() -> None:
    only = Recipe((*Recipe.load("tps | int8").passes, Prune()))
    space = Recipes.of(ALL_FACTS, Context(), only)
    found = every(space)
    assert {t.amount_ratio for recipe in found for t in recipe.passes if isinstance(t, Prune)} == {0.25, 0.5}
    for recipe in found:
        names = [t.name for t in recipe.passes]
        assert "prune" not in names or "int8" not in names or names.index("prune") < names.index("int8")
        recipe.facts()


def test_what_tells_the_engine_makes_no_files() -> None:
    files, told = split(Recipe.load("fuse | tps | int8 | bf16"))
    assert [t.name for t in files.passes] == ["fuse", "tps", "int8"]
    assert [t.name for t in told.passes] == ["bf16"]


def test_spread_keeps_both_ends() -> None:
    assert spread(range(5), 8) == [0, 1, 2, 3, 4]
    assert spread(range(100), 4) == [0, 33, 66, 99]


def test_thresholds_are_drawn_with_exits_and_only_there_and_come_last() -> None:
    training: Any = object()
    there = replace(context(engine.get("openvino")), training=training)
    space = Recipes.of(ALL_FACTS, there, Recipe.load("fuse | linear_exits | deer | int8 | bf16"))
    found = every(space)
    assert {tuple(t.name for t in recipe.passes) for recipe in found} == {
        ("fuse", *exits, *int8, *(["deer"] if exits else []), *bf16)
        for exits in ((), ("linear_exits",))
        for int8 in ((), ("int8",))
        for bf16 in ((), ("bf16",))
    }
    assert {t.settings().get("max_drop") for recipe in found for t in recipe.passes if t.name == "deer"} == {*DROPS}
    starts = [space.alone(start) for start in space.starts()]
    assert {names for names, _ in starts} == {frozenset(), frozenset({"int8"}), frozenset({"linear_exits"})}
    assert all(("deer" in r.to_yaml()) == ("linear_exits" in names) for names, r in starts)


def test_a_model_with_exits_always_gets_thresholds() -> None:
    facts = ALL_FACTS - {Fact.ONE_EXIT}
    space = Recipes.of(facts, context(engine.get("openvino")))
    assert space.follow == ["deer"]
    assert {"tps", "linear_exits", "lgvit"}.isdisjoint(space.parts)  # they come before exits
    for start in space.starts():
        names, recipe = space.alone(start)
        assert [t.name for t in recipe.passes if t.stage is not Stage.ENGINE][-1] == "deer"
        assert "deer" not in names
        recipe.facts(facts)


def test_what_follows_goes_with_what_it_follows_and_not_where_the_model_has_it() -> None:
    recipe = Recipe.load("linear_exits | int8 | deer | bf16")
    exits, int8, deer, _ = recipe.passes

    def left(dropped: Technique, facts: frozenset[Fact] = ALL_FACTS) -> list[str]:
        return [technique.name for technique in without(recipe, dropped, facts).passes]

    assert left(exits) == ["int8", "bf16"]
    assert left(int8) == ["linear_exits", "deer", "bf16"]
    assert left(deer) == ["linear_exits", "int8", "bf16"]
    assert left(exits, ALL_FACTS - {Fact.ONE_EXIT}) == ["int8", "deer", "bf16"]


def test_what_is_trained_is_drawn_only_where_there_are_images_to_train_on() -> None:
    plain = context(engine.get("openvino"))
    training: Any = object()
    assert {"linear_exits", "lgvit", "deer"}.isdisjoint(Recipes.of(ALL_FACTS, plain).parts)
    assert {"linear_exits", "lgvit", "deer"} <= set(Recipes.of(ALL_FACTS, replace(plain, training=training)).parts)
    with pytest.raises(UsageError, match=r"^linear_exits is trained for each recipe; .*\(--train\)$"):
        Recipes.of(ALL_FACTS, plain, Recipe.load("linear_exits | int8 | deer"))
    budget = DeeR(mean_gmacs=1.0)
    space = Recipes.of(ALL_FACTS, replace(plain, training=training), Recipe((Recipe.load("mue").passes[0], budget)))
    assert every(space) == [Recipe((Recipe.load("mue").passes[0], budget))]  # a budget that was given stays
