"""Efficiency of layers: MACs, bytes and times are those of the graph and of the engine, and they add up."""

import numpy as np
import pytest
import torch
from torch import nn

from martlet.core.model import Model
from martlet.data.preprocess import Preprocess
from martlet.engine.base import Op
from martlet.measure import efficiency as measured
from martlet.measure.efficiency import efficiency
from martlet.measure.macs import macs

STEM, DEPTHWISE, HEAD = 8 * 8 * 16 * 3 * 9, 8 * 8 * 16 * 9, 16 * 5


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, padding=1)
        self.depthwise = nn.Conv2d(16, 16, 3, padding=1, groups=16)
        self.head = nn.Linear(16, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(torch.relu(self.depthwise(torch.relu(self.stem(x)))).mean((2, 3)))


def model() -> Model:
    torch.manual_seed(0)
    return Model(name="net", module=Net().eval(), preprocess=Preprocess(size=(8, 8)), num_classes=5, origin={})


class Fixed:
    """A session that takes as long as it is told."""

    threads = 2

    def __init__(self, ops: list[Op]) -> None:
        self.ops = ops

    def __call__(self, images: np.ndarray) -> None:
        assert images.shape[0] == 1

    def profile(self, images: np.ndarray, repeats: int) -> list[Op]:
        return self.ops


@pytest.fixture
def fixed(monkeypatch):
    """A peak of 1000 MACs a microsecond and 100 bytes a microsecond; a call takes 0.1 ms."""
    dense = [Op(name="fc", kind="MatMul", precision="f32", macs=10_000, microseconds=us) for us in (10.0, 20.0)]
    ops = [
        Op(name="stem", kind="Convolution", precision="f32", macs=STEM, microseconds=50.0),
        Op(name="relu", kind="Eltwise", precision="f32", microseconds=3.0),
        Op(name="depthwise + head", kind="Subgraph", precision="f32", macs=DEPTHWISE + HEAD, microseconds=46.0),
    ]
    monkeypatch.setattr(
        measured, "_open", lambda model, *_: (Fixed(dense if model.name != "net" else ops), np.zeros((1, 3, 8, 8)))
    )
    monkeypatch.setattr(measured, "bandwidth_bytes_per_s", lambda threads: 100e6)
    monkeypatch.setattr(measured.latency, "interleave", lambda runs, **_: {"call": np.array([0.09, 0.1, 0.2])})


def test_numbers_by_hand(fixed):
    found = efficiency(model(), "openvino")
    assert (found["peak_gmacs_per_s"], found["bandwidth_gb_per_s"], found["threads"]) == (1.0, 0.1, 2)
    assert found["waterline_macs_per_byte"] == 10.0
    assert (found["latency_ms"], found["operations_ms"], found["other_microseconds"]) == (0.1, 0.099, 3.0)
    stem, both = found["layers"]
    assert (stem["kind"], both["kind"], both["name"]) == ("conv", "depthwise", "depthwise + head")
    assert stem["bytes"] == 4 * (3 * 64 + 16 * 3 * 9 + 16 + 16 * 64)  # image, weight, bias, result
    assert both["bytes"] == 4 * ((16 * 64 + 16 * 9 + 16 + 16 * 64) + (16 + 16 * 5 + 5 + 5))
    assert stem["efficiency_pct"] == pytest.approx(100 * STEM / (1000 * 50))
    assert stem["attainable_pct"] == pytest.approx(100 * STEM / stem["bytes"] / 10)
    assert found["efficiency_pct"] == pytest.approx(100 * (STEM + DEPTHWISE + HEAD) / (1000 * 100))


def test_latency_is_the_sum_of_macs_over_peak_times_efficiency(fixed):
    found = efficiency(model(), "openvino")
    peak = found["peak_gmacs_per_s"] * 1e3  # MACs a microsecond
    layers = sum(layer["macs"] / (peak * layer["efficiency_pct"] / 100) for layer in found["layers"])
    assert (layers + found["other_microseconds"]) / 1e3 == pytest.approx(found["operations_ms"])


@pytest.mark.parametrize("engine", ["openvino", "onnxruntime", "torch"])
def test_engines_tell_every_mac_of_layers_that_the_graph_knows(engine, monkeypatch):
    monkeypatch.setattr(measured, "PEAK_SIDE", 64)
    monkeypatch.setattr(measured, "PEAK_WIDTH", 256)
    monkeypatch.setattr(measured, "COPIED_BYTES", 2**20)
    monkeypatch.setattr(measured, "TRIES", 2)
    monkeypatch.setattr(measured, "ACCOUNTS", 2)
    interleave = measured.latency.interleave
    monkeypatch.setattr(
        measured.latency, "interleave", lambda runs, **more: interleave(runs, min_seconds=0.01, max_seconds=0.1)
    )
    subject = model()
    found = efficiency(subject, engine)
    assert sum(layer["macs"] for layer in found["layers"]) == macs(subject) == STEM + DEPTHWISE + HEAD
    assert {name for layer in found["layers"] for name in layer["name"].split(" + ")} == {"stem", "depthwise", "head"}
    for layer in found["layers"]:
        assert layer["bytes"] > 0
        assert layer["efficiency_pct"] > 0
        assert 0 < layer["attainable_pct"] <= 100
    assert subject.stage == "module"  # it was left as it is
