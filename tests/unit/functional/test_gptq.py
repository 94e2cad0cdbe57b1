"""GPTQ against Optimal Brain Quantization's update with an explicit inverse at every step, in plain Python and float64.

Frantar et al., GPTQ, arXiv 2210.17323, equation 2; Sung et al., RSQ, arXiv 2503.01820.
"""

from collections.abc import Callable, Sequence

import pytest
import torch

from martlet.core.errors import NumericsError
from martlet.functional.quantize.formats import IntegerGrid, TableGrid, WeightGrid, normal_float4
from martlet.functional.quantize.gptq import (
    RoundedWeight,
    attention_concentration,
    effective_rows,
    gptq,
    input_hessian,
    output_error,
    round_to_nearest,
)

OUTPUTS, INPUTS = 5, 24
GRIDS: list[WeightGrid] = [
    IntegerGrid(3),
    IntegerGrid(4, symmetric=False),
    IntegerGrid(2, least=0.6),
    TableGrid(normal_float4()),
]


def problem(dead: Sequence[int] = (), seed: int = 0, spread: float = 1) -> tuple[torch.Tensor, torch.Tensor]:
    """A weight (O, I) and strongly correlated input rows (R, I), some of whose channels are always 0."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(OUTPUTS, INPUTS, generator=generator).double()
    mixing = torch.randn(INPUTS, INPUTS, generator=generator).double()
    rows = torch.randn(200, INPUTS, generator=generator).double() @ mixing * torch.logspace(-spread, spread, INPUTS)
    rows[:, list(dead)] = 0.0
    return weight, rows


def oracle(
    weight: torch.Tensor,
    hessian: torch.Tensor,
    grid: WeightGrid,
    size: int,
    damping: float,
    order: list[int],
    fit_first: bool,
    dead: Sequence[int] = (),
) -> torch.Tensor:
    """Column by column: (w - quant(w)) / [H_F⁻¹]_qq, spread by the row of H_F⁻¹, F being the columns left."""
    mean = hessian.diagonal().mean()
    live = [c for c in order if c not in dead]
    damped = hessian + torch.eye(INPUTS, dtype=torch.float64) * damping * mean
    left, rounded = weight.clone(), torch.empty_like(weight)
    parameters = {g: grid.fit(weight[:, g * size : (g + 1) * size]) for g in range(INPUTS // size)} if fit_first else {}
    for column in order:
        group = column // size
        if group not in parameters:
            parameters[group] = grid.fit(left[:, group * size : (group + 1) * size])
        for row in range(OUTPUTS):
            value = left[row : row + 1, column : column + 1]
            its = parameters[group][row : row + 1]
            rounded[row, column] = grid.dequantize(grid.quantize(value, its), its)
        if column in dead:
            continue
        free = live[live.index(column) :]
        inverse = torch.linalg.inv(damped[free][:, free])
        for row in range(OUTPUTS):
            error = (left[row, column] - rounded[row, column]) / inverse[0, 0]
            for place, other in enumerate(free):
                left[row, other] -= error * inverse[0, place]
    return rounded


def assert_is_the_papers(
    method: Callable[..., RoundedWeight],
    grid: WeightGrid,
    size: int | None,
    activation_order: bool,
    block_size: int,
    dead: Sequence[int] = (),
) -> None:
    weight, rows = problem(dead)
    hessian = rows.T @ rows
    order = list(range(INPUTS))
    if activation_order:
        order = sorted(order, key=lambda c: -float(hessian[c, c]))
    expected = oracle(weight, hessian, grid, size or INPUTS, 0.02, order, activation_order or size is None, dead)
    found = method(weight, hessian, grid, size, 0.02, activation_order, block_size)
    assert torch.allclose(found.weight, expected, rtol=1e-9, atol=1e-9)
    groups = found.parameters.unbind(1)
    parts = [grid.dequantize(c, p) for c, p in zip(found.codes.chunk(len(groups), 1), groups, strict=True)]
    assert torch.equal(torch.cat(parts, 1), found.weight)
    assert len(groups) == INPUTS // (size or INPUTS)


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("size", [None, 4, 12])
@pytest.mark.parametrize("activation_order", [False, True])
def test_gptq_is_the_papers(grid, size, activation_order):
    assert_is_the_papers(gptq, grid, size, activation_order, 128)


@pytest.mark.parametrize("block_size", [1, 5, 8, 24])
@pytest.mark.parametrize("size", [None, 6])
def test_blocks_change_nothing(block_size, size):
    assert_is_the_papers(gptq, IntegerGrid(3), size, False, block_size)


@pytest.mark.parametrize("activation_order", [False, True])
def test_columns_without_input_move_no_other(activation_order):
    assert_is_the_papers(gptq, IntegerGrid(3), 8, activation_order, 5, dead=(0, 7, 23))


def transposed_error(weight, hessian, *rest):
    return gptq(weight, hessian + torch.triu(hessian, 1), *rest)


@pytest.mark.parametrize(
    "fault",
    [
        lambda w, h, grid, size, *rest: round_to_nearest(w, grid, size),
        lambda w, h, *rest: gptq(w, torch.diag(h.diagonal()), *rest),
        lambda w, h, grid, size, damping, *rest: gptq(w, h, grid, size, 10 * damping, *rest),
        lambda w, h, grid, size, damping, order, block: gptq(w, h, grid, size, damping, not order, block),
        lambda w, h, grid, size, *rest: gptq(w, h, grid, 6 if size == 12 else 12, *rest),
        lambda w, h, *rest: gptq(w, h.flip(0, 1), *rest),
    ],
)
@pytest.mark.parametrize("size", [4, 12])
def test_a_fault_in_gptq_shows(fault, size):
    with pytest.raises(AssertionError):
        assert_is_the_papers(fault, IntegerGrid(3), size, False, 5)


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("size", [None, 8])
def test_the_output_errs_less_than_of_rounding_to_nearest(grid, size):
    generator = torch.Generator().manual_seed(3)
    weight, mixing = (torch.randn(n, 64, generator=generator).double() for n in (40, 64))
    rows = torch.randn(400, 64, generator=generator).double() @ mixing
    hessian = input_hessian(rows)
    nearest, found = round_to_nearest(weight, grid, size), gptq(weight, hessian, grid, size)
    error = float(output_error(found.weight - weight, hessian).sum())
    assert error == pytest.approx(float((rows @ (found.weight - weight).T).square().sum()), rel=1e-9)
    assert error < 0.8 * float(output_error(nearest.weight - weight, hessian).sum())


def test_without_correlation_gptq_is_rounding_to_nearest():
    weight, rows = problem()
    hessian = torch.diag((rows**2).sum(0))
    nearest, found = round_to_nearest(weight, IntegerGrid(3), 8), gptq(weight, hessian, IntegerGrid(3), 8)
    assert torch.equal(nearest.codes, found.codes)
    assert torch.equal(nearest.parameters, found.parameters)
    assert torch.equal(nearest.weight, found.weight)


def test_hessian_is_a_sum_over_rows():
    _, rows = problem()
    importance = torch.rand(len(rows), generator=torch.Generator().manual_seed(1)).double()
    expected = sum(r * torch.outer(x, x) for r, x in zip(importance, rows, strict=True))
    assert torch.allclose(input_hessian(rows, importance), torch.as_tensor(expected), rtol=1e-10)
    scaled = rows * importance[:, None]  # RSQ scales a token's features by r
    assert torch.allclose(input_hessian(rows, importance**2), scaled.T @ scaled, rtol=1e-10)
    assert torch.allclose(input_hessian(rows[:70]) + input_hessian(rows[70:]), input_hessian(rows), rtol=1e-10)
    assert not torch.allclose(input_hessian(rows, importance**2), input_hessian(rows, importance), rtol=0.1)


@pytest.mark.parametrize(
    ("importance", "expected"),
    [(None, 4), ([2, 2, 2, 2], 4), ([1, 1, 0, 0], 2), ([3, 1, 0, 0], 1.6), ([0, 0, 0, 0], 1)],
)
def test_effective_rows(importance, expected):
    weights = None if importance is None else torch.tensor(importance, dtype=torch.float64)
    assert effective_rows(torch.zeros(4, 2), weights) == pytest.approx(expected)


def test_equal_importance_is_plain_gptq_and_other_is_not():
    weight, rows = problem(spread=0.2)
    plain = gptq(weight, input_hessian(rows), IntegerGrid(3))
    equal = gptq(weight, input_hessian(rows, torch.full((len(rows),), 4.0)), IntegerGrid(3))
    assert torch.equal(plain.codes, equal.codes)
    importance = torch.ones(len(rows)) * 1e-3
    importance[:20] = 1.0  # fewer rows than columns: these can nearly be met exactly
    other = gptq(weight, input_hessian(rows, importance), IntegerGrid(3))
    error = lambda found: float((rows[:20] @ (found.weight - weight).T).square().sum())  # noqa: E731
    assert error(other) < error(plain)


def test_attention_concentration_is_attention_received():
    attention = torch.softmax(torch.randn(2, 3, 7, 7, generator=torch.Generator().manual_seed(0)).double() * 2, -1)
    found = attention_concentration(attention, 0.05)
    for image in range(2):
        received = [float(sum(attention[image, h, q, k] for h in range(3) for q in range(7))) for k in range(7)]
        low, high = min(received), max(received)
        expected = [0.05 + 0.95 * (r - low) / (high - low) for r in received]
        assert found[image].tolist() == pytest.approx(expected, rel=1e-9)
        given = attention[image].sum((0, 2))  # by the queries, which is the same for all: a softmax adds up to 1
        assert found[image].tolist() != pytest.approx((given / given.max()).tolist(), rel=1e-3)
    assert attention_concentration(torch.full((3, 4, 4), 0.25)).tolist() == [1.0] * 4


def test_impossible_arguments_are_refused():
    weight, rows = problem()
    hessian = rows.T @ rows
    grid = IntegerGrid(3)
    for call in (
        lambda: gptq(weight, hessian, grid, 7),
        lambda: gptq(weight, hessian, grid, 0),
        lambda: gptq(weight, hessian[:3], grid),
        lambda: gptq(weight, hessian, grid, damping=-1.0),
        lambda: gptq(weight, hessian, grid, block_size=0),
        lambda: round_to_nearest(weight, grid, 48),
        lambda: input_hessian(rows, torch.ones(3)),
        lambda: input_hessian(rows, -torch.ones(len(rows))),
        lambda: attention_concentration(torch.ones(1, 2, 2), 0.0),
    ):
        with pytest.raises(ValueError, match=r"groups|Hessian|damping|importance"):
            call()


def test_hessians_that_cannot_be_inverted_are_named():
    weight, rows = problem()
    for bad, word in [(rows[:3].T @ rows[:3], "damping"), (rows.T @ rows * float("nan"), "NaN")]:
        with pytest.raises(NumericsError, match=word):
            gptq(weight, bad, IntegerGrid(3), damping=0.0)


def test_float32_stays_float32_and_gains():
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(96, 256, generator=generator) * 0.05
    rows = torch.randn(500, 256, generator=generator) @ (torch.randn(256, 256, generator=generator) * 0.05)
    hessian = input_hessian(rows)
    found = gptq(weight, hessian, IntegerGrid(4), 64)
    assert found.weight.dtype == found.parameters.dtype == torch.float32
    assert found.parameters.shape == (96, 4, 2)
    nearest = round_to_nearest(weight, IntegerGrid(4), 64)
    assert output_error(found.weight - weight, hessian).sum() < output_error(nearest.weight - weight, hessian).sum()
