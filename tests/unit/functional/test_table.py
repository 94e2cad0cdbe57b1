"""Grids as tables: what a table gives against what its grid gives, in float64, value by value."""

import bisect

import pytest
import torch

from martlet.functional.quantize.logarithmic import GELU_SHIFT, LogarithmicGrid, ShiftUniformLog2Grid
from martlet.functional.quantize.search import AffineGrid
from martlet.functional.quantize.table import Quantizes, Table, lookup, tabulate
from martlet.functional.quantize.twin import TwinGeluGrid, TwinSoftmaxGrid

GRIDS: dict[str, Quantizes] = {
    "affine": AffineGrid(4, 0.37, 5),
    "affine, two bits": AffineGrid(2, 1.5, 3),
    "log2": LogarithmicGrid(4, torch.tensor(0.9)),
    "log√2": LogarithmicGrid(5, torch.tensor(1.0), 1, 2),
    "a base of AdaLog": LogarithmicGrid(4, torch.tensor(1.7), 23, 37, rounded=True, shift=GELU_SHIFT),
    "shift-uniform-log2": ShiftUniformLog2Grid(4, 0.05, -4.3, 0.07),
    "twin softmax": TwinSoftmaxGrid(4, 5),
    "twin gelu": TwinGeluGrid(4, 4),
    "twin gelu, coarse below fine": TwinGeluGrid(6, -2),
}
TIE = 1e-5
"""Values so near an edge aren't compared: there grid and table may differ by the last bit of a float."""


def values_of(grid: Quantizes) -> torch.Tensor:
    """Where a grid's values are, and far beyond; no value where `quantize` isn't defined."""
    own = grid.dequantize(torch.arange(2**grid.bits, dtype=torch.uint8)).double()
    low, high = float(own.min()), float(own.max())
    span = high - low
    least = low - span / 3 if low < 0 else 0.0
    return torch.linspace(least, high + span / 3, 4001, dtype=torch.float64)


def assert_is_the_grid(table: Table, grid: Quantizes) -> None:
    x = values_of(grid)
    edges = table.edges.double().tolist()
    assert edges == sorted(edges)
    compared = 0
    for value in x.tolist():
        if any(abs(value - edge) < TIE for edge in edges):
            continue
        number = torch.tensor(value, dtype=torch.float64)
        expected = float(grid.dequantize(grid.quantize(number)))
        found = float(table.values[bisect.bisect_left(edges, value)])
        assert found == pytest.approx(expected, rel=1e-6, abs=1e-9), value
        compared += 1
    assert compared > 0.9 * len(x)


@pytest.mark.parametrize("name", GRIDS)
def test_a_table_rounds_as_its_grid(name: str) -> None:
    table = tabulate(GRIDS[name])
    assert len(table.values) == len(table.edges) + 1 == 2 ** GRIDS[name].bits
    assert_is_the_grid(table, GRIDS[name])


@pytest.mark.parametrize("name", GRIDS)
@pytest.mark.parametrize(
    "fault",
    [
        lambda t: Table(t.edges * 1.05 + 0.01, t.values),
        lambda t: Table(t.edges, t.values * 1.01),
        lambda t: Table(t.edges, t.values.flip(0)),
        lambda t: Table((t.values[1:] + t.values[:-1]) / 2 - 0.02, t.values),
    ],
)
def test_a_fault_in_a_table_shows(name: str, fault) -> None:
    with pytest.raises(AssertionError):
        assert_is_the_grid(fault(tabulate(GRIDS[name])), GRIDS[name])


@pytest.mark.parametrize("name", GRIDS)
def test_looking_up_is_a_search_for_the_edge(name: str) -> None:
    table = tabulate(GRIDS[name])
    x = torch.cat([values_of(GRIDS[name]).float(), table.edges, torch.tensor([-1e30, 1e30])]).reshape(1, -1)
    edges, values = table.edges.tolist(), table.values.tolist()
    expected = [values[bisect.bisect_left(edges, value)] for value in x[0].tolist()]
    assert lookup(x, table.edges, table.values).tolist() == [expected]
    assert lookup(x.T, table.edges, table.values)[:, 0].tolist() == expected  # of any layout


def test_values_that_nothing_rounds_to_have_no_room() -> None:
    """Codes of shift-uniform-log2 that share a value, and log2's fine ones below what a shift leaves."""
    table = tabulate(ShiftUniformLog2Grid(4, 0.05, -1.2, 0.07))
    distinct = table.values.unique()
    assert len(distinct) < len(table.values) == 16
    assert torch.equal(lookup(torch.linspace(0, 2, 999), table.edges, table.values).unique(), distinct)
