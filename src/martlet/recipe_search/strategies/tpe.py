"""Tree-structured Parzen estimators over several objectives: the default, for it learns from a few dozen candidates."""

from __future__ import annotations

from optuna.samplers import TPESampler

STARTUP = 12
"""Drawn at random first."""


def sampler(seed: int) -> TPESampler:
    """Bergstra et al., Algorithms for Hyper-Parameter Optimization, 2011; Ozaki et al., MOTPE, 2022."""
    return TPESampler(n_startup_trials=STARTUP, multivariate=True, group=True, seed=seed)
