"""What a search's document says of its points together."""

import pytest

from martlet.recipe_search.document import volumes


def point(kind, drop, ms, stage="final"):
    return {"kind": kind, "stage": stage, "values": {"drop_pct": {"value": drop}, "latency_ms": {"value": ms}}}


OTHERS = [point("reference", 0.0, 10.0), point("peer", 0.5, 8.0)]


def test_volumes_are_of_what_was_found_of_the_others_and_of_both():
    found = [point("candidate", 0.25, 6.0), point("candidate", 0.0, 9.0), point("candidate", 0.0, 1.0, "screened")]
    told = volumes([*OTHERS, *found], max_drop_pct=1.0)
    assert told is not None
    assert told["reference"] == pytest.approx({"drop_pct": 1.1, "latency_ms": 11.0})
    assert told["others"] == pytest.approx(1.1 * 1 + 0.6 * 2)
    assert told["found"] == pytest.approx(0.85 * 5 + 0.25 * 2)
    assert told["together"] == pytest.approx(told["found"])  # each of the others is dominated
    del found[1]  # then the untouched model isn't
    told = volumes([*OTHERS, *found], max_drop_pct=1.0)
    assert told is not None
    assert told["together"] == pytest.approx(told["found"] + 0.25 * 1)


def test_where_volumes_end_takes_no_part_of_what_was_found():
    far = [point("candidate", 60.0, 1.0), point("candidate", 0.1, 20.0)]
    told = volumes([*OTHERS, *far], max_drop_pct=None)
    assert told is not None
    assert told["reference"] == pytest.approx({"drop_pct": 0.55, "latency_ms": 11.0})
    assert told["found"] == 0.0
    assert volumes([point("reference", 0.0, 10.0, "measured")], 1.0) is None
