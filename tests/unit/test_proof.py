"""The gate: every reason to fail, on both sides of its limit."""

from typing import Any, cast

import pytest

from martlet.core.report import Document
from martlet.proof import gate

MB = 1_000_000


def document(
    speedup: tuple[float, float, float] | None = (1.4, 1.5, 1.6),
    file_bytes: tuple[int, int] = (20 * MB, 5 * MB),
    top1_pct: tuple[float | None, float | None] = (80.0, 79.5),
    agreement_pct: float = 98.0,
    ops: list[tuple[str, str, float]] | None = None,
) -> Document:
    """What the gate reads. Pairs are of the baseline and the artifact; ops: (name, precision, microseconds)."""
    sides = zip(("baseline", "artifact"), file_bytes, top1_pct, strict=True)
    found: dict[str, Any] = {side: {"file_bytes": size, "top1_pct": top1} for side, size, top1 in sides}
    found["speedup"] = speedup and dict(zip(("low", "median", "high"), speedup, strict=True))
    found["fidelity"] = {"top1_agreement_pct": agreement_pct}
    found["artifact"]["coverage"] = {
        "ops": [{"name": name, "precision": p, "microseconds": us} for name, p, us in ops or [("head", "i8", 9.0)]]
    }
    return cast("Document", found)


def test_faster_smaller_and_as_good_passes():
    assert gate(document()) == {"passed": True, "reasons": [], "judged": ["speed", "size"]}
    assert gate(document(), max_drop=0.5) == {"passed": True, "reasons": [], "judged": ["speed", "size", "top-1"]}


def test_a_simulated_speed_is_not_judged_and_the_rest_is():
    simulated = document(speedup=None, file_bytes=(MB, 2 * MB))
    assert gate(simulated, max_drop=1)["judged"] == ["size", "top-1"]
    assert [reason.split()[0] for reason in gate(simulated)["reasons"]] == ["larger"]


@pytest.mark.parametrize(("high", "passed"), [(0.999, False), (1.0, True), (1.001, True)])
def test_slower_is_slower_when_the_whole_interval_says_so(high, passed):
    found = gate(document(speedup=(0.8, 0.9, high)))
    assert found["passed"] == passed
    assert len(found["reasons"]) == (not passed)


def test_slower_names_the_costliest_operations_in_float_and_no_others():
    ops = [
        ("softmax", "f32", 2500.0),
        ("qkv", "i8", 2000.0),
        ("fc1", "bf16", 1000.0),
        ("norm", "f32", 300.0),
        ("gelu", "f32", 200.0),
    ]
    [reason] = gate(document(speedup=(0.71, 0.752, 0.8), ops=ops))["reasons"]
    assert reason == (
        "slower than the untouched model: 0.75x its speed (0.71 to 0.80); costliest operations in float: "
        "softmax (f32, 2.50 ms), fc1 (bf16, 1.00 ms), norm (f32, 0.30 ms)"
    )
    [reason] = gate(document(speedup=(0.71, 0.752, 0.8)))["reasons"]
    assert reason.endswith("costliest operations in float: none")


@pytest.mark.parametrize(
    ("artifact", "reasons"),
    [
        (20 * MB - 1, []),
        (20 * MB, []),
        (21 * MB, []),
        (21 * MB + 1, ["larger than the untouched model: 21.00 MB against 20.00 MB"]),
        (25 * MB, ["larger than the untouched model: 25.00 MB against 20.00 MB"]),
    ],
)
def test_larger_by_more_than_a_description_is_larger(artifact, reasons):
    assert gate(document(file_bytes=(20 * MB, artifact)))["reasons"] == reasons


def test_a_model_that_stops_early_may_be_larger():
    larger = document(file_bytes=(20 * MB, 25 * MB))
    assert gate(larger)["judged"] == ["speed", "size"]
    found = gate({**larger, "exits": {}})  # type: ignore[typeddict-item]
    assert (found["reasons"], found["judged"]) == ([], ["speed"])


@pytest.mark.parametrize("which", ["baseline", "artifact"])
@pytest.mark.parametrize(("error", "passed"), [(1e-6, True), (0.01, True), (0.011, False), (float("nan"), False)])
def test_other_logits_than_pytorchs_fail(which, error, passed):
    found = document()
    for side in ("baseline", "artifact"):
        found[side] |= {"engine": "openvino", "precision": "f32", "rounded": False, "logit_error": 1e-6}
    found[which]["logit_error"] = error
    judgement = gate(found)
    assert judgement["judged"] == ["speed", "size", "logits"]
    name = "the untouched model" if which == "baseline" else "the artifact"
    assert [name in reason for reason in judgement["reasons"]] == [True] * (not passed)
    if error == 0.011:
        assert judgement["reasons"] == [
            f"openvino gives other logits for {name} than PyTorch, 1.1% of the largest apart, so nothing measured "
            "of it counts"
        ]


@pytest.mark.parametrize("what", [{"precision": "bf16"}, {"rounded": True}])
def test_logits_are_judged_where_they_should_be_equal(what):
    found = document()
    found["artifact"] |= {"engine": "openvino", "precision": "f32", "rounded": False, "logit_error": 0.3, **what}
    assert gate(found) == {"passed": True, "reasons": [], "judged": ["speed", "size"]}


@pytest.mark.parametrize(
    ("artifact", "reasons"),
    [
        (81.0, []),  # better than before
        (79.0, []),
        (78.8, ["top-1 drops by 1.20 points, more than the 1 allowed"]),
    ],
)
def test_top1_may_drop_as_far_as_allowed(artifact, reasons):
    assert gate(document(top1_pct=(80.0, artifact), agreement_pct=0), max_drop=1)["reasons"] == reasons


def test_no_drop_at_all_may_be_allowed():
    assert gate(document(top1_pct=(80.0, 80.0)), max_drop=0.0)["passed"]
    assert gate(document(top1_pct=(80.0, 79.9)), max_drop=0.0)["reasons"] == [
        "top-1 drops by 0.10 points, more than the 0 allowed"
    ]


@pytest.mark.parametrize("top1_pct", [(None, None), (None, 80.0), (80.0, None)])
def test_without_labels_agreement_is_what_counts(top1_pct):
    assert gate(document(top1_pct=top1_pct, agreement_pct=98.0), max_drop=2.0)["passed"]
    assert gate(document(top1_pct=top1_pct, agreement_pct=97.75), max_drop=2.0)["reasons"] == [
        "agreement drops by 2.25 points, more than the 2 allowed"
    ]


def test_without_a_limit_any_drop_goes():
    assert gate(document(top1_pct=(80.0, 10.0), agreement_pct=10.0))["passed"]


def test_all_reasons_are_given():
    bad = document(speedup=(0.5, 0.6, 0.7), file_bytes=(MB, 2 * MB), top1_pct=(80.0, 70.0))
    found = gate(bad, max_drop=1.0)
    assert not found["passed"]
    assert [reason.split()[0] for reason in found["reasons"]] == ["slower", "larger", "top-1"]
