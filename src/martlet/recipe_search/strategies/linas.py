"""Evolution on predictions: light predictors learn from what was evaluated, and NSGA-II finds their front.

For spaces of many choices, each of which says a little of what comes of it: bits of each layer, sizes of each block.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import numpy as np
from optuna import create_study
from optuna.distributions import BaseDistribution
from optuna.samplers import BaseSampler, NSGAIISampler, RandomSampler
from optuna.study import Study, StudyDirection
from optuna.trial import FrozenTrial, TrialState
from scipy.stats import rankdata

from martlet.core.errors import UsageError
from martlet.functional import pareto
from martlet.recipe_search.strategies import Draw

try:
    from sklearn.linear_model import Ridge
    from sklearn.model_selection import GridSearchCV, KFold
    from sklearn.svm import SVR
except ModuleNotFoundError:  # told when the strategy is chosen, before any work
    raise UsageError("the strategy linas needs scikit-learn: pip install 'martlet[search]'") from None

STARTUP = 12
"""Drawn at random first."""
POPULATION, GENERATIONS = 16, 8
"""Of the evolution on predictions, which begins with the best of what was evaluated."""
ALPHAS = (0.3, 1.0, 3.0)
"""Of ridge regression."""
COSTS = (0.3, 3.0, 30.0)
"""Of support vectors."""
FOLDS = 4
"""In which the better of both is found."""

Choices = Mapping[str, Hashable]
"""A value for each choice that a candidate has, by name; not all have the same ones."""


class Linas(BaseSampler):
    """draw: makes all choices of a candidate, which it asks a trial for."""

    def __init__(self, seed: int, draw: Draw) -> None:
        self._seed, self._draw = seed, draw
        self._random = RandomSampler(seed=seed)
        self._params: dict[str, Any] = {}

    def infer_relative_search_space(self, study: Study, trial: FrozenTrial) -> dict[str, BaseDistribution]:
        """The choices of one member of the predicted front, which all are made together."""
        trials = study.get_trials(deepcopy=False)
        done = [t for t in trials if t.state is TrialState.COMPLETE]
        if len(done) < STARTUP:
            return {}
        seen = {tuple(sorted(t.params.items())) for t in trials if t.number != trial.number}
        fresh = [t for t in self._evolved(done) if tuple(sorted(t.params.items())) not in seen]
        if not fresh:
            return {}
        best = _front(fresh)
        chosen = best[int(np.random.default_rng(self._seed).integers(len(best)))]
        self._params = chosen.params
        return dict(chosen.distributions)

    def sample_relative(
        self, study: Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        return {name: self._params[name] for name in search_space}

    def sample_independent(
        self, study: Study, trial: FrozenTrial, param_name: str, param_distribution: BaseDistribution
    ) -> Any:
        return self._random.sample_independent(study, trial, param_name, param_distribution)

    def _evolved(self, done: list[FrozenTrial]) -> list[FrozenTrial]:
        """All that NSGA-II looks at, with what predictors say of it."""
        objectives = range(len(done[0].values))
        known = [trial.params for trial in done]
        predictors = [Predictor(known, [trial.values[i] for trial in done], self._seed) for i in objectives]
        inner = create_study(
            directions=[StudyDirection.MINIMIZE] * len(predictors),
            sampler=NSGAIISampler(population_size=POPULATION, seed=self._seed),
        )
        for start in _front(done)[:POPULATION]:
            inner.enqueue_trial(start.params)
        for _ in range(POPULATION * GENERATIONS):
            trial = inner.ask()
            self._draw(trial)
            inner.tell(trial, [float(predictor([trial.params])[0]) for predictor in predictors])
        return inner.get_trials(deepcopy=False)


def _front(trials: Sequence[FrozenTrial]) -> list[FrozenTrial]:
    """Those that no other beats."""
    members = pareto.front(np.array([trial.values for trial in trials]))
    return [trial for trial, member in zip(trials, members, strict=True) if member]


class Predictor:
    """Ridge regression or support vectors on one-hot choices, whichever ranks better what it wasn't fitted to.

    It predicts ranks, from 0 for the smallest value to 1: losses of candidates span decades, and what a search needs is
    their order.

    Source: Cummings et al., A Hardware-Aware System for Accelerating Deep Neural Network Optimization (LINAS), 2022,
    arXiv 2202.12954, by its official code, which predicts the values, scaled, and tries more settings of both.
    """

    def __init__(self, known: Sequence[Choices], values: Sequence[float], seed: int = 0) -> None:
        self._columns = {pair: i for i, pair in enumerate(sorted({p for c in known for p in c.items()}, key=repr))}
        rows, ranks = self._rows(known), (rankdata(values) - 1) / max(1, len(values) - 1)
        folds = KFold(min(FOLDS, len(values)), shuffle=True, random_state=seed)
        best = -np.inf
        for model, grid in ((Ridge(), {"alpha": ALPHAS}), (SVR(epsilon=0.0), {"C": COSTS})):
            search = GridSearchCV(model, grid, scoring="neg_mean_squared_error", cv=folds)
            search.fit(rows, ranks)
            if search.best_score_ > best:
                best, self._model = search.best_score_, search.best_estimator_

    def __call__(self, candidates: Sequence[Choices]) -> np.ndarray:
        """Where each will rank, (n): 0 is the smallest value known, 1 the largest."""
        return self._model.predict(self._rows(candidates))

    def _rows(self, candidates: Sequence[Choices]) -> np.ndarray:
        """(n, choices), 1 where a candidate has chosen so; a value that was never evaluated has no column."""
        rows = np.zeros((len(candidates), len(self._columns)))
        for row, candidate in zip(rows, candidates, strict=True):
            row[[self._columns[pair] for pair in candidate.items() if pair in self._columns]] = 1
        return rows


def sampler(seed: int, draw: Draw) -> Linas:
    """Cummings et al. (LINAS), 2022, arXiv 2202.12954, in which evaluations and evolution on predictions take turns.

    Sridhar et al., SimQ-NAS, 2023, arXiv 2312.13301, search sizes and bits together with it. Both evaluate a population
    between two evolutions; here each candidate is from an evolution of its own, which knows all evaluated before.
    """
    return Linas(seed, draw)
