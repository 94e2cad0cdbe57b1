"""Statistics of features over many batches, that a normalization by constants needs."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor


def geometric_mean(squares: Float[Tensor, "m c"]) -> Float[Tensor, " c"]:
    """Of the mean squares of the last M batches. One batch that is far off moves it less than their mean.

    Source: Yang et al., Unified Normalization, 2022, arXiv 2208.01313, after the official code.
    """
    return squares.clamp(min=torch.finfo(squares.dtype).tiny).log().mean(0).exp()


def is_outlier(squares: Float[Tensor, "m c"], spread: Float[Tensor, ""]) -> bool:
    """True if some feature's arithmetic mean is over its geometric mean by more than M times the spread.

    spread: the variance of all roots of what was kept before the newest batch was.
    Source: as of `geometric_mean`.
    """
    return bool(((squares.mean(0) - geometric_mean(squares)) > len(squares) * spread).any())


class Pairs:
    """Sums over samples of what goes into a norm and what it gives, by feature."""

    def __init__(self, features: int) -> None:
        self.count = 0
        self.sums = torch.zeros(4, features, dtype=torch.float64)  # of x, y, x² and x y

    def add_(self, x: Float[Tensor, "s c"], y: Float[Tensor, "s c"]) -> None:
        x, y = x.double(), y.double()
        self.count += len(x)
        self.sums += torch.stack([each.sum(0) for each in (x, y, x * x, x * y)])

    def result(self) -> tuple[Tensor, Tensor, Tensor]:
        """The mean square of x, and factor and shift with which x comes nearest to y, by least squares; (C,) each.

        A feature that never changes gets the factor 0.
        """
        x, y, xx, xy = self.sums / self.count
        factor = (xy - x * y) / (xx - x * x).clamp(min=torch.finfo(torch.float64).tiny)
        return xx, factor, y - factor * x
