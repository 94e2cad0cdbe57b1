"""Settings that can be drawn only once they were measured for: the front of a technique's own space."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from martlet.core.errors import MartletError
from martlet.core.technique import Progress, Technique
from martlet.data.calibration import First
from martlet.recipe_search.folder import Folder
from martlet.recipe_search.limits import Limits
from martlet.recipe_search.measure import Measure
from martlet.recipe_search.recipes import Recipes, spread
from martlet.recipe_search.record import Record
from martlet.recipe_search.screen import Screen

FRONT = 12
"""Values of a front that are drawn from."""
JUDGED = 64
"""Images that a front is judged on, at most."""


class OutOfTime(Exception):
    """Raised by a progress, to leave work that takes too long."""


@dataclass(frozen=True)
class Fronts:
    """Finds them, each once: what is on record isn't measured again."""

    folder: Folder
    limits: Limits
    recipes: Recipes
    screen: Screen
    measure: Measure

    def find(self, name: str, seconds: float, progress: Progress) -> list[dict[str, Any]]:
        """Settings of a technique on the front of its space, the fastest first; none if the model can't take it.

        seconds: at most, in which it is found; what is found by then is the front.
        """
        recipe = self.recipes.plain(name, "bf16")
        position = next(i for i, technique in enumerate(recipe.passes) if technique.name == name)
        kind = self.recipes.parts[name].choices.front
        assert kind is not None
        record = Record(self.folder.path / "fronts" / f"{name}.json", self.folder.get("fronts", name) or {})
        if "front" in record.data:
            return record.data["front"] or []
        m, until = self.measure, time.monotonic() + seconds

        def timed(what: str, done: int, total: int) -> None:
            if time.monotonic() > until:
                raise OutOfTime
            progress(what, done, total)

        calibration = self.screen.supply.calibration
        space = kind(
            m.source, recipe, position, m.engine, First(m.pool, JUDGED), calibration, m.threads, m.seed, timed, record
        )
        try:
            space.time()
            space.judge()
        except OutOfTime:
            record.data["why"] = "there was no time for more"
        except MartletError as error:
            record.data["why"] = str(error)
        own, found = recipe.passes[position], []
        fastest = space.front() if space.losses else []
        near = [chosen for chosen in fastest if space.loss(chosen).drop_pct <= self.limits.far]
        for chosen in spread(near or fastest, FRONT):
            passes = space.candidate(chosen).passes
            technique = passes[position] if position < len(passes) else None
            if technique is not None and technique.name == own.name:
                found.append({k: v for k, v in technique.settings().items() if v != own.settings().get(k)})
        record.data["front"] = found or None
        record.save()
        return found

    def takes(self, technique: Technique, settings: Mapping[str, Any]) -> bool:
        """Whether settings that were found for another technique are possible for this one."""
        try:
            replace(technique, **settings).check(self.measure.source)
        except MartletError:
            return False
        return True
