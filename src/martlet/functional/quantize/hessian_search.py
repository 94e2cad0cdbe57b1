"""Grids chosen by the outputs of the product they are for, each error weighted by the squared gradient.

Source: Yuan et al., PTQ4ViT, 2022, arXiv 2111.12293, section 3.3: the Hessian's diagonal is taken to be the squared
gradient, candidates are tried one by one, and the operands take turns, as often as in the official code. Of that
code's 100 candidates from 0.01 to 1.2 every other one is tried.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from martlet.functional.quantize.search import G, best_grid

FACTORS = tuple(0.01 + 0.0238 * i for i in range(51))
"""Of the step that covers the greatest magnitude."""
ROUNDS = 3


def covering_step(amax: Tensor, bits: int) -> Tensor:
    """The step of the symmetric grid that reaches amax, of any shape: amax / (2^(bits - 1) - 1/2); 1 where that's 0."""
    step = amax / (2 ** (bits - 1) - 0.5)
    return torch.where(step > 0, step, 1.0)


def round_symmetric(x: Tensor, step: Tensor, bits: int) -> Tensor:
    """clamp(round(x / step), -2^(bits - 1), 2^(bits - 1) - 1) · step, for a step that goes with x."""
    half = 2 ** (bits - 1)
    return (x / step).round().clamp(-half, half - 1) * step


def search_weight_steps(
    weight: Float[Tensor, "o i"],
    rounded_rows: Float[Tensor, "r i"],
    exact: Float[Tensor, "r o"],
    gradient: Float[Tensor, "r o"],
    bits: int,
    factors: Sequence[float] = FACTORS,
) -> Float[Tensor, "o 1"]:
    """The step of each row of a linear layer with the least error of its output: Σ g² (ŵ x̂ - exact)²."""
    full = covering_step(weight.abs().amax(1, keepdim=True), bits)

    def errors(factor: float) -> Tensor:
        outputs = rounded_rows @ round_symmetric(weight, full * factor, bits).T  # (r, o)
        return ((outputs - exact) * gradient).square().sum(0)

    best = torch.stack([errors(factor) for factor in factors]).argmin(0)  # (o)
    return full * torch.tensor(factors)[best][:, None]


def search_linear(
    rows: Float[Tensor, "r i"],
    weight: Float[Tensor, "o i"],
    gradient: Float[Tensor, "r o"],
    grids: Iterable[G],
    bits: int | None,
    rounds: int = ROUNDS,
) -> tuple[G, Float[Tensor, "o 1"] | None]:
    """The grid for the inputs of a linear layer, and the step of each row of its weight, in turns.

    The first of `grids` is where the search begins. Without bits the weight stays as it is.
    """
    grids = list(grids)
    exact, step = rows @ weight.T, None
    chosen, rounded_weight = grids[0], weight
    for _ in range(rounds):
        if bits is not None:
            rounded = chosen.dequantize(chosen.quantize(rows)).to(rows.dtype)
            step = search_weight_steps(weight, rounded, exact, gradient, bits)
            rounded_weight = round_symmetric(weight, step, bits)
        before = chosen
        chosen = best_grid(_linear(rounded_weight, exact, gradient), rows, grids)
        if chosen is before:
            break
    return chosen, step


def search_head_steps(
    x: Float[Tensor, "b h m d"],
    other: Float[Tensor, "b h d n"],
    exact: Float[Tensor, "b h m n"],
    gradient: Float[Tensor, "b h m n"],
    bits: int,
    first: bool,
    factors: Sequence[float] = FACTORS,
) -> Float[Tensor, " h"]:
    """The step of each head of one operand of a product, with the other one already rounded.

    x is the first operand, else the second, and has its shape.
    """
    full = covering_step(x.abs().amax((0, 2, 3)), bits)  # (h)

    def errors(factor: float) -> Tensor:
        rounded = round_symmetric(x, (full * factor)[:, None, None], bits)
        outputs = rounded @ other if first else other @ rounded
        return ((outputs - exact) * gradient).square().sum((0, 2, 3))

    best = torch.stack([errors(factor) for factor in factors]).argmin(0)  # (h)
    return full * torch.tensor(factors)[best]


def search_product(
    a: Float[Tensor, "b h m d"],
    b: Float[Tensor, "b h d n"],
    gradient: Float[Tensor, "b h m n"],
    bits: int,
    rounds: int = ROUNDS,
) -> tuple[Float[Tensor, " h"], Float[Tensor, " h"]]:
    """The steps of each head of both operands, in turns."""
    exact = a @ b
    steps = [covering_step(x.abs().amax((0, 2, 3)), bits) for x in (a, b)]
    for _ in range(rounds):
        before = list(steps)
        steps[0] = search_head_steps(a, round_symmetric(b, steps[1][:, None, None], bits), exact, gradient, bits, True)
        steps[1] = search_head_steps(b, round_symmetric(a, steps[0][:, None, None], bits), exact, gradient, bits, False)
        if all(torch.equal(*pair) for pair in zip(before, steps, strict=True)):
            break
    return steps[0], steps[1]


def search_values(
    a: Float[Tensor, "b h m d"],
    v: Float[Tensor, "b h d n"],
    gradient: Float[Tensor, "b h m n"],
    grids: Iterable[G],
    bits: int,
) -> tuple[G, Float[Tensor, " h"]]:
    """The grid of an attention map a, v not yet rounded, and then the steps of each head of v."""
    exact = a @ v

    def error(rounded: Tensor) -> float:
        return float(((rounded @ v - exact) * gradient).square().sum())

    grid = best_grid(error, a, grids)
    rounded = grid.dequantize(grid.quantize(a)).to(a.dtype)
    return grid, search_head_steps(v, rounded, exact, gradient, bits, False)


def _linear(weight: Tensor, exact: Tensor, gradient: Tensor):
    return lambda rounded: float(((rounded @ weight.T - exact) * gradient).square().sum())
