import math
from itertools import pairwise

import pytest
import sample

from martlet.report import charts


@pytest.mark.parametrize(("low", "high"), [(0, 17.2), (0, 0), (-7.5, 41), (0, 1), (0, 1e-4), (3, 99_999)])
def test_an_axis_holds_its_values_and_zero_in_few_even_steps(low: float, high: float) -> None:
    axis = charts.axis(low, high)
    assert axis.low <= min(low, 0)
    assert axis.high >= high
    assert 0 in axis.ticks
    assert 2 <= len(axis.ticks) <= 8
    steps = [b - a for a, b in pairwise(axis.ticks)]
    assert steps == pytest.approx([steps[0]] * len(steps))
    assert axis.at(axis.low) == 0
    assert axis.at(axis.high) == 100
    assert axis.at(axis.high * 2 + 1) == 100


def test_latencies_share_an_axis_from_zero() -> None:
    document = sample.document()
    axis, intervals = charts.intervals(document)
    assert axis.low == 0
    assert [i.role for i in intervals] == ["baseline", "alternative", "artifact"]
    for i in intervals:
        assert 0 < i.low < i.median < i.high <= 100
        assert i.median == pytest.approx(100 * i.latency["median"] / axis.high, abs=1e-3)


def test_layers_stay_in_order_and_inside_and_the_worst_are_marked() -> None:
    layers = sample.deep()["layers"]
    _, bars = charts.layer_bars(layers)
    assert [bar.index for bar in bars] == list(range(150))
    assert all(bar.bottom >= 0 and bar.bottom + bar.height <= 100.61 for bar in bars)
    assert all(a.left + a.width <= b.left for a, b in pairwise(bars))
    assert {bar.layer["sqnr_db"] for bar in bars if bar.worst} == set(sorted(x["sqnr_db"] for x in layers)[:6])
    below_zero = bars[70]
    exact = bars[71]
    assert below_zero.worst
    assert below_zero.bottom + below_zero.height == pytest.approx(exact.bottom, abs=1e-2)
    assert exact.bottom + exact.height == pytest.approx(100)


def test_a_layer_that_was_not_measured_has_no_bar_and_nan_is_the_worst() -> None:
    layers = sample.vit_layers(2)
    layers[3]["sqnr_db"] = None  # type: ignore[typeddict-item]
    layers[5]["sqnr_db"] = math.nan
    _, bars = charts.layer_bars(layers)
    assert 3 not in [bar.index for bar in bars]
    assert charts.worst_layers(layers)[0] is layers[5]


@pytest.mark.parametrize(
    ("precision", "kind"),
    [
        *(("i8", "int8"), ("u8", "int8"), ("int8", "int8"), ("u4", "int4"), ("uint2", "int4"), ("bf16", "half")),
        *(("f16", "half"), ("FP32", "full"), ("i32", "other"), ("nf4", "other"), ("", "other"), ("i", "other")),
    ],
)
def test_precisions_have_their_color(precision: str, kind: str) -> None:
    assert charts.precision_kind(precision) == kind


def test_stacked_parts_go_from_few_bits_to_many() -> None:
    parts = charts.segments({"f32": 4.0, "bf16": 21.0, "nf3": 8.0, "i8": 55.0, "u4": 12.0})
    assert [part.precision for part in parts] == ["u4", "i8", "bf16", "f32", "nf3"]
    assert sum(part.pct for part in parts) == 100


def test_operation_groups_add_up() -> None:
    ops = sample.vit_ops()
    groups = charts.op_groups(ops)
    assert sum(group.num for group in groups) == len(ops)
    assert sum(group.microseconds for group in groups) == pytest.approx(sum(op["microseconds"] for op in ops))
    assert ("MatMul", "f32", 1) in [(group.kind, group.precision, group.num) for group in groups]
    assert [g.microseconds for g in groups] == sorted((g.microseconds for g in groups), reverse=True)
    assert charts.slowest(ops)[0]["microseconds"] == max(op["microseconds"] for op in ops)


def test_a_batch_that_one_side_lacks_is_not_measured() -> None:
    document = sample.document()
    del document["baseline"]["throughput"][1]
    rates = charts.throughput(document)
    assert [(r.batch, r.baseline, r.artifact) for r in rates] == [
        (1, 67.9, 144.1),
        (8, None, 181.3),
        (32, 71.5, 176.0),
    ]
    assert rates[1].best == 181.3
