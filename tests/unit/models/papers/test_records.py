"""Results that come with the package are those of the benchmark."""

import json
import sys
from pathlib import Path

import pytest

from martlet.models.papers import records

sys.path.insert(0, str(Path(__file__).parents[2]))
from zoo_results import document, record


@pytest.fixture
def file(tmp_path, monkeypatch):
    monkeypatch.setattr(records, "FILE", tmp_path / "zoo.json")
    for cached in (records.records, records._shipped):
        cached.cache_clear()
    yield records.FILE
    for cached in (records.records, records._shipped):
        cached.cache_clear()


def test_what_is_written_is_read_again(file):
    timed, counted, nothing = record("b", 5_000_000, 10**9, 4.0), record("a", 1, 2), {"name": "c"}
    file.write_text(records.shipped(document(timed, counted, nothing)))
    assert list(records.records()) == ["a", "b"]
    found = records.records()["b"]
    assert (found.params, found.macs, found.image_size, found.date) == (5_000_000, 10**9, (224, 224), "2026-01-02")
    assert found.latency_ms == {"openvino": {1: 4.0, 16: 48.0}, "torch": {1: 8.0}}
    assert (records.records()["a"].latency_ms, records.records()["a"].date) == ({}, None)
    assert records.engines() == ("openvino", "torch")
    assert records.machine() == "a CPU, 2 cores; openvino 1.2, torch 9.9"


def test_a_model_is_a_line(file):
    text = records.shipped(document(record("a", 1, 2), record("b", 3, 4)))
    assert [line.partition(":")[0] for line in text.splitlines()] == ['{"machine"', '"models"', '"a"', '"b"', "}}"]
    assert json.loads(text)["models"].keys() == {"a", "b"}


def test_a_model_that_could_not_be_counted_is_left_out(file):
    file.write_text(records.shipped(document({"name": "a", "counts": {"error": "it failed"}})))
    assert records.records() == {}


def test_without_times_no_machine_is_named(file):
    file.write_text(records.shipped(document(record("a", 1, 2)) | {"environment": None}))
    assert records.records()["a"].params == 1
    assert records.machine() is None


def test_without_results_nothing_is_known(file):
    assert (records.records(), records.engines(), records.machine()) == ({}, (), None)
