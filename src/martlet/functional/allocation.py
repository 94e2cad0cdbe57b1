"""Which setting each layer gets, so that the costs add up to the least within budgets."""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Choice:
    """One setting of a layer. cost: of its error, in any unit that adds up. uses: of each budget; none is negative."""

    cost: float
    uses: tuple[float, ...]


def allocate_exactly(layers: Sequence[Sequence[Choice]], budgets: Sequence[float]) -> list[int]:
    """The choice of each layer with the least sum of costs within all budgets, by integer programming (SciPy's MILP).

    Raises:
        ValueError: a layer has no choice, or nothing fits the budgets.
    """
    from scipy.optimize import Bounds, LinearConstraint, milp

    _check(layers, budgets)
    flat = [choice for layer in layers for choice in layer]
    owner = np.repeat(np.arange(len(layers)), [len(layer) for layer in layers])
    one_each = (owner == np.arange(len(layers))[:, None]).astype(float)  # (layers, choices)
    costs = np.array([choice.cost for choice in flat])
    scale = np.abs(costs).max() or 1.0
    constraints = [LinearConstraint(one_each, 1, 1)]
    for i, budget in enumerate(budgets):
        uses = np.array([[choice.uses[i] for choice in flat]])
        unit = uses.max() or 1.0  # numbers near 1 are what the solver's tolerances are made for
        constraints.append(LinearConstraint(uses / unit, -np.inf, budget / unit))
    integral, bounds, options = np.ones(len(flat)), Bounds(0, 1), {"presolve": False}
    with _silent():  # HiGHS prints where it repairs a solution, whatever it is told
        found = milp(costs / scale, constraints=constraints, bounds=bounds, integrality=integral, options=options)
    if found.x is None:
        raise ValueError("no choice of settings fits the budgets")
    picked = np.flatnonzero(found.x > 0.5)
    starts = np.cumsum([0, *(len(layer) for layer in layers[:-1])])
    return (picked - starts).tolist()


def allocate_greedily(layers: Sequence[Sequence[Choice]], budgets: Sequence[float]) -> list[int]:
    """From each layer's least cost, the step that costs least for what it saves of an exceeded budget, again and again.

    A step uses no more of any budget, so that it ends.

    Source: Tai and Wu, MPTQ-ViT, 2024, arXiv 2401.14895, whose greedy search weighs accuracy against size; its
    equations weren't at hand.

    Raises:
        ValueError: a layer has no choice, or it finds none that fits the budgets.
    """
    _check(layers, budgets)
    picked = [min(range(len(layer)), key=lambda i, layer=layer: layer[i].cost) for layer in layers]
    while True:
        used = [sum(layer[i].uses[b] for layer, i in zip(layers, picked, strict=True)) for b in range(len(budgets))]
        over = [b for b, budget in enumerate(budgets) if used[b] > budget * (1 + 1e-9)]
        if not over:
            return picked
        best, least = None, float("inf")
        for n, layer in enumerate(layers):
            now = layer[picked[n]]
            for i, choice in enumerate(layer):
                saved = sum((now.uses[b] - choice.uses[b]) / (budgets[b] or 1.0) for b in over)
                less = all(its <= before for its, before in zip(choice.uses, now.uses, strict=True))
                if less and saved > 0 and (price := (choice.cost - now.cost) / saved) < least:
                    best, least = (n, i), price
        if best is None:
            raise ValueError("no choice of settings fits the budgets")
        picked[best[0]] = best[1]


@contextmanager
def _silent() -> Iterator[None]:
    """Within it, nothing that C code prints reaches standard output."""
    flush = getattr(ctypes.CDLL(None), "fflush", None) if os.name == "posix" else None
    sys.stdout.flush()
    if flush is not None:
        flush(None)  # what C printed before is to be seen
    kept, nothing = os.dup(1), os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nothing, 1)
        yield
    finally:
        if flush is not None:
            flush(None)
        os.dup2(kept, 1)
        os.close(kept)
        os.close(nothing)


def _check(layers: Sequence[Sequence[Choice]], budgets: Sequence[float]) -> None:
    if not layers or not all(layers):
        raise ValueError("a layer has no setting to choose")
    if any(len(choice.uses) != len(budgets) for layer in layers for choice in layer):
        raise ValueError("a setting doesn't say what it uses of each budget")
