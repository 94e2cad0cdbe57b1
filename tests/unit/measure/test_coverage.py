import pytest

from martlet.engine.base import Op
from martlet.measure.coverage import coverage

OPS = [
    Op(name="stem", kind="Convolution", precision="f32", macs=100, microseconds=20),
    Op(name="qkv", kind="FullyConnected", precision="i8", macs=600, microseconds=30),
    Op(name="scores", kind="Subgraph", precision="i8", macs=100, attention=True, microseconds=10),
    Op(name="values", kind="Subgraph", precision="bf16", macs=200, attention=True, microseconds=25),
    Op(name="norm", kind="MVN", precision="f32", microseconds=15),
]


def test_shares_by_hand():
    found = coverage(OPS, "a test")
    assert found["macs_pct"] == pytest.approx({"i8": 70, "bf16": 20, "f32": 10})
    assert found["attention_macs_pct"] == pytest.approx({"bf16": 200 / 3, "i8": 100 / 3})
    assert found["time_pct"] == pytest.approx({"i8": 40, "f32": 35, "bf16": 25})
    assert list(found["macs_pct"]) == ["i8", "bf16", "f32"]
    assert found["source"] == "a test"


def test_the_slowest_come_first():
    ops = coverage(OPS, "a test")["ops"]
    assert [op["name"] for op in ops] == ["qkv", "values", "stem", "norm", "scores"]
    assert ops[0] == {"name": "qkv", "kind": "FullyConnected", "precision": "i8", "gmacs": 6e-7, "microseconds": 30}


def test_nothing_is_nothing():
    found = coverage([Op(name="norm", kind="MVN", precision="f32", microseconds=1)], "a test")
    assert found["macs_pct"] == {} == found["attention_macs_pct"]
    assert found["time_pct"] == {"f32": 100}
