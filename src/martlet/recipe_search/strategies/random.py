"""Every choice by chance: what the others have to beat."""

from __future__ import annotations

from optuna.samplers import RandomSampler

from martlet.recipe_search.strategies import Draw


def sampler(seed: int, draw: Draw) -> RandomSampler:
    return RandomSampler(seed=seed)
