"""Evolutionary search over a few choices, such as how much each layer is pruned, under a budget."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import NamedTuple

Genome = tuple[int, ...]
"""Of each gene, which of its choices."""

ATTEMPTS = 1000
"""So often a genome over the budget is drawn anew before an affordable parent is taken as it is."""


class Evolved(NamedTuple):
    genome: Genome
    loss: float


def evolve(
    choices: Sequence[int],
    loss: Callable[[Genome], float],
    affordable: Callable[[Genome], bool],
    *,
    cheapest: Genome,
    ordered: Sequence[Sequence[int]] = (),
    population: int = 100,
    parents: int = 25,
    generations: int = 10,
    mutation: float = 0.1,
    seed: int = 0,
) -> Evolved:
    """The genome of least loss that was seen, of those that can be afforded. No genome's loss is asked for twice.

    The first generation is random. Then the best `parents` of all have children: half of the next generation are copies
    of one in which each gene is drawn anew with probability `mutation`, half take each gene from either of two. What
    can't be afforded is drawn again.
    choices: how many each gene has. cheapest: a genome that can be afforded if any can; it is in the first generation.
    ordered: genes whose choices go up, such as those of one stage; each genome has them sorted.
    Source: Chen et al., SparseViT, 2023, arXiv 2303.17605, section 3; population, parents and mutation as in the
    official code, where the parents are the best of the last generation alone.

    Raises:
        ValueError: not even the cheapest genome can be afforded.
    """
    if not affordable(cheapest):
        raise ValueError("no genome can be afforded")
    rng = random.Random(seed)
    losses: dict[Genome, float] = {}

    def tidy(genes: Sequence[int]) -> Genome:
        genes = [*genes]
        for group in ordered:
            for gene, choice in zip(group, sorted(genes[gene] for gene in group), strict=True):
                genes[gene] = choice
        return tuple(genes)

    def drawn(draw: Callable[[], Sequence[int]], else_: Genome) -> Genome:
        for _ in range(ATTEMPTS):
            if affordable(genome := tidy(draw())):
                return genome
        return else_

    def anew() -> list[int]:
        return [rng.randrange(n) for n in choices]

    def mutated(genome: Genome) -> list[int]:
        return [new if rng.random() < mutation else old for old, new in zip(genome, anew(), strict=True)]

    def crossed(one: Genome, two: Genome) -> list[int]:
        return [rng.choice(pair) for pair in zip(one, two, strict=True)]

    living = [cheapest, *(drawn(anew, cheapest) for _ in range(population - 1))]
    for generation in range(generations):
        for genome in living:
            if genome not in losses:
                losses[genome] = loss(genome)
        if generation == generations - 1:
            break
        best = sorted(losses, key=losses.__getitem__)[:parents]
        living = []
        for i in range(population):
            one, two = rng.choice(best), rng.choice(best)
            living.append(drawn(lambda: mutated(one) if i % 2 else crossed(one, two), one))  # noqa: B023 - called here
    genome = min(losses, key=losses.__getitem__)
    return Evolved(genome, losses[genome])
