"""gptq: the weights of every Linear in a few bits, each column making up for the rounding of those before it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from martlet.functional.quantize.formats import IntegerGrid
from martlet.functional.quantize.gptq import RoundedWeight, round_to_nearest
from martlet.graph.sequential import SequentialWeights


@dataclass(frozen=True, kw_only=True)
class GPTQ(SequentialWeights):
    """Quantize the weights of every Linear to a few bits, so that its outputs on some images change least.

    For a small file: a weight of 4 bits with a scale for each 32 is 5 bits and not 32. Engines multiply it in floating
    point, so it is no faster than `bf16` where computing takes the time and not reading the weights, as in most vision
    models at batch 1. Convolutions, among them the one that makes the patches, and products with a constant matrix that
    are no Linear stay in floating point, and so do all activations. 4 and 8 bits are what engines have; other widths
    are simulated: packed in `weights.safetensors`, and in the engine's file the next wider of the two.

    Args:
        compensate: False rounds every weight to nearest (RTN) on the same kind of grid, to compare.

    Shape: none changes.
    Needs: images, without labels; 64 are enough for most models.
    Cost: one forward pass, with the activations of all images in memory, and for each Linear a Cholesky factorization
        of its input features; at run time, the weights' unpacking.
    Paper: Frantar et al., GPTQ, 2023, arXiv 2210.17323, algorithm 1; activation order is the official code's.
    Differs: sequential as in the paper, Linear by Linear on inputs that the rounded ones before it give; the official
        code does so block by block, and leaves the last Linear in floating point; here it is rounded, with more damping
        where it has seen few rows. A weight that several Linears share is rounded for the inputs of the first.
    Raises: RecipeError for a setting out of range, groups that divide no Linear's input features, or without images;
        UsageError if the model has no Linear; NumericsError for inputs that are NaN, or a damping too small.
    """

    name: ClassVar[str] = "gptq"
    summary: ClassVar[str] = "weights of every Linear in 2 to 8 bits, activations in floating point"
    paper: ClassVar[str] = "Frantar et al., GPTQ, 2023, arXiv 2210.17323"

    compensate: bool = True

    def round(
        self, rows: Tensor, weight: Tensor, importance: Tensor | None, grid: IntegerGrid, group_size: int | None
    ) -> RoundedWeight:
        if self.compensate:
            return super().round(rows, weight, importance, grid, group_size)
        return round_to_nearest(weight, grid, group_size)
