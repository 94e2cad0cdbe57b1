"""One change at a time: a choice of a candidate on the front so far is moved to a neighbouring value."""

from __future__ import annotations

from typing import Any

import numpy as np
from optuna.distributions import BaseDistribution, CategoricalDistribution, IntDistribution
from optuna.samplers import BaseSampler, RandomSampler
from optuna.study import Study
from optuna.trial import FrozenTrial

from martlet.recipe_search.strategies import Draw


class Greedy(BaseSampler):
    """Draws a member of the front, and changes one of its choices; what that opens is drawn at random."""

    def __init__(self, seed: int) -> None:
        self._rng = np.random.default_rng(seed)
        self._random = RandomSampler(seed=seed)

    def infer_relative_search_space(self, study: Study, trial: FrozenTrial) -> dict[str, BaseDistribution]:
        """The choices of the member that is changed, which all are made together."""
        best = study.best_trials
        self._parent = best[int(self._rng.integers(len(best)))] if best else None
        return dict(self._parent.distributions) if self._parent else {}

    def sample_relative(
        self, study: Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        if self._parent is None or not search_space:
            return {}
        params = {name: self._parent.params[name] for name in search_space}
        changed = sorted(params)[int(self._rng.integers(len(params)))]
        others = neighbours(search_space[changed], params[changed])
        if others:
            params[changed] = others[int(self._rng.integers(len(others)))]
        return params

    def sample_independent(
        self, study: Study, trial: FrozenTrial, param_name: str, param_distribution: BaseDistribution
    ) -> Any:
        return self._random.sample_independent(study, trial, param_name, param_distribution)


def neighbours(distribution: BaseDistribution, value: Any) -> list[Any]:
    """Of a number the next ones, of a name all others."""
    if isinstance(distribution, CategoricalDistribution):
        return [other for other in distribution.choices if other != value]
    assert isinstance(distribution, IntDistribution)
    return [other for other in (value - 1, value + 1) if distribution.low <= other <= distribution.high]


def sampler(seed: int, draw: Draw) -> Greedy:
    return Greedy(seed)
