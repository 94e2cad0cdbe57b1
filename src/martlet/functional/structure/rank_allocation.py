"""Which rank each product gets, so that together they lose least within a budget."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from typing import TypeVar

from martlet.functional.allocation import Choice, allocate_exactly

Key = TypeVar("Key", bound=Hashable)
MAX_LEVELS = 16
"""Of the ranks of one product; more take longer and gain nothing that their losses could tell apart."""


def levels(largest: int, multiple: int) -> list[int]:
    """Multiples of `multiple` up to `largest`, MAX_LEVELS at most, evenly spaced; the largest of them is one."""
    count = largest // multiple
    step = -(-count // MAX_LEVELS) or 1
    return [multiple * i for i in range(count, 0, -step)][::-1]


def breakeven(outputs: int, inputs: int) -> int:
    """The largest rank at which two factors have fewer weights than the one matrix (O, I)."""
    return (outputs * inputs - 1) // (outputs + inputs)


def least_loss(products: Mapping[Key, Mapping[int, Choice]], budget: float) -> dict[Key, int]:
    """Of each product the rank, so that losses add up to the least and uses to no more than the budget.

    Raises:
        ValueError: not even the cheapest ranks fit.
    """
    ranks = {key: list(choices) for key, choices in products.items()}
    picked = allocate_exactly([[*choices.values()] for choices in products.values()], [budget])
    return {key: ranks[key][i] for key, i in zip(products, picked, strict=True)}


def same_share(products: Mapping[Key, Mapping[int, Choice]], budget: float) -> dict[Key, int]:
    """Of each product the same share of its largest rank, rounded down: the largest share that fits.

    Raises:
        ValueError: not even the cheapest ranks fit.
    """
    shares = sorted({rank / max(choices) for choices in products.values() for rank in choices}, reverse=True)
    for share in shares:
        found = {
            key: max((rank for rank in choices if rank <= share * max(choices)), default=min(choices))
            for key, choices in products.items()
        }
        if sum(products[key][rank].uses[0] for key, rank in found.items()) <= budget * (1 + 1e-9):
            return found
    raise ValueError("no choice of settings fits the budgets")
