"""Evolution: parents from the front and the least crowded places behind it, their settings crossed and changed.

For long searches, of hundreds of candidates.
"""

from __future__ import annotations

from optuna.samplers import NSGAIISampler

from martlet.recipe_search.strategies import Draw

POPULATION = 16


def sampler(seed: int, draw: Draw) -> NSGAIISampler:
    """Deb et al., A Fast and Elitist Multiobjective Genetic Algorithm: NSGA-II, 2002."""
    return NSGAIISampler(population_size=POPULATION, seed=seed)
