"""From a budget to the best artifact: recipes drawn, screened, measured on the engine, and proved on other images."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from math import inf
from pathlib import Path
from typing import TYPE_CHECKING, Any

from martlet.core import pipeline, store
from martlet.core.errors import MartletError
from martlet.core.recipe import Recipe
from martlet.core.technique import Progress
from martlet.recipe_search import peers
from martlet.recipe_search.folder import Folder
from martlet.recipe_search.fronts import Fronts
from martlet.recipe_search.limits import Limits, Values
from martlet.recipe_search.measure import FLOAT, Measure
from martlet.recipe_search.predict import Clock
from martlet.recipe_search.promising import promising
from martlet.recipe_search.recipes import Recipes, split, spread
from martlet.recipe_search.screen import Screen, reason
from martlet.recipe_search.space import front
from martlet.recipe_search.study import Study, objectives

if TYPE_CHECKING:
    from martlet.core.store import Artifact
    from martlet.data.calibration import Calibration
    from martlet.data.images import Images

COLLAPSED_PCT = 50.0
"""Of agreement: what keeps less isn't drawn again, where no drop is told."""
PROMOTED = 2
"""Of a batch and all before it, how many are compressed for good and measured on the engine."""
FINALISTS = 8
"""Of the front, how many are measured on images that no search has seen; the winner is one of them."""
FRONT_SHARE = 0.2
"""Of the time, at most, in which one front is found; what is found by then is drawn from."""
IDLE = 4
"""Batches without anything new, after which the space counts as known."""
PROOF_SECONDS = 60.0
"""Taken for the report of the winner, before it is known."""


Evaluate = Callable[[Sequence[str]], Iterable[tuple[int, dict[str, Any]]]]


@dataclass
class Journey:
    """One search, step by step; every step skips what the folder has on record.

    held_out: images that nothing else sees. minutes, candidates: what ends it, whichever is first; None is no end.
    evaluate: screens recipes given as YAML, and gives for each its place and its values, or why there are none.
    """

    folder: Folder
    limits: Limits
    recipes: Recipes
    study: Study
    screen: Screen
    measure: Measure
    held_out: Images
    calibration: Calibration
    minutes: float | None
    candidates: int | None
    peers: Mapping[str, Path]
    evaluate: Evaluate
    progress: Progress
    command: str | None
    noted: Callable[[Journey], object]
    """Called when something new is on record."""
    left_out: dict[str, str] = field(default_factory=dict)
    """Peers that there are none of, and why."""
    started: float = field(default_factory=time.monotonic)

    # ---- time

    def __post_init__(self) -> None:
        self._before = (self.folder.get("state", "time") or {}).get("seconds", 0.0)

    @property
    def seconds(self) -> float:
        """Spent so far, earlier runs included."""
        return self._before + time.monotonic() - self.started

    @property
    def left(self) -> float:
        """Seconds until the winner's proof has to begin."""
        if self.minutes is None:
            return inf
        n = len(self.references) + FINALISTS + len(self.peers)
        ms = max((entry["latency_ms"] for entry in self.measured.values()), default=0.0)
        proof = PROOF_SECONDS + n * 8 + (n + 2) * len(self.held_out) * ms / 1000
        return 60 * self.minutes - min(proof, 0.5 * 60 * self.minutes) - self.seconds

    def note(self) -> None:
        self.folder.put("state", "time", {"seconds": round(self.seconds, 1)})
        self.noted(self)

    # ---- what is known

    @cached_property
    def references(self) -> dict[str, Recipe]:
        """What everybody could have without a search, by what is said of it; the untouched model first."""
        from martlet.core import registry

        known = {"untouched": FLOAT}
        if "bf16" in self.measure.engine.alternatives():
            known["untouched, in bf16"] = Recipe((registry.technique("bf16")(),))
        known["int8"] = Recipe.load("int8")
        return {said: recipe for said, recipe in known.items() if self._possible(recipe)}

    @property
    def measured(self) -> dict[str, dict[str, Any]]:
        """By digest, what the engine made of recipes."""
        return dict(self.folder.all("measured"))

    def screened(self) -> dict[str, dict[str, Any]]:
        """By digest, what screening says of drawn recipes, with `recipe` and the predicted `latency_ms`."""
        clock, found = self.clock(), {}
        for number, recipe in self.study.drawn():
            entry = self._screened(recipe)
            if entry is not None and "why" not in entry:
                found[recipe.digest()] = {"trial": number, "recipe": recipe.to_yaml(), **self._predicted(entry, clock)}
        return found

    def lost(self) -> list[dict[str, Any]]:
        """Draws of which nothing came, and why; and what processes that were lost had spent on others."""
        found = []
        for number, recipe in self.study.drawn():
            entry = self._screened(recipe) or {}
            found += [
                {"id": number, "why": f"{why}; it was begun again", "seconds": seconds}
                for seconds, why in entry.get("lost", [])
            ]
            if "why" in entry:
                found.append({"id": number, "why": entry["why"], "seconds": entry["seconds"]})
        return found

    def clock(self) -> Clock:
        return Clock((entry, entry["latency_ms"]) for entry in self.measured.values())

    def candidates_measured(self) -> list[dict[str, Any]]:
        """What a winner can be: all that was measured but the untouched model."""
        return [entry for digest, entry in self.measured.items() if digest != FLOAT.digest()]

    # ---- the steps

    def run(self) -> None:
        """All of them.

        Raises:
            MartletError: the references can't be measured.
        """
        self._measure(list(self.references.values()))
        self.prepare_peers()
        self.find_fronts()
        self.search()
        self.finish()

    def prepare_peers(self) -> None:
        """What others make of the model, besides the peers that were given."""
        m = self.measure
        self.progress("quantize with NNCF", 0, 1)
        made, self.left_out = peers.prepare(m.source, m.engine, m.supply.calibration, self.folder.path / "peers")
        self.peers = made | {**self.peers}
        self.note()

    def find_fronts(self) -> None:
        """What techniques have to be measured for before their settings can be drawn; then one of each on the engine,
        which tells what less work gains there."""
        measured, fronts = set[str](), Fronts(self.folder, self.limits, self.recipes, self.screen, self.measure)
        for name, part in self.recipes.parts.items():
            kind = part.choices.front
            if kind is None or self._beaten(name):
                continue
            stands_for_all = kind.basis if kind.basis in self.recipes.parts else None
            first = next(n for n, p in self.recipes.parts.items() if p.choices.front is kind)
            stands = stands_for_all or first
            found = fronts.find(stands, FRONT_SHARE * 60 * self.minutes if self.minutes else inf, self.progress)
            if front := found if name == stands else [s for s in found if fronts.takes(part.technique, s)]:
                self.recipes.fronts[name] = front
                measured.add(stands)
            self.note()
        starts = [self.recipes.alone(start) for start in self.recipes.starts()]
        self._measure([recipe for names, recipe in starts if len(names) == 1 and names <= measured])

    def _beaten(self, name: str) -> bool:
        """Whether a technique makes nothing better: each reference that has it is beaten by one that hasn't."""
        axes = ("latency_ms", "kl", *(["file_bytes"] if self.limits.size_mb is not None else []))
        rows = {recipe: [self.measured[recipe.digest()][axis] for axis in axes] for recipe in self.references.values()}
        ours = {recipe for recipe in rows if any(t.name == name for t in recipe.passes)}
        return bool(ours) and all(
            any(all(a <= b for a, b in zip(rows[other], rows[our], strict=True)) for other in rows.keys() - ours)
            for our in ours
        )

    def out(self) -> frozenset[str]:
        """Techniques that aren't drawn again: alone they can't be, lose far more than is allowed, or gain nothing.

        Where no drop is told, far is where most answers are others than the untouched model's.
        """
        starts = [self.recipes.alone(start) for start in self.recipes.starts()]
        base = next((self._screened(recipe) for names, recipe in starts if not names), None)
        if base is None or "why" in base:
            return frozenset()
        clock, passed, seen = self.clock(), set[str](), set[str]()
        axes = ("latency_ms", "kl", *(["file_bytes"] if self.limits.size_mb is not None else []))
        plain = self._predicted(base, clock)
        for names, recipe in starts:
            entry = self._screened(recipe)
            if entry is None or not names:
                continue
            seen |= names
            if "why" in entry:
                continue
            values, most = self._predicted(entry, clock), self.limits.max_drop
            if all(values[axis] >= plain[axis] for axis in axes):
                continue
            if values["agreement_pct"] >= COLLAPSED_PCT if most is None else values["drop_pct"] <= self.limits.far:
                passed |= names
        return frozenset(seen - passed)

    def search(self) -> None:
        """Batches are drawn, screened and told; after each, the most promising are measured on the engine."""
        idle = 0
        while self.left > 0 and idle < IDLE:
            done = self.study.finished()
            if done and self.folder.get("rounds", str(done - 1)) is None:
                self.promote(done - 1)
            if self.candidates is not None and sum(1 for _ in self.study.drawn()) >= self.candidates:
                break
            batch = self.study.batch(self.out())
            fresh = self._screen([recipe for _, recipe in batch if recipe is not None])
            if fresh is None:
                break
            idle = 0 if fresh else idle + 1
            clock = self.clock()
            for number, recipe in batch:
                entry = None if recipe is None else self._screened(recipe)
                if entry is None or "why" in entry:
                    self.study.tell(number, None)
                    continue
                values = self._predicted(entry, clock)
                self.study.tell(number, objectives(values, self.limits.size_mb is not None), self.limits.over(values))
            self.note()
        done = self.study.finished()
        if done and self.left > 0 and self.folder.get("rounds", str(done - 1)) is None:
            self.promote(done - 1)

    def promote(self, number: int) -> None:
        """Measures the most promising that aren't yet: the best by prediction, and where the front is least known."""
        screened = self.screened()
        fresh = [entry for digest, entry in screened.items() if digest not in self.measured]
        chosen = promising(fresh, list(self.measured.values()), self.limits, PROMOTED)
        self._measure([Recipe.from_yaml(entry["recipe"]) for entry in chosen])
        self.folder.put("rounds", str(number), {"promoted": [entry["recipe"] for entry in chosen]})
        self.note()

    def leading(self) -> Values:
        """The best that was measured within the limits, else the nearest to them."""
        return self._best(self.candidates_measured())

    def chosen(self) -> Values:
        """The leading one; once the finalists were timed side by side, the best of them by those times.

        What they lose is still what was seen in the search, so that no test image chooses.
        """
        final = self.final()
        timed = [
            {**point, "latency_ms": final[digest]["latency_ms"]}
            for digest, point in self.measured.items()
            if digest in final and digest != FLOAT.digest()
        ]
        return self._best(timed) if timed else self.leading()

    def _best(self, points: Sequence[Values]) -> Values:
        return self.limits.best(points) or self.limits.nearest(points)

    def finalists(self) -> dict[str, Recipe]:
        """By digest, what is measured on held-out images: the references, the winner, and more of the front.

        Of points lost, which budgets are of: by divergence, float32 would stand beside bfloat16 that is twice as fast.
        """
        points = self.candidates_measured()
        first = self.leading()
        best = [
            p
            for p in front(points, lambda v: v["latency_ms"], lambda v: v["drop_pct"])
            if p["recipe"] != first["recipe"]
        ]
        kept = spread((p for p in best if self.limits.keeps(p)), FINALISTS - 1)
        past = [p for p in best if not self.limits.keeps(p)]
        wanted = [first, *kept, *sorted(past, key=self.limits.excess)[: FINALISTS - 1 - len(kept)]]
        recipes = [*self.references.values(), *(Recipe.from_yaml(point["recipe"]) for point in wanted)]
        return {recipe.digest(): recipe for recipe in recipes if recipe.digest() in self.measured}

    def final(self) -> dict[str, dict[str, Any]]:
        """By digest, what the finalists are on held-out images; empty until they are measured."""
        return self.folder.get("final", self._final_key) or {}

    def finish(self) -> Artifact:
        """The finalists on images that no search has seen, and the winner as an artifact with a report."""
        if not self.final():
            found = self.measure.final(self.finalists(), self.peers, self.held_out)
            self.folder.put("final", self._final_key, found)
        recipe = Recipe.from_yaml(self.chosen()["recipe"])
        state = {"recipe": recipe.to_yaml(), "proved": True}
        if self.folder.get("state", "winner") != state:
            self._prove(recipe)
            self.folder.put("state", "winner", state)
        self.note()
        return store.load(self.folder.winner)

    # ---- inside

    @property
    def _final_key(self) -> str:
        text = "\n".join([*self.finalists(), *(f"{name}={path}" for name, path in self.peers.items())])
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def _possible(self, recipe: Recipe) -> bool:
        try:
            recipe.facts(self.measure.source.facts)
            self.measure.files(recipe)
        except MartletError:
            return False
        return True

    def _screened(self, recipe: Recipe) -> dict[str, Any] | None:
        entry = self.folder.get("screened", split(recipe)[0].digest())
        return None if entry is None else {**entry, "precision": self.measure.precision(recipe)}

    def _predicted(self, entry: dict[str, Any], clock: Clock) -> dict[str, Any]:
        per_weight = self.measured[FLOAT.digest()]["file_bytes"] / self._float_weight_bytes
        return {
            **entry,
            "latency_ms": clock.latency_ms(entry),
            "file_bytes": round(entry["weight_bytes"] * per_weight),
        }

    @cached_property
    def _float_weight_bytes(self) -> int:
        from martlet.measure import size

        return size.weight_bytes(self.measure.source.module)

    def _screen(self, recipes: Sequence[Recipe]) -> int | None:
        """Screens those that aren't yet. How many those were; None if time ran out before all were done."""
        wanted = {r.digest(): r for r in (split(recipe)[0] for recipe in recipes)}
        wanted = {d: r for d, r in wanted.items() if self.folder.get("screened", d) is None}
        digests = list(wanted)
        for i, entry in self.evaluate([recipe.to_yaml() for recipe in wanted.values()]):
            self.folder.put("screened", digests[i], entry)
            self.note()
            if self.left <= 0:
                return None
        return len(wanted)

    def _measure(self, recipes: Sequence[Recipe]) -> None:
        """On the engine, those that aren't yet, in turns with the untouched model; and makes the best the winner."""
        measured = self.measured
        fresh = []
        for recipe in recipes:
            if recipe.digest() in measured:
                continue
            try:
                self.measure.files(recipe)
            except Exception as error:  # noqa: BLE001 - as in screening
                self.folder.put("screened", split(recipe)[0].digest(), {"why": reason(error), "seconds": 0.0})
                continue
            fresh.append(recipe)
        if fresh:
            for digest, entry in self.measure.measure(fresh).items():
                self.folder.put("measured", digest, entry)
        winner = self.folder.get("state", "winner")
        if self.candidates_measured() and (
            fresh or winner is None
        ):  # what was proved stays where a search only goes on
            recipe = self.chosen()["recipe"]
            if (winner or {}).get("recipe") != recipe:
                with store.writing(self.folder.winner, overwrite=True) as folder:
                    self.measure.artifact(Recipe.from_yaml(recipe), folder)
                self.folder.put("state", "winner", {"recipe": recipe, "proved": False})
        self.note()

    def _prove(self, recipe: Recipe) -> None:
        """Writes the winner with its report, measured against the untouched model on held-out images."""
        from martlet.job import prove
        from martlet.proof import Clock as Stages
        from martlet.proof import Duel

        m, plain = self.measure, self.measure.files(FLOAT)
        compressed = m.model(recipe)
        with store.writing(self.folder.winner, overwrite=True) as folder:
            m.artifact(recipe, folder)
            files, plain_files = (store.load(path).manifest["engine_files"] for path in (folder, plain))
            graphs = {"baseline": pipeline.traced(m.source), "artifact": pipeline.traced(compressed)}
            both = m.engine, m.source, compressed, graphs
            duel = Duel(*both, plain, folder, plain_files, files, m.threads, m.seed, self.progress)
            prove(duel, self.held_out, self.calibration, Stages(), self.limits.max_drop, self.command)
