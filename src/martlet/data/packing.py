"""Sequences of different lengths, packed into few of one length."""

from __future__ import annotations

from collections.abc import Sequence

from martlet.core.errors import UsageError


def first_fit(lengths: Sequence[int], capacity: int, most: int | None = None) -> list[list[int]]:
    """Which go into which sequence: each in the first that has room, or in a new one.

    most: so many fit into a sequence, whatever room it has.
    Source: Dehghani et al., Patch n' Pack: NaViT, 2023, arXiv 2307.06304, section 2 and appendix.

    Raises:
        UsageError: one is longer than a sequence.
    """
    sequences, room = list[list[int]](), list[int]()
    for i, length in enumerate(lengths):
        if length > capacity:
            raise UsageError(
                f"number {i} has {length} tokens, and a sequence {capacity}; resize it, or take longer ones"
            )
        for j, free in enumerate(room):
            if length <= free and (most is None or len(sequences[j]) < most):
                break
        else:
            j = len(sequences)
            sequences.append([])
            room.append(capacity)
        sequences[j].append(i)
        room[j] -= length
    return sequences


def padding_ratio(lengths: Sequence[int], sequences: int, capacity: int) -> float:
    """The share of so many sequences that is padding."""
    return 1 - sum(lengths) / (sequences * capacity)
