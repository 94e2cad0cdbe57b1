"""benchmarks/zoo.py: it goes on where it stopped, from small to large, and what fails is an entry."""

import json
import sys
from pathlib import Path

import pytest

from martlet.core.errors import EngineError

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
zoo = pytest.importorskip("zoo")

MACS = {"a": 3 * 10**9, "b": 2 * 10**9, "c": 10**9}


@pytest.fixture
def run(tmp_path, monkeypatch):
    """Runs it on three models that aren't there. Returns the status, what was measured, and the results by name."""
    measured = []

    def counts(name):
        measured.append(("counts", name))
        return {"image_size": [8, 8], "params": 1, "macs": MACS[name]}

    def export(name, folder, settings, progress):
        measured.append(("export", name))
        if name == "c":
            raise EngineError("no such operator")
        return {"techniques": [], "openvino": {"relative_error": 1e-6}}

    monkeypatch.setattr(zoo, "table", lambda: tuple(MACS))
    monkeypatch.setattr(zoo, "family", lambda name: "one")
    monkeypatch.setattr(zoo, "counts", counts)
    monkeypatch.setattr(zoo, "export", export)

    def go(*arguments):
        measured.clear()
        status = zoo.main([*arguments, "--out", str(tmp_path / "zoo.json"), "--work", str(tmp_path)])
        file = tmp_path / "zoo.json"
        models = json.loads(file.read_text())["models"] if file.exists() else []
        return status, list(measured), {model["name"]: model for model in models}

    return go


def test_from_small_to_large_up_to_a_limit(run):
    status, measured, found = run("--parts", "counts", "export", "--max-gmacs", "2")
    assert status == 0
    assert [name for part, name in measured if part == "export"] == ["c", "b"]
    assert found["c"]["export"] == {"error": "no such operator"}
    assert "export" not in found["a"]
    assert found["a"]["counts"]["macs"] == MACS["a"]


def test_the_smallest_of_each_family_first_whatever_its_size(run, monkeypatch):
    monkeypatch.setattr(zoo, "family", lambda name: "large" if name == "a" else "small")
    _, measured, _ = run("--parts", "export", "--max-gmacs", "1.5")
    assert [name for part, name in measured if part == "export"] == ["c", "a"]
    _, measured, _ = run("--parts", "export", "--models", "b", "--max-gmacs", "1.5")
    assert measured == [("export", "b")]  # named is asked for


@pytest.mark.slow
def test_what_was_not_counted_is_before_it_is_left_out(run):
    _, measured, found = run("--parts", "export", "--max-gmacs", "1")
    assert [part for part, _ in measured] == ["counts"] * 3 + ["export"]
    assert measured[-1] == ("export", "c")
    assert set(found) == set(MACS)


def test_it_goes_on_where_it_stopped(run):
    run("--parts", "counts", "--models", "b")
    assert run("--parts", "counts")[1] == [("counts", "a"), ("counts", "c")]
    assert run("--parts", "counts")[1] == []
    _, measured, found = run("--parts", "counts", "--models", "b", "--again")
    assert measured == [("counts", "b")]
    assert set(found) == set(MACS)


def test_times_of_another_machine_are_kept_until_all_are_asked_for_anew(run, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(zoo, "latency", lambda *_: {"date": "2026-01-02", "threads": 1, "ms": {}})
    file = tmp_path / "zoo.json"
    _, measured, found = run("--parts", "latency", "--models", "b")
    assert measured == [("counts", "b"), ("export", "b")]  # which is timed
    assert "latency" in found["b"]
    file.write_text(file.read_text().replace('"cores":', '"cores_elsewhere":'))
    assert run("--parts", "export", "--models", "c")[0] == 0
    status, _, found = run("--parts", "latency", "--models", "c")
    assert status == 2
    assert "times that were measured with cores None, and this is" in (said := capsys.readouterr().err)
    assert "give another --out, or --again" in said
    assert "latency" in found["b"]
    found = run("--parts", "latency", "--models", "c", "--again")[2]
    assert [name for name, record in found.items() if "latency" in record] == ["c"]
    assert found["b"]["export"]


def test_an_unknown_model_is_one_clear_line(run, capsys):
    status, measured, _ = run("--models", "bb")
    assert (status, measured) == (2, [])
    assert "the table has no model 'bb'; did you mean b?" in capsys.readouterr().err


def test_the_table_has_the_zoo_and_timms():
    known = zoo.table()
    assert {"cswin_tiny", "digit_vit", "repvit_m0_9"} <= set(known)
    assert len(known) == len(set(known)) > 100
