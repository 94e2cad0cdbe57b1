"""Which grid to round a tensor to, judged by what the rounding does.

An error is a function of the rounded tensor: `squared_error` of the tensor itself, or `linear_error` of the layer that
reads it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Protocol, TypeVar

import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from martlet.functional.quantize.logarithmic import ADALOG_DENOMINATOR, LogarithmicGrid, check_bits

RoundingError = Callable[[Tensor], float]
NUMERATORS = range(10, 139)  # AdaLog's bases, from 2^(10/37) to 2^(138/37)
SOFTMAX_VALUES = 2**18
"""Of an attention's softmax, which has few large values among many, on which a search looks."""


class ValueGrid(Protocol):
    """A grid with all its parameters, as those in `logarithmic` and `twin`."""

    def quantize(self, x: Tensor) -> UInt8[Tensor, "*s"]: ...

    def dequantize(self, codes: UInt8[Tensor, "*s"]) -> Tensor: ...


G = TypeVar("G", bound=ValueGrid)


def squared_error(x: Tensor) -> RoundingError:
    """Mean squared difference from x."""
    return lambda rounded: float((rounded - x).square().mean())


def linear_error(
    rows: Float[Tensor, "r i"], weight: Float[Tensor, "o i"], gradient: Float[Tensor, "r o"] | None = None
) -> RoundingError:
    """Mean squared difference of the outputs of a linear layer that gets rounded rows, each weighted by gradient².

    The gradient is the loss's with respect to the outputs. Source: Yuan et al., PTQ4ViT, 2022, arXiv 2111.12293,
    section 3.3: the difference's square in the Hessian, of which the diagonal is taken, as the gradient squared.
    """

    def error(rounded: Tensor) -> float:
        difference = (rounded - rows) @ weight.T  # (r, o)
        return float((difference if gradient is None else difference * gradient).square().mean())

    return error


def product_error(rows: Tensor, other: Tensor, rounded_other: Tensor) -> RoundingError:
    """Mean squared difference of a product with another activation, both rounded: (…, r, i) by (…, i, o)."""
    output = rows @ other
    return lambda rounded: float((rounded @ rounded_other - output).square().mean())


def sample_queries(softmax: Float[Tensor, "... q k"]) -> Float[Tensor, "... r k"]:
    """Evenly spaced queries of attention maps, with SOFTMAX_VALUES or some more values: the same each time."""
    return softmax[..., :: max(1, softmax.numel() // SOFTMAX_VALUES), :]


def best_grid(error: RoundingError, x: Tensor, grids: Iterable[G]) -> G:
    """The grid that rounds x with the least error; of equal ones the first.

    Over exponents of a twin grid this is PTQ4ViT's search, section 3.3.

    Raises:
        ValueError: there is no grid to choose from, or every error is NaN.
    """
    best, least = None, float("inf")
    for grid in grids:
        if (found := error(grid.dequantize(grid.quantize(x)).to(x.dtype))) < least:
            best, least = grid, found
    if best is None:
        raise ValueError("no grid to choose from, or an error that is NaN")
    return best


def progressive_search(
    error: Callable[[float, int], float],
    pairs: Iterable[tuple[float, int]],
    spacing: float,
    width: int = 16,
    splits: int = 8,
    steps: int = 6,
) -> tuple[float, int]:
    """The pair of a number and an integer with the least error, searched from coarse to fine.

    All `pairs` are tried, which lie `spacing` apart in their first number; the `width` best are split into `splits` new
    ones each, that spread evenly over `spacing` around them; and so on, `steps` rounds in all, in which the spacing
    shrinks by `splits`. Errors are asked for len(pairs) + (steps - 1) · width · splits times.

    Source: Wu et al., AdaLog, 2024, arXiv 2407.12951 (FPCS); the defaults are the official
    code's. Differs: that code's new ones reach the ends of the interval, so that neighbours share them, and takes the
    best of the last round; here they tile it, and the best of all rounds is kept.

    Raises:
        ValueError: no pair, a spacing that isn't positive, or a count below 1.
    """
    if not spacing > 0 or min(width, splits, steps) < 1:
        raise ValueError(f"spacing {spacing}, width {width}, splits {splits}, steps {steps}; all have to be positive")
    scored = sorted((error(first, second), first, second) for first, second in pairs)
    if not scored:
        raise ValueError("no pair to search from")
    best = scored[0]
    for _ in range(steps - 1):
        offsets = [((i + 0.5) / splits - 0.5) * spacing for i in range(splits)]
        nearby = [(first + offset, second) for _, first, second in scored[:width] for offset in offsets]
        scored = sorted((error(first, second), first, second) for first, second in nearby)
        best = min(best, scored[0])
        spacing /= splits
    return best[1], best[2]


@dataclass(frozen=True)
class AffineGrid:
    """Codes clamp(round(x / scale) + zero_point, 0, 2^bits - 1), for values of any shape.

    Raises:
        ValueError: bits not from 2 to 8, a scale that isn't positive, a zero point that isn't a code.
    """

    bits: int
    scale: float
    zero_point: int

    def __post_init__(self) -> None:
        check_bits(self.bits)
        if not self.scale > 0 or not 0 <= self.zero_point < 2**self.bits:
            raise ValueError(f"scale {self.scale}, zero point {self.zero_point} for {self.bits} bits")

    def quantize(self, x: Tensor) -> UInt8[Tensor, "*s"]:
        return (torch.round(x / self.scale) + self.zero_point).clamp(0, 2**self.bits - 1).to(torch.uint8)

    def dequantize(self, codes: UInt8[Tensor, "*s"], dtype: torch.dtype = torch.float32) -> Tensor:
        return (codes.to(dtype) - self.zero_point) * self.scale


def search_affine(
    error: RoundingError, x: Tensor, bits: int, keep: float = 0.9, width: int = 16, splits: int = 8, steps: int = 6
) -> AffineGrid:
    """Scale and zero point with the least error of x, by progressive search.

    Starts from 8 scales, over ranges from between the quantiles 1 - keep and keep of x to all of it, each with up to 16
    zero points around the one that min and max give. Source: AdaLog. Differs: its code takes the zero
    points around 2^(bits - 1), which at more than 4 bits leaves one-sided tensors out.

    Raises:
        ValueError: bits not from 2 to 8, keep not in (0.5, 1), or x has only one value.
    """
    check_bits(bits)
    narrow, (low, high) = _span(x, keep), (float(v) for v in torch.aminmax(x))
    if not high > low:
        raise ValueError("a tensor with one value has no range to search")
    last = 2**bits - 1
    narrow = min(max(narrow, (high - low) / last), high - low)  # a peak's quantiles may coincide
    scales = [(narrow + (high - low - narrow) * i / 7) / last for i in range(8)]
    middle = min(max(round(-low / (high - low) * last), 0), last)
    zeros = range(max(middle - 8, 0), min(middle + 8, last + 1))
    dtype = x.dtype

    def of(scale: float, zero: int) -> float:
        if not scale > 0:
            return float("inf")
        grid = AffineGrid(bits, scale, zero)
        return error(grid.dequantize(grid.quantize(x), dtype))

    spacing = (scales[-1] - scales[0]) / 7 or scales[-1] / 7
    scale, zero = progressive_search(of, [(s, z) for z in zeros for s in scales], spacing, width, splits, steps)
    return AffineGrid(bits, scale, zero)


RowsError = Callable[[Float[Tensor, "n r"]], Float[Tensor, " n"]]
"""From rows as they are rounded to the error of each."""


def rows_error(rows: Float[Tensor, "n r"]) -> RowsError:
    """Mean squared difference of each row from what it was."""
    return lambda rounded: (rounded - rows).square().mean(1)


def output_rows_error(
    weight: Float[Tensor, "o i"], inputs: Float[Tensor, "r i"], rounded_inputs: Float[Tensor, "r i"]
) -> RowsError:
    """Squared error of each output of a linear layer that multiplies rounded inputs by the rounded weight.

    |Ŵ X̂ - W X|² = ŵ X̂ᵀX̂ ŵᵀ - 2 ŵ X̂ᵀX wᵀ + |w Xᵀ|², so that a candidate costs no pass over the inputs.
    """
    hessian = rounded_inputs.T @ rounded_inputs  # (i, i)
    cross = (rounded_inputs.T @ inputs) @ weight.T  # (i, o)
    constant = ((inputs.T @ inputs) @ weight.T * weight.T).sum(0)  # (o)
    return lambda rounded: ((rounded @ hessian - 2 * cross.T) * rounded).sum(1) + constant


def search_affine_rows(
    error: RowsError,
    rows: Float[Tensor, "n r"],
    bits: int,
    keep: float = 0.9,
    width: int = 8,
    splits: int = 4,
    steps: int = 4,
) -> Float[Tensor, "n 2"]:
    """A scale and a zero point for each row, with the least error, by the same progressive search for all at once.

    As `search_affine`; zero points are whole numbers and may lie outside the codes, for rows that are far from zero.
    """
    last = 2**bits - 1
    low, high = rows.amin(1), rows.amax(1)
    span = torch.where(high > low, high - low, torch.where(high != 0, high.abs(), 1.0))  # (n)
    ordered = rows.sort(1).values
    cut = int((1 - keep) * rows.shape[1])
    narrow = torch.maximum(ordered[:, -1 - cut] - ordered[:, cut], span / last)
    origin = torch.round(-low / span * last)
    spacing = (span - narrow) / 7 / last
    candidates = [
        ((narrow / last + spacing * i), origin + shift)
        for i in range(8)
        for shift in range(-min(8, last), min(8, last))
    ]

    def score(pairs: list[tuple[Tensor, Tensor]]) -> Tensor:
        errors = []
        for scale, zero in pairs:
            usable = torch.where(scale > 0, scale, 1.0)[:, None]
            codes = (torch.round(rows / usable) + zero[:, None]).clamp(0, last)
            errors.append(torch.where(scale > 0, error((codes - zero[:, None]) * usable), float("inf")))
        return torch.stack(errors)  # (candidates, n)

    best = torch.full_like(span, float("inf"))
    chosen = torch.stack([span / last, origin], 1)
    for step in range(steps):
        errors = score(candidates)
        scales, zeros = (torch.stack(column) for column in zip(*candidates, strict=True))
        top = errors.topk(min(width, len(errors)), 0, largest=False).indices  # (width, n)
        least = errors.gather(0, top[:1])[0]
        found = torch.stack([scales.gather(0, top[:1])[0], zeros.gather(0, top[:1])[0]], 1)
        chosen = torch.where((least < best)[:, None], found, chosen)
        best = torch.minimum(best, least)
        if step == steps - 1:
            break
        offsets = [(i + 0.5) / splits - 0.5 for i in range(splits)]
        kept = [(scales.gather(0, top[i : i + 1])[0], zeros.gather(0, top[i : i + 1])[0]) for i in range(len(top))]
        candidates = [(scale + spacing * offset, zero) for scale, zero in kept for offset in offsets]
        spacing = spacing / splits
    return chosen


def search_logarithmic(
    error: RoundingError,
    x: Tensor,
    bits: int,
    scale: float | None = None,
    shift: float = 0.0,
    keep: float = 0.9,
    numerators: Iterable[int] = NUMERATORS,
) -> LogarithmicGrid:
    """AdaLog's grid, in its integer form, with the least error of x: its base and, unless given, its scale.

    A softmax has scale 1. Otherwise the 8 best bases for the full range are combined with 16 scales, from the quantile
    `keep` of the positive values to the greatest, and searched progressively, 32 kept and split into 4 each time.
    Source: AdaLog; the numbers are the official code's.

    Raises:
        ValueError: bits not from 2 to 8, keep not in (0.5, 1), no numerator, or x + shift is nowhere positive.
    """

    def grid(scale: float, numerator: int) -> LogarithmicGrid:
        number = torch.tensor(scale, dtype=x.dtype, device=x.device)
        return LogarithmicGrid(bits, number, numerator, ADALOG_DENOMINATOR, shift, rounded=True)

    def of(scale: float, numerator: int) -> float:
        if not scale > 0:
            return float("inf")
        its = grid(scale, numerator)
        return error(its.dequantize(its.quantize(x)))

    full = float(x.max()) + shift if scale is None else scale
    ranked = sorted((of(full, numerator), numerator) for numerator in numerators)
    if not ranked or not full > 0:
        raise ValueError("no base to choose from, or no value above 0")
    if scale is not None:
        return grid(scale, ranked[0][1])
    least = _quantile(x[x > 0], keep) + shift if bool((x > 0).any()) else full / 2
    scales = [least + (full - least) * i / 15 for i in range(16)]
    pairs = [(s, numerator) for _, numerator in ranked[:8] for s in scales]
    return grid(*progressive_search(of, pairs, (full - least) / 15 or full / 15, width=32, splits=4))


def _quantile(x: Tensor, part: float) -> float:
    """The value that `part` of x's are at or below; of any number of values, unlike torch.quantile."""
    if not 0.5 < part < 1:
        raise ValueError(f"quantile {part}; it has to be between 0.5 and 1")
    return float(x.flatten().kthvalue(max(1, round(part * x.numel()))).values)


def _span(x: Tensor, part: float) -> float:
    return _quantile(x, part) + _quantile(-x, part)
