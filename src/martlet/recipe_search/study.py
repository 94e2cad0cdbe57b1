"""Optuna's study in the search's folder: candidates are drawn and told in batches, and none twice in vain."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from martlet.core.errors import ArtifactError, RecipeError
from martlet.core.recipe import Recipe
from martlet.recipe_search.recipes import Recipes
from martlet.recipe_search.strategies import OVER, Sampler

if TYPE_CHECKING:
    from optuna import Study as OptunaStudy
    from optuna.samplers import BaseSampler
    from optuna.trial import FrozenTrial

    from martlet.core.facts import Fact

BATCH = 8
"""Candidates drawn before any of them is told: as many, however many workers there are."""


@dataclass
class Study:
    """facts: what holds of the untouched model."""

    study: OptunaStudy
    recipes: Recipes
    sampler: Sampler
    seed: int
    facts: frozenset[Fact]

    @classmethod
    def open(
        cls, path: Path, objectives: int, recipes: Recipes, sampler: Sampler, seed: int, facts: frozenset[Fact]
    ) -> Study:
        """Raises:
        ArtifactError: the file is no study.
        """
        import optuna

        optuna.logging.set_verbosity(optuna.logging.ERROR)
        try:
            study = optuna.create_study(
                storage=f"sqlite:///{path.resolve()}",
                study_name="martlet",
                directions=[optuna.study.StudyDirection.MINIMIZE] * objectives,
                load_if_exists=True,
            )
        except Exception as error:
            raise ArtifactError(f"{path} is damaged ({type(error).__name__}); delete it to draw anew") from error
        return cls(study, recipes, sampler, seed, facts)

    def batch(self, out: frozenset[str] = frozenset()) -> list[tuple[int, Recipe | None]]:
        """The numbers and recipes of a batch that isn't told yet; None for a draw that facts or `out` forbid.

        out: techniques that no draw has any more, but those that were set.
        What is left of a batch that was stopped is finished first.
        """
        from optuna.trial import Trial

        trials = self.study.get_trials(deepcopy=False)
        if trials and not trials[-1].state.is_finished():  # it may have been stopped in the middle of its draw
            self.study.sampler = self._sampler(trials[-1].number, out)
            self.recipes.draw(Trial(self.study, trials[-1]._trial_id))
        while not trials or len(trials) % BATCH or trials[-1].state.is_finished():
            self.study.sampler = self._sampler(len(trials), out)
            trial = self.study.ask()
            self.recipes.draw(trial)
            trials = self.study.get_trials(deepcopy=False)
            if len(trials) % BATCH == 0:
                break
        pending = [(t.number, self.recipe(t)) for t in trials if not t.state.is_finished()]
        starts = len(self.recipes.starts())
        return [
            (
                number,
                None if number >= starts and recipe and out.intersection(t.name for t in recipe.passes) else recipe,
            )
            for number, recipe in pending
        ]

    def _sampler(self, number: int, out: frozenset[str]) -> BaseSampler:
        """Of the draw of this number; the first ones are set."""
        from optuna.exceptions import ExperimentalWarning
        from optuna.samplers import PartialFixedSampler

        sampler, starts = self.sampler(self.seed + number, self.recipes.draw), self.recipes.starts()
        fixed = starts[number] if number < len(starts) else self.recipes.without(out) if out else {}
        if not fixed:
            return sampler
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ExperimentalWarning)
            return PartialFixedSampler(fixed, sampler)

    def tell(self, number: int, values: Sequence[float] | None, over: Mapping[str, float] | None = None) -> None:
        """None for what couldn't be evaluated."""
        from optuna.trial import Trial, TrialState

        if values is None:
            self.study.tell(number, state=TrialState.FAIL)
            return
        trial_id = self.study.get_trials(deepcopy=False)[number]._trial_id
        Trial(self.study, trial_id).set_user_attr(OVER, list((over or {}).values()))
        self.study.tell(number, list(values))

    def drawn(self) -> Iterator[tuple[int, Recipe]]:
        """All legal recipes that were drawn, each once, with the number of its first draw."""
        seen = set[str]()
        for trial in self.study.get_trials(deepcopy=False):
            recipe = self.recipe(trial)
            if recipe is not None and recipe.digest() not in seen:
                seen.add(recipe.digest())
                yield trial.number, recipe

    def finished(self) -> int:
        """How many batches are told."""
        return sum(t.state.is_finished() for t in self.study.get_trials(deepcopy=False)) // BATCH

    def recipe(self, trial: FrozenTrial) -> Recipe | None:
        """What a trial stands for; None if facts forbid it."""
        from optuna.trial import FixedTrial

        recipe = self.recipes.draw(FixedTrial(trial.params))
        try:
            recipe.facts(self.facts)
        except RecipeError:
            return None
        return recipe


def objectives(values: Mapping[str, Any], size: bool) -> tuple[float, ...]:
    """What is to be small: the loss, the time, and the file if there is a limit to it."""
    return (values["kl"], values["latency_ms"], *([values["file_bytes"]] if size else []))
