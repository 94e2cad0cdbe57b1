"""`martlet list models` chooses and sorts by what is recorded."""

import json

import pytest

from martlet.cli import main
from martlet.cli.list import Choice, models
from martlet.core.errors import UsageError
from martlet.models.papers import records
from martlet.models.papers.records import Record


def record(params: float, macs: float, ms: float | None = None) -> Record:
    times = {} if ms is None else {"openvino": {1: ms, 16: 12 * ms}, "torch": {1: 3 * ms, 16: 30 * ms}}
    size = (224, 224)
    return Record(
        image_size=size, params=int(params), macs=int(macs), latency_ms=times, date="2026-01-02" if times else None
    )


@pytest.fixture(autouse=True)
def recorded(monkeypatch):
    """Three models with results, one of them without times."""
    found = {
        "repvit_m0_9": record(5e6, 8e8, 6.0),
        "shvit_s1": record(6e6, 2e8, 3.0),
        "nextvit_small": record(32e6, 6e9),
    }
    monkeypatch.setattr(records, "records", lambda: found)
    monkeypatch.setattr(records, "machine", lambda: "a CPU, 2 cores")


def names(**choice):
    return [entry["name"] for entry in models(Choice(**choice))]


def test_everything_is_listed_and_what_is_not_recorded_is_none():
    entries = {entry["name"]: entry for entry in models()}
    assert entries["timm:repvit_m0_9"] == {
        "name": "timm:repvit_m0_9",
        "image_size": [224, 224],
        "weights": "timm",
        "params": 5_000_000,
        "macs": 800_000_000,
        "top1_pct": 78.7,
        "engine": "openvino",
        "latency_ms": 6.0,
        "latency_ms_16": 72.0,
        "date": "2026-01-02",
    }
    assert entries["martlet:digit_vit"]["weights"] == "trained"
    assert entries["martlet:cswin_tiny"]["weights"] == "random"
    unknown = entries["timm:nextvit_small"]
    assert [unknown[key] for key in ("engine", "latency_ms", "latency_ms_16", "date")] == [None] * 4
    assert entries["martlet:cswin_tiny"]["params"] is None


def test_limits_leave_out_what_is_over_and_what_is_unknown():
    assert names(max_latency_ms=6) == ["timm:repvit_m0_9", "timm:shvit_s1"]
    assert names(max_latency_ms=5.9) == ["timm:shvit_s1"]
    assert names(engine="torch", max_latency_ms=9) == ["timm:shvit_s1"]
    assert names(max_params_m=5) == ["timm:repvit_m0_9"]
    assert names(max_params_m=40, max_latency_ms=100) == ["timm:repvit_m0_9", "timm:shvit_s1"]


def test_orders():
    for_both = {"max_params_m": 6}
    assert names(**for_both, sort="macs") == names(**for_both, sort="latency") == ["timm:shvit_s1", "timm:repvit_m0_9"]
    assert names(**for_both, sort="params") == ["timm:repvit_m0_9", "timm:shvit_s1"]
    best = models(Choice(sort="top1"))
    known = [entry["top1_pct"] for entry in best if entry["top1_pct"] is not None]
    assert known == sorted(known, reverse=True) == [entry["top1_pct"] for entry in best[: len(known)]]
    assert names(sort="latency")[:2] == ["timm:shvit_s1", "timm:repvit_m0_9"]  # the others, unknown, come after


@pytest.mark.parametrize(
    ("choice", "says"),
    [
        ({"engine": "onnxruntime"}, r"no times of models are recorded on 'onnxruntime' \(known: openvino, torch\)"),
        ({"engine": "openvin"}, r"on 'openvin'; did you mean openvino\?"),
        ({"sort": "mac"}, r"can't be sorted by 'mac'; did you mean macs\?"),
    ],
)
def test_bad_choices_are_one_clear_line(choice, says):
    with pytest.raises(UsageError, match=says):
        models(Choice(**choice))


def test_without_any_times_they_can_be_listed_but_not_chosen_by_them(monkeypatch):
    monkeypatch.setattr(records, "records", lambda: {"repvit_m0_9": record(5e6, 8e8)})
    assert len(models()) > 80
    with pytest.raises(UsageError, match=r"recorded on 'openvino' \(known: none\)"):
        models(Choice(max_latency_ms=10))


def test_the_table_says_where_and_when_times_were_taken(capsys):
    assert main(["list", "models", "--max-latency-ms", "10", "--sort", "macs"]) == 0
    shown = capsys.readouterr().out
    lines = [line for line in shown.splitlines() if line.startswith(" timm:")]
    assert [line.split()[0] for line in lines] == ["timm:shvit_s1", "timm:repvit_m0_9"]
    assert lines[1].split()[1:] == ["224", "5.00", "M", "800", "M", "78.7", "6.00", "72.0"]
    assert "Milliseconds of 1 and of 16 images: openvino, float32, on a CPU, 2 cores; 2026-01-02." in shown
    assert main(["list", "models", "--max-latency-ms", "10", "--json"]) == 0
    assert [entry["latency_ms"] for entry in json.loads(capsys.readouterr().out)] == [6.0, 3.0]


def test_choices_are_of_models_alone(capsys):
    assert main(["list", "recipes", "--sort", "macs"]) == 2
    assert "only models can be chosen and sorted, not recipes" in capsys.readouterr().err
