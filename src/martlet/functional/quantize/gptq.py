"""Rounding a linear layer's weight so that its output stays what it is, each column making up for those before it."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from martlet.core.errors import NumericsError
from martlet.functional.quantize.formats import WeightGrid


@dataclass(frozen=True)
class RoundedWeight:
    """Codes, the grid's parameters for each row and group of neighbouring columns, and the weight they stand for."""

    codes: UInt8[Tensor, "o i"]
    parameters: Float[Tensor, "o groups p"]
    weight: Float[Tensor, "o i"]


def input_hessian(rows: Float[Tensor, "r i"], importance: Float[Tensor, " r"] | None = None) -> Float[Tensor, "i i"]:
    """Σ importance x xᵀ over the rows of a linear layer's input, in float64; batches add up.

    tr(D H Dᵀ) is the squared output error of a weight that is off by D, each row's weighted by its importance.
    Source: Frantar et al., GPTQ, 2023, arXiv 2210.17323, section 3, without the factor 2, which cancels; Sung et al.,
    RSQ, 2025, arXiv 2503.01820. RSQ scales a token's features by r, which is an importance of r²; its official code
    takes r.

    Raises:
        ValueError: not one importance a row, or a negative one.
    """
    rows = rows.double()
    if importance is None:
        return rows.T @ rows
    if importance.shape != rows.shape[:1] or bool((importance < 0).any()):
        raise ValueError(f"importance {tuple(importance.shape)} for {len(rows)} rows; each has one, none is negative")
    return rows.T @ (rows * importance.double()[:, None])


def effective_rows(rows: Float[Tensor, "r i"], importance: Float[Tensor, " r"] | None = None) -> float:
    """How many rows of equal importance say as much: (Σ w)² / Σ w², Kish's effective sample size; at least 1."""
    if importance is None:
        return float(len(rows))
    weights = importance.double()
    return max(1.0, float(weights.sum().square() / weights.square().sum().clamp(min=torch.finfo(torch.float64).tiny)))


def attention_concentration(attention: Float[Tensor, "... h t t"], least: float = 0.01) -> Float[Tensor, "... t"]:
    """RSQ's r of each token: the attention it gets from all tokens in all heads, scaled to [least, 1] in each image.

    Source: Sung et al., RSQ, 2025, arXiv 2503.01820 ("attention concentration"). Differs: where all tokens get the
    same, which leaves no range to scale, all have 1.

    Raises:
        ValueError: least isn't in (0, 1].
    """
    if not 0 < least <= 1:
        raise ValueError(f"a least importance of {least}; it has to be above 0 and at most 1")
    received = attention.sum((-3, -2))  # (..., t): over heads and queries
    low, high = received.amin(-1, keepdim=True), received.amax(-1, keepdim=True)
    span = high - low
    return torch.where(span > 0, least + (1 - least) * (received - low) / torch.where(span > 0, span, 1.0), 1.0)


def output_error(difference: Float[Tensor, "o i"], hessian: Float[Tensor, "i i"]) -> Float[Tensor, " o"]:
    """For each output, the squared error over the rows the Hessian is of, of a weight that is off by `difference`."""
    difference = difference.to(hessian.dtype)
    return ((difference @ hessian) * difference).sum(1)


def round_to_nearest(weight: Float[Tensor, "o i"], grid: WeightGrid, group_size: int | None = None) -> RoundedWeight:
    """Every weight to the nearest value of its row's grid, or of its row's and group's.

    Raises:
        ValueError: the groups don't divide the columns.
    """
    size = _checked_group_size(weight, group_size)
    codes, parameters, rounded = [], [], []
    for group in weight.split(size, 1):
        parameters.append(grid.fit(group))
        codes.append(grid.quantize(group, parameters[-1]))
        rounded.append(grid.dequantize(codes[-1], parameters[-1]))
    return RoundedWeight(torch.cat(codes, 1), torch.stack(parameters, 1), torch.cat(rounded, 1))


def gptq(
    weight: Float[Tensor, "o i"],
    hessian: Float[Tensor, "i i"],
    grid: WeightGrid,
    group_size: int | None = None,
    damping: float = 0.01,
    activation_order: bool = False,
    block_size: int = 128,
) -> RoundedWeight:
    """Columns rounded one by one, the error of each spread over those still to come so that the output changes least.

    Without groups a row has one grid, fitted to the weight as it was. A group's is fitted when its first column's turn
    comes, to the weight as it then is. `damping` is a share of the Hessian's mean diagonal. `activation_order` takes
    the columns with the largest diagonal first; groups stay neighbouring columns, fitted to the weight as it was. A
    column whose input is always 0 is rounded as it is, and moves no other. `block_size` is for speed; it changes no
    result but by floating-point rounding. All is computed in float64; results have the weight's type.

    Source: Frantar et al., GPTQ, 2023, arXiv 2210.17323, equation 2 and algorithm 1, with the Cholesky factor of
    the inverse. Differs: the official code fits a group that starts within a block to weights which miss the updates
    from that block; here a block ends where a group does. It sets the columns without input to 0.

    Raises:
        ValueError: the groups don't divide the columns, the Hessian isn't (i, i), a damping that is negative.
        NumericsError: weight or Hessian is NaN or infinite, or the damped Hessian isn't positive definite.
    """
    columns = weight.shape[1]
    size = _checked_group_size(weight, group_size)
    if hessian.shape != (columns, columns):
        raise ValueError(f"a Hessian {tuple(hessian.shape)} for a weight of {columns} columns")
    if damping < 0 or block_size < 1:
        raise ValueError(f"damping {damping}, block size {block_size}; the one isn't negative, the other at least 1")
    if not bool(torch.isfinite(weight).all() and torch.isfinite(hessian).all()):
        raise NumericsError("a weight, or an input seen while calibrating, is NaN or infinite")

    left, hessian = weight.double().clone(), hessian.double()
    fitted: list[Tensor | None] = [None] * (columns // size)
    if activation_order or group_size is None:
        fitted = [grid.fit(group) for group in left.split(size, 1)]
    order = torch.arange(columns, device=weight.device)
    if activation_order:
        order = torch.argsort(hessian.diagonal(), descending=True, stable=True)
    left = left[:, order]
    factor = _inverse_factor(hessian[order][:, order], damping)  # (i, i), upper
    groups = (order // size).tolist()

    codes = torch.empty_like(left, dtype=torch.uint8)
    rounded = torch.empty_like(left)
    starts = set(range(0, columns, block_size)) | (set() if activation_order else set(range(0, columns, size)))
    edges = [*sorted(starts), columns]
    for start, stop in pairwise(edges):
        if fitted[groups[start]] is None:
            fitted[groups[start]] = grid.fit(left[:, start : start + size])
        block, local = left[:, start:stop], factor[start:stop, start:stop]
        errors = torch.empty_like(block)
        for j in range(stop - start):
            parameters = fitted[groups[start + j]]
            assert parameters is not None
            column = block[:, j : j + 1]
            code = grid.quantize(column, parameters)
            value = grid.dequantize(code, parameters)
            codes[:, start + j], rounded[:, start + j] = code[:, 0], value[:, 0]
            errors[:, j] = (column - value)[:, 0] / local[j, j]
            block[:, j + 1 :] -= errors[:, j : j + 1] * local[j, j + 1 :]  # equation 2
        left[:, stop:] -= errors @ factor[start:stop, stop:]
    back = torch.argsort(order)
    parameters = torch.stack([p for p in fitted if p is not None], 1).to(weight.dtype)  # (o, groups, p)
    return RoundedWeight(codes[:, back], parameters, rounded[:, back].to(weight.dtype))


def _inverse_factor(hessian: Float[Tensor, "i i"], damping: float) -> Float[Tensor, "i i"]:
    """U, upper, with UᵀU the inverse of the damped Hessian; of a column without input, a row of the identity."""
    diagonal = hessian.diagonal()
    dead = diagonal == 0
    damped = hessian + torch.diag(torch.where(dead, 1.0, damping * diagonal.mean()))
    lower, failed = torch.linalg.cholesky_ex(damped)
    if int(failed) == 0:
        factor, failed = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower), upper=True)
        if int(failed) == 0:
            return factor
    raise NumericsError(f"the Hessian isn't positive definite; raise damping above {damping}, or use more images")


def _checked_group_size(weight: Tensor, group_size: int | None) -> int:
    size = weight.shape[1] if group_size is None else group_size
    if size < 1 or weight.shape[1] % size:
        raise ValueError(f"groups of {size} don't divide {weight.shape[1]} columns")
    return size
