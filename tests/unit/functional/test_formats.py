"""Weight formats against their definitions in plain Python and float64, and against PyTorch's own 8-bit floats."""

import struct
from dataclasses import replace

import pytest
import torch

from martlet.functional.quantize.formats import (
    CLIP_STEP,
    IntegerGrid,
    TableGrid,
    WeightGrid,
    float8,
    normal_float4,
    powers_of_two,
)

# QLoRA, appendix E
NF4 = [-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
       -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634,
       0.33791524171829224, 0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0]  # fmt: skip

TABLES = {"e4m3": float8(4), "e5m2": float8(5), "nf4": normal_float4(), "pot4": powers_of_two(4)}


def weights(rows: int = 5, columns: int = 60) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(rows, columns, generator=generator).double() * torch.logspace(-3, 2, rows)[:, None]
    weight[:, 0] *= 4
    weight[1] += weight[1].abs().max()  # one row of one sign
    weight[-1] = 0.0  # a dead row
    return weight


def oracle_integer(row: list[float], bits: int, symmetric: bool, part: float = 1.0) -> list[tuple[int, float]]:
    """(code, value) of each weight of a row, on the grid that covers `part` of its range."""
    low, high = min(*row, 0.0) * part, max(*row, 0.0) * part
    if symmetric:
        scale, zero, first = max(-low, high) / (2 ** (bits - 1) - 1) or 1.0, 2 ** (bits - 1), 1
    else:
        scale = (high - low) / (2**bits - 1) or 1.0
        zero, first = round(-low / scale), 0
    codes = [min(max(round(w / scale) + zero, first), 2**bits - 1) for w in row]
    return [(code, (code - zero) * scale) for code in codes]


def oracle_table(row: list[float], table: list[float], part: float = 1.0) -> list[tuple[int, float]]:
    scale = max(abs(w) for w in row) / max(abs(v) for v in table) * part or 1.0
    codes = [min(range(len(table)), key=lambda k: abs(w / scale - table[k])) for w in row]
    return [(code, table[code] * scale) for code in codes]


def assert_rounds_as(grid: WeightGrid, oracle) -> None:
    weight = weights()
    parameters = grid.fit(weight)
    codes = grid.quantize(weight, parameters)
    assert codes.dtype == torch.uint8
    for row, found, values in zip(weight, codes, grid.dequantize(codes, parameters), strict=True):
        expected = oracle(row.tolist())
        assert found.tolist() == [code for code, _ in expected]
        assert values.tolist() == pytest.approx([value for _, value in expected], rel=1e-12)


def best_part(oracle, least: float):
    """The oracle at the fraction of the range with the least squared error."""
    parts = [1 - i * CLIP_STEP for i in range(round((1 - least) / CLIP_STEP) + 1)]

    def search(row: list[float]) -> list[tuple[int, float]]:
        error = lambda part: sum((v - w) ** 2 for w, (_, v) in zip(row, oracle(row, part), strict=True))  # noqa: E731
        return oracle(row, min(parts, key=error))

    return search


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("least", [1.0, 0.5])
def test_integers(bits, symmetric, least):
    oracle = best_part(lambda row, part: oracle_integer(row, bits, symmetric, part), least)
    assert_rounds_as(IntegerGrid(bits, symmetric, least), oracle)


@pytest.mark.parametrize("table", TABLES.values(), ids=list(TABLES))
@pytest.mark.parametrize("least", [1.0, 0.8])
def test_tables(table, least):
    assert_rounds_as(TableGrid(table, least), best_part(lambda row, part: oracle_table(row, list(table), part), least))


@pytest.mark.parametrize(
    "fault",
    [
        IntegerGrid(3),
        IntegerGrid(4, symmetric=False),
        IntegerGrid(4, least=0.5),
        TableGrid(tuple(float(v) for v in range(-7, 8))),  # the values are right, the codes aren't
    ],
)
def test_a_fault_in_a_grid_shows(fault):
    with pytest.raises(AssertionError):
        assert_rounds_as(fault, lambda row: oracle_integer(row, 4, True))


@pytest.mark.parametrize(("name", "dtype"), [("e4m3", torch.float8_e4m3fn), ("e5m2", torch.float8_e5m2)])
def test_8_bit_floats_are_pytorchs(name, dtype):
    every = torch.arange(256).byte().view(dtype).float()
    assert sorted(set(every[torch.isfinite(every)].tolist())) == list(TABLES[name])
    grid, one = TableGrid(TABLES[name]), torch.ones(1, 1)
    table = torch.tensor(TABLES[name])
    halves = (table[1:] + table[:-1]) / 2  # ties to even
    x = torch.cat([torch.linspace(-1.0, 1.0, 4001) * table[-1], torch.randn(1000), halves])[None]
    assert torch.equal(grid.dequantize(grid.quantize(x, one), one), x.to(dtype).float())
    assert grid.dequantize(grid.quantize(x * 1e6, one), one).abs().max() == table[-1]  # saturates


def test_rounding_half_way_down_would_show():
    table = torch.tensor(TABLES["e4m3"])
    halves = (table[1:] + table[:-1]) / 2
    down = table[torch.searchsorted(table, halves) - 1]
    assert not torch.equal(down, halves.to(torch.float8_e4m3fn).float())


def test_nf4_is_the_published_table():
    as_float32 = [struct.unpack("f", struct.pack("f", v))[0] for v in normal_float4()]
    assert as_float32 == pytest.approx(NF4, abs=3e-7)
    assert [normal_float4()[k] for k in (0, 7, 15)] == [-1.0, 0.0, 1.0]


@pytest.mark.parametrize("bits", [2, 3, 4, 5])
def test_powers_of_two(bits):
    values = powers_of_two(bits)
    assert len(values) == 2**bits - 1
    assert set(values) == {0.0} | {s * 2.0**-k for s in (-1, 1) for k in range(2 ** (bits - 1) - 1)}


def test_a_better_clipping_errs_less():
    weight = weights()[:-1]
    for grid in (IntegerGrid(3), IntegerGrid(3, False), TableGrid(normal_float4())):
        searched = replace(grid, least=0.4)
        error = lambda g: (g.dequantize(g.quantize(weight, g.fit(weight)), g.fit(weight)) - weight).square().sum(1)  # noqa: E731
        assert (error(searched) <= error(grid)).all()
        assert (error(searched) < error(grid)).any()


@pytest.mark.parametrize(
    "make",
    [
        lambda: IntegerGrid(1),
        lambda: IntegerGrid(16),
        lambda: IntegerGrid(4, least=0.0),
        lambda: IntegerGrid(4, least=1.5),
        lambda: TableGrid((0.0, 1.0), least=2.0),
        lambda: TableGrid((1.0, 2.0)),
        lambda: TableGrid((0.0, 2.0, 1.0)),
        lambda: TableGrid((0.0,)),
        lambda: float8(3),
        lambda: powers_of_two(1),
        lambda: powers_of_two(8),
    ],
)
def test_impossible_formats_are_refused(make):
    with pytest.raises(ValueError, match=r"bits|fraction|table"):
        make()
