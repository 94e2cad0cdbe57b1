"""How much is lost with a unit: by what its weights are, what gradients say of them, and what goes through them."""

from __future__ import annotations

from torch import Tensor

from martlet.functional.heads import HeadWeights, UnitWeights


def squares(weights: HeadWeights) -> dict[str, Tensor]:
    """Sums of squares of the weights of each head (H,), dimension of q and k (H, D), and of v (H, E)."""
    qk = sum(each.square().sum(-1) for each in (weights.q, weights.k))  # (H, D)
    qk = qk + weights.q_bias.square() + weights.k_bias.square()
    v = weights.v.square().sum(-1) + weights.v_bias.square() + weights.proj.square().sum(0)  # (H, E)
    return {"heads": qk.sum(-1) + v.sum(-1), "qk": qk, "v": v}


def unit_squares(weights: UnitWeights) -> Tensor:
    """Sums of squares of the weights of each hidden unit, (U,)."""
    total = weights.fc1.square().sum(1) + weights.fc2.square().sum(0)
    for rows in (weights.fc1_bias, weights.gate, weights.gate_bias):
        if rows is not None:
            total = total + (rows.square() if rows.ndim == 1 else rows.square().sum(1))
    return total
