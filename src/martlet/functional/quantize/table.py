"""A grid as a table: the values it has, and where it goes from one to the next. Any grid of numbers can be one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from jaxtyping import Float
from torch import Tensor


class Quantizes(Protocol):
    """A grid with all its parameters, whose values rise or fall with what is rounded."""

    @property
    def bits(self) -> int: ...

    def quantize(self, x: Tensor) -> Tensor: ...

    def dequantize(self, codes: Tensor) -> Tensor: ...


@dataclass(frozen=True)
class Table:
    """values: rising. edges: x goes to values[i] for edges[i - 1] < x <= edges[i]."""

    edges: Float[Tensor, " levels-1"]
    values: Float[Tensor, " levels"]


def lookup(x: Tensor, edges: Float[Tensor, " levels-1"], values: Float[Tensor, " levels"]) -> Tensor:
    """x, of any shape, rounded to a table's values."""
    return values[torch.bucketize(x.contiguous(), edges)]


def tabulate(grid: Quantizes, steps: int = 60) -> Table:
    """The table of a grid: its values, sorted, and by bisection in float64 the points where it goes to the next.

    Values that nothing rounds to have no room between their edges; several codes of one value stay several.
    """
    codes = torch.arange(2**grid.bits, dtype=torch.uint8)
    values = grid.dequantize(codes).double().sort().values
    low, high = values[:-1].clone(), values[1:].clone()
    middle = (values[:-1] + values[1:]) / 2
    for _ in range(steps):
        point = (low + high) / 2
        above = grid.dequantize(grid.quantize(point)).double() > middle
        low, high = torch.where(above, low, point), torch.where(above, point, high)
    return Table(high.float(), values.float())
