"""As `tpe`, held to the budget: what is past a limit counts as worse than all that keep it.

For a budget that leaves little room, such as a latency near the least there is. The front is then explored inside the
budget only.
"""

from __future__ import annotations

from optuna.samplers import TPESampler

from martlet.recipe_search.strategies import Draw, over, tpe


def sampler(seed: int, draw: Draw) -> TPESampler:
    """Gardner et al., Bayesian Optimization with Inequality Constraints, 2014, for Parzen estimators."""
    return tpe.sampler(seed, draw, constraints_func=over)
