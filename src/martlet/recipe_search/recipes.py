"""The space of whole recipes: which techniques, in which order, with which settings.

Each technique declares its own part (`Technique.space`). Which can stand together, and in what order, follows from
facts: of two that each break what the other needs, a recipe has one at most.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from graphlib import TopologicalSorter
from typing import TYPE_CHECKING, Any, NamedTuple

from martlet.core import registry
from martlet.core.errors import MartletError, RecipeError, UsageError
from martlet.core.facts import ALL_FACTS
from martlet.core.recipe import Recipe
from martlet.core.technique import Choices, Context, Stage, Technique

if TYPE_CHECKING:
    from optuna.trial import BaseTrial

    from martlet.core.facts import Fact

NOTHING = "none"
STAGES = [*Stage]


class Part(NamedTuple):
    """A technique and what may be drawn for it."""

    technique: Technique
    choices: Choices


@dataclass
class Recipes:
    """What candidates are drawn from.

    parts: in an order that facts allow. groups: names of techniques of which a recipe has one at most; those that
    follow from others are in none. facts: what holds of the untouched model.
    fronts: by technique, settings found by measuring, of which each candidate gets one; the fastest first.
    """

    parts: dict[str, Part]
    groups: list[tuple[str, ...]]
    facts: frozenset[Fact] = ALL_FACTS
    fronts: dict[str, list[dict[str, Any]]] = field(default_factory=dict)

    @classmethod
    def of(cls, facts: frozenset[Fact], context: Context, only: Recipe | None = None) -> Recipes:
        """All registered techniques that declare a part and that the model and the engine can take.

        only: of these alone, with the settings given there but for those that can be drawn.

        Raises:
            UsageError: nothing can be drawn, or there is nothing that one of `only` can be trained on.
        """
        techniques = only.passes if only else [registry.technique(name)() for name in registry.entries()]
        parts = {}
        for technique in techniques:
            choices = technique.space() or (Choices(always=True) if only else None)
            if choices is None or not technique.requires <= facts:
                continue
            if choices.trains and context.training is None:
                if only:
                    raise UsageError(f"{technique.name} is trained for each recipe; give images to train on (--train)")
                continue
            try:
                technique.check_engine(context)
            except MartletError:
                continue
            parts[technique.name] = Part(technique, choices)
        broken = lost(facts, (part.technique for part in parts.values()))
        parts = {name: part for name, part in parts.items() if part.choices.follows in {None, *broken}}
        ordered = {name: parts[name] for name in _order(parts.values())}
        chosen = [part.technique for part in ordered.values() if part.choices.follows is None]
        found = cls(ordered, _groups(chosen), facts)
        if all(part.choices.always for part in ordered.values()):
            raise UsageError(
                f"a search needs something to choose, such as int8 or tokens; {only or 'this model'} has nothing"
            )
        return found

    def draw(self, trial: BaseTrial) -> Recipe:
        """One recipe, by a trial's suggestions; whether it is legal, `Recipe.facts` says."""
        chosen: dict[str, Technique] = {}
        for group in self.groups:
            options = self._options(group)
            name = options[0] if len(options) == 1 else trial.suggest_categorical("/".join(group), options)
            if name != NOTHING:
                chosen[name] = self._set(self.parts[name], trial)
        for name in self.following(chosen.values()):
            chosen[name] = self._set(self.parts[name], trial)
        return Recipe(tuple(chosen[name] for name in self.parts if name in chosen))

    @property
    def follow(self) -> list[str]:
        """What follows from others, if they are drawn."""
        return [name for name, part in self.parts.items() if part.choices.follows]

    def following(self, chosen: Iterable[Technique]) -> list[str]:
        """What follows from these."""
        broken = lost(self.facts, chosen)
        return [name for name, part in self.parts.items() if part.choices.follows in broken]

    def _options(self, group: tuple[str, ...]) -> Sequence[str]:
        """What a recipe can have of a group."""
        return [name for name in group if self.parts[name].choices.always] or [NOTHING, *group]

    def _set(self, part: Part, trial: BaseTrial) -> Technique:
        name, settings = part.technique.name, {}
        for key, values in part.choices.settings.items():
            texts = [json.dumps(value) for value in values]
            text = texts[0] if len(texts) == 1 else trial.suggest_categorical(f"{name}.{key}", texts)
            settings[key] = values[texts.index(text)]
        if front := self.fronts.get(name):
            i = 0 if len(front) == 1 else trial.suggest_int(f"{name} front", 0, len(front) - 1)
            settings |= front[i]
        return replace(part.technique, **settings)

    def starts(self) -> list[dict[str, Any]]:
        """Suggestions to begin with, from which a sampler learns what each technique does.

        Each technique alone, with the first of its values and the middle of its front, in what the engine can be told
        besides; and what only is there or isn't, also without that. What has no front is tried before what has one, and
        what has many values last.
        """
        nothing = {"/".join(group): NOTHING for group in self.groups if self._options(group)[0] == NOTHING}
        engine = {
            key: group[0]
            for key, group in zip(map("/".join, self.groups), self.groups, strict=True)
            if key in nothing and self.parts[group[0]].technique.stage is Stage.ENGINE
        }
        always = [part.technique for part in self.parts.values() if part.choices.always]
        found = [nothing | engine | self._first(*self.following(always))] if engine else []
        plain = []
        for group in self.groups:
            for name in group if (key := "/".join(group)) in nothing and key not in engine else ():
                part, front = self.parts[name], self.fronts.get(name, [])
                alone = nothing | {key: name} | self._first(name, *self.following([*always, part.technique]))
                alone |= {f"{name} front": len(front) // 2} if front else {}
                plain.append((bool(part.choices.settings) + bool(front), alone))
        for rank, alone in sorted(plain, key=lambda pair: pair[0]):
            found += [alone, alone | engine] if engine and not rank else [alone | engine]
        return found

    def alone(self, start: dict[str, Any]) -> tuple[frozenset[str], Recipe]:
        """A start's recipe, and the techniques in it that aren't always there and don't just tell the engine."""
        from optuna.trial import FixedTrial

        recipe = self.draw(FixedTrial(start))
        by_itself = {name for name, part in self.parts.items() if part.choices.always or part.choices.follows}
        chosen = [t.name for t in recipe.passes if t.name not in by_itself and t.stage is not Stage.ENGINE]
        return frozenset(chosen), recipe

    def _first(self, *names: str) -> dict[str, Any]:
        """Suggestions of the first of their values."""
        each = ((name, self.parts[name].choices.settings) for name in names)
        return {f"{name}.{key}": json.dumps(values[0]) for name, settings in each for key, values in settings.items()}

    def without(self, names: frozenset[str]) -> dict[str, Any]:
        """Suggestions that leave out each group of which all are among these."""
        return {"/".join(group): NOTHING for group in self.groups if names.issuperset(group)}

    def plain(self, *names: str) -> Recipe:
        """Those techniques and what is always there, each with the settings of its class; in order."""
        wanted = {*names} | {name for name, part in self.parts.items() if part.choices.always}
        return Recipe(tuple(part.technique for name, part in self.parts.items() if name in wanted))


def lost(facts: frozenset[Fact], techniques: Iterable[Technique]) -> frozenset[Fact]:
    """The facts that don't hold any more after all of these, in any order. facts: what holds before."""
    return (ALL_FACTS - facts).union(*(technique.breaks for technique in techniques))


def split(recipe: Recipe) -> tuple[Recipe, Recipe]:
    """What makes the files, and what tells the engine how to run them."""
    engine = tuple(t for t in recipe.passes if t.stage is Stage.ENGINE)
    return Recipe(tuple(t for t in recipe.passes if t.stage is not Stage.ENGINE)), Recipe(engine)


def _legal(*passes: Technique) -> bool:
    try:
        Recipe(passes).facts()
    except RecipeError:
        return False
    return True


def _order(parts: Iterable[Part]) -> list[str]:
    """Names, so that each stands before what it needs to stand before; else by stage, then as they came.

    What follows from others comes after all of its stage.
    """
    ranked = sorted(parts, key=lambda part: STAGES.index(part.technique.stage))
    sorter = TopologicalSorter[str]({part.technique.name: () for part in ranked})
    for a in ranked:
        for b in ranked:
            first, then = a.technique, b.technique
            last = b.choices.follows and not a.choices.follows and first.stage is not Stage.ENGINE
            if a is not b and (last or (_legal(first, then) and not _legal(then, first))):
                sorter.add(then.name, first.name)
    return list(sorter.static_order())


def _groups(techniques: Sequence[Technique]) -> list[tuple[str, ...]]:
    """Techniques of which no two can stand together, in either order; greedily, as many in a group as fit."""
    groups: list[list[Technique]] = []
    for technique in techniques:
        for group in groups:
            if all(not _legal(a, technique) and not _legal(technique, a) for a in group):
                group.append(technique)
                break
        else:
            groups.append([technique])
    return [tuple(t.name for t in group) for group in groups]


def spread(values: Iterable[Any], n: int) -> list[Any]:
    """At most n of them, evenly, the first and the last among them."""
    found = list(values)
    if len(found) <= n:
        return found
    return [found[round(i * (len(found) - 1) / (n - 1))] for i in range(n)]
