"""What of a block belongs to each head, dimension or hidden unit: sums over the numbers that go when it goes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields
from typing import TypeVar

from torch import Tensor

from martlet.functional.structure.heads import HeadWeights, UnitWeights

Weights = TypeVar("Weights", HeadWeights, UnitWeights)


def each(f: Callable[..., Tensor], *weights: Weights) -> Weights:
    """f of the tensors of the same name, where all have one."""
    found = {}
    for field in fields(weights[0]):
        tensors = [getattr(w, field.name) for w in weights]
        found[field.name] = None if any(tensor is None for tensor in tensors) else f(*tensors)
    return type(weights[0])(**found)


def head_sums(weights: HeadWeights) -> dict[str, Tensor]:
    """Sums over all that belongs to each head (H,), each dimension of q and k (H, D), and each of v (H, E)."""
    qk = weights.q.sum(-1) + weights.k.sum(-1) + weights.q_bias + weights.k_bias  # (H, D)
    v = weights.v.sum(-1) + weights.v_bias + weights.proj.sum(0)  # (H, E)
    return {"heads": qk.sum(-1) + v.sum(-1), "qk": qk, "v": v}


def unit_sums(weights: UnitWeights) -> Tensor:
    """Sums over all that belongs to each hidden unit, (U,)."""
    total = weights.fc1.sum(1) + weights.fc2.sum(0)
    for rows in (weights.fc1_bias, weights.gate, weights.gate_bias):
        if rows is not None:
            total = total + (rows if rows.ndim == 1 else rows.sum(1))
    return total
