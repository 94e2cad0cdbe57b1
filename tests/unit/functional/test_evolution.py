"""Evolution finds what all genomes hold, keeps to what can be afforded, and to the order of genes."""

import itertools

import pytest

from martlet.functional.evolution import Genome, evolve

CHOICES = (4, 4, 4, 3)
WEIGHTS = (5, 3, 2, 7)


def loss(genome: Genome) -> float:
    return sum(weight * choice**2 for weight, choice in zip(WEIGHTS, genome, strict=True))


def affordable(genome: Genome) -> bool:
    return sum(genome) >= 6


def search(**settings: object) -> tuple[Genome, list[Genome]]:
    seen = list[Genome]()

    def counted(genome: Genome) -> float:
        seen.append(genome)
        return loss(genome)

    found = evolve(CHOICES, counted, affordable, cheapest=(3, 3, 3, 2), **settings)  # type: ignore[arg-type]
    assert found.loss == loss(found.genome) == min(map(loss, seen))
    return found.genome, seen


def test_it_finds_the_best_of_all() -> None:
    best = min((g for g in itertools.product(*map(range, CHOICES)) if affordable(g)), key=loss)
    genome, seen = search(population=30, parents=8, generations=30, mutation=0.3)
    assert loss(genome) == loss(best)
    assert len(seen) == len(set(seen))
    assert all(map(affordable, seen))
    assert search(population=30, parents=8, generations=30, mutation=0.3) == (genome, seen)
    assert search(population=30, parents=8, generations=30, mutation=0.3, seed=1)[1] != seen


def test_later_generations_do_better_than_the_first() -> None:
    first, last = (search(population=6, parents=3, generations=n)[0] for n in (1, 20))
    assert loss(last) < loss(first)


def test_ordered_genes_go_up() -> None:
    _, seen = search(population=10, parents=4, generations=4, ordered=[(0, 1, 2)])
    assert all(genome[0] <= genome[1] <= genome[2] for genome in seen)
    assert len(seen) > 5


def test_what_nobody_can_afford_is_refused() -> None:
    with pytest.raises(ValueError, match="no genome"):
        evolve((2, 2), loss, lambda _: False, cheapest=(1, 1))
