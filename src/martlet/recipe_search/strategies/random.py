"""Every choice by chance: what the others have to beat."""

from __future__ import annotations

from optuna.samplers import RandomSampler


def sampler(seed: int) -> RandomSampler:
    return RandomSampler(seed=seed)
