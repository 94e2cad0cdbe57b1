"""How the next recipes are chosen from those that were tried: one file a strategy, all on Optuna's ask and tell.

A strategy makes a sampler for one draw. It is made anew each time, from the seed and what is on record, so that a
search that was stopped goes on as if it hadn't been.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from martlet.core.errors import UsageError, nearest

if TYPE_CHECKING:
    from optuna.samplers import BaseSampler
    from optuna.trial import BaseTrial, FrozenTrial

STRATEGIES = ("tpe", "nsga2", "linas", "greedy", "constrained", "random")
OVER = "over"
"""Of a trial's user attributes: how far it is past each limit, as a share of it."""

Draw = Callable[["BaseTrial"], object]
"""Makes all choices of a candidate, by asking a trial for each."""
Sampler = Callable[[int, Draw], "BaseSampler"]
"""Takes a seed, and how candidates of the space are drawn."""


def get(name: str) -> Sampler:
    """Raises:
    UsageError: there is no such strategy.
    """
    if name not in STRATEGIES:
        raise UsageError(f"there is no strategy {name!r}{nearest(name, STRATEGIES)} (known: {', '.join(STRATEGIES)})")
    return importlib.import_module(f"martlet.recipe_search.strategies.{name}").sampler


def over(trial: FrozenTrial) -> Sequence[float]:
    """How far past each limit, for Optuna: 0 or less keeps it."""
    return trial.user_attrs.get(OVER, ())
