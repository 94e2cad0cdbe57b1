"""Why this recipe: what each technique of the winner bought and cost, by leaving it out."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from martlet import engine as engines
from martlet.core import store
from martlet.core.errors import MartletError, UsageError
from martlet.core.facts import Fact
from martlet.core.recipe import Recipe
from martlet.core.technique import Progress, Technique, silent
from martlet.recipe_search.folder import Folder, read_job
from martlet.recipe_search.measure import FLOAT, Measure
from martlet.recipe_search.recipes import lost
from martlet.recipe_search.whole import supplied

if TYPE_CHECKING:
    from martlet.data.images import Images

WINNER = "winner"


@dataclass(frozen=True, kw_only=True)
class Without:
    """The winner without one technique, measured in one run with it, on images that nothing was searched on.

    values: as `Measure.final` says it, where drops and times are against the winner: a negative drop is what the
    technique cost, a longer time is what it bought. None if the model can't do without, and why says so.
    """

    technique: str
    recipe: Recipe
    values: dict[str, Any] | None
    why: str = ""


@dataclass(frozen=True, kw_only=True)
class Explanation:
    """recipe: the winner's. winner: its own values. without: of each technique, in the recipe's order."""

    recipe: Recipe
    winner: dict[str, Any]
    without: list[Without]

    def to_json(self) -> dict[str, Any]:
        return {
            "recipe": self.recipe.to_yaml(),
            "winner": self.winner,
            "without": [
                {"technique": w.technique, "recipe": w.recipe.to_yaml(), "values": w.values, "why": w.why or None}
                for w in self.without
            ],
        }


def explain(run: str | Path, *, trust_code: bool = False, progress: Progress = silent) -> Explanation:
    """Measures a search's winner and the same recipe without each of its techniques, in one interleaved run.

    run: the folder of a search. What was measured once is read again. trust_code: run the Python file that the model
    came from, if it came from one.

    Raises:
        MartletError: it is no search, it has no winner yet, or its images can't be opened again.
    """
    from martlet.data.calibration import Calibration
    from martlet.data.examples import Examples

    path = Path(run)
    job, folder = read_job(path), Folder(path)
    state = folder.get("state", "winner")
    if state is None:
        raise UsageError(f"{path} has no winner yet; the command that began the search goes on with it")
    recipe = Recipe.from_yaml(state["recipe"])
    known = folder.get("explained", recipe.digest())
    if known is None:
        images = _opened(path, job["images"])
        source = store.load(folder.candidates / FLOAT.digest()).model(trust_code=trust_code)
        source.name = job["model"]["name"]
        searched, held_out = images.split(job["images"]["searched"], job["seed"])
        pool = Calibration(
            searched, source.preprocess, n=job["images"]["searched"], seed=job["seed"], progress=progress
        )
        parts = [part for technique in recipe.passes if (part := technique.space())]
        training = None
        if any(part.trains for part in parts):
            training = Examples.read(_opened(path, job["training"]), source.preprocess, source.num_classes, progress)
        judging = any(part.follows for part in parts)
        supply, judged = supplied(pool, job["images"]["calibration"], judging, training, folder)
        target, threads = engines.get(job["engine"]["name"]), job["engine"]["threads"]
        measure = Measure(source, target, folder, supply, judged, threads, job["seed"], progress)
        shorter = {technique.name: without(recipe, technique, source.facts) for technique in recipe.passes}
        reasons = dict(_impossible(measure, shorter))
        possible = {name: one for name, one in shorter.items() if name not in reasons}
        known = {
            "values": measure.final({WINNER: recipe, **possible}, {}, held_out),
            "why": reasons,
            "recipes": {name: one.to_yaml() for name, one in shorter.items()},
        }
        folder.put("explained", recipe.digest(), known)
    values, reasons = known["values"], known["why"]
    return Explanation(
        recipe=recipe,
        winner=values[WINNER],
        without=[
            Without(technique=name, recipe=Recipe.from_yaml(yaml), values=values.get(name), why=reasons.get(name, ""))
            for name, yaml in known["recipes"].items()
        ],
    )


def without(recipe: Recipe, dropped: Technique, facts: frozenset[Fact]) -> Recipe:
    """The recipe without a technique, and without what follows from that alone. facts: of the untouched model."""
    left = [technique for technique in recipe.passes if technique is not dropped]
    broken = lost(facts, left)
    follows = {technique: part.follows for technique in left if (part := technique.space())}
    return Recipe(tuple(technique for technique in left if follows.get(technique) in {None, *broken}))


def _opened(path: Path, described: Mapping[str, Any]) -> Images:
    """
    Raises:
        UsageError: they were given from Python.
    """
    from martlet.data import open_images

    if described["opened"] is None:
        raise UsageError(f"{path} was searched on images from Python, which can't be opened again")
    return open_images(**described["opened"])


def _impossible(measure: Measure, recipes: dict[str, Recipe]) -> Iterator[tuple[str, str]]:
    for name, recipe in recipes.items():
        try:
            recipe.facts(measure.source.facts)
            measure.files(recipe)
        except MartletError as error:
            yield name, str(error)
