"""Tree-structured Parzen estimators over several objectives: the default, for it learns from a few dozen candidates."""

from __future__ import annotations

import warnings
from typing import Any

from optuna.exceptions import ExperimentalWarning
from optuna.samplers import TPESampler

from martlet.recipe_search.strategies import Draw

STARTUP = 12
"""Drawn at random first."""


def sampler(seed: int, draw: Draw, **more: Any) -> TPESampler:
    """Bergstra et al., Algorithms for Hyper-Parameter Optimization, 2011; Ozaki et al., MOTPE, 2022.

    Choices that depend on each other are drawn together, in groups, as not every recipe has them all. more: of the
    sampler's own arguments.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ExperimentalWarning)  # of `group`
        return TPESampler(n_startup_trials=STARTUP, multivariate=True, group=True, seed=seed, **more)
