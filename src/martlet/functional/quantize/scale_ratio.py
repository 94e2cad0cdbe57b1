"""One grid for a GELU's output with two steps, both chosen by the data, whose ratio is a power of two.

Source: Tai and Wu, MPTQ-ViT, 2024, arXiv 2401.14895 (OPT-m), which searches the ratio that PTQ4ViT sets by hand.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from torch import Tensor

from martlet.functional.quantize.search import RoundingError, best_grid
from martlet.functional.quantize.twin import TwinGeluGrid

RATIOS = range(9)
"""m, for which the positive step is 2^m times the negative one."""
COVERED = tuple(i / 16 for i in range(16, 1, -1))
"""What part of the positive range the positive codes can reach."""


@dataclass(frozen=True)
class RatioGrid(TwinGeluGrid):
    """Codes in two's complement: negative ones are multiples of `step`, the others of 2^exponent step.

    Raises:
        ValueError: bits not from 2 to 8, a step that isn't positive.
    """

    step: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.step > 0:
            raise ValueError(f"a step of {self.step}; it has to be positive")

    @property
    def fine(self) -> float:
        return self.step


def search_ratio(error: RoundingError, x: Tensor, bits: int, ratios: Iterable[int] = RATIOS) -> RatioGrid:
    """The grid whose two steps round x, which is of any shape, with the least error.

    Raises:
        ValueError: x has no positive value.
    """
    high = float(x.max())
    if not high > 0:
        raise ValueError(f"a greatest value of {high}; a GELU's is positive")
    reach = high / (2 ** (bits - 1) - 1)
    return best_grid(error, x, [RatioGrid(bits, m, reach * part / 2**m) for m in ratios for part in COVERED])
