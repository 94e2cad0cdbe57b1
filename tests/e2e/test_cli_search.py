"""`martlet search`: from a budget to an artifact that runs elsewhere, and everything that can be wrong on the way."""

import json

import pytest

from martlet.core.recipe import Recipe
from martlet.measure import memory
from martlet.recipe_search import folder, space


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """What is said of times and memory is tested, and not the numbers."""
    monkeypatch.setattr(space, "SECONDS", 0.1)
    monkeypatch.setattr(memory, "peak_rss_bytes", lambda *_, **__: 1_000_000)


@pytest.fixture
def search(martlet, tiny, images, tmp_path):
    """Runs `martlet search` on the tiny model, for a space of four recipes."""

    def run(*arguments, out=tmp_path / "run"):
        common = ("--images", images, "--num-images", 24, "--num-calib", 4, "--threads", 1, "--out", out)
        return martlet("search", *tiny, *common, *arguments)

    return run


FEW = ("--recipe", "readout | bf16", "--candidates", 8)


def test_from_the_budget_to_an_artifact_on_other_images(search, martlet, images, tmp_path):
    run = tmp_path / "run"
    done = search("--max-drop", 20, *FEW)
    assert done.status in (0, 3), done.err  # noise may make so small a model slower
    document = json.loads((run / "search.json").read_text())
    points = document["points"]
    [winner] = [point for point in points if point["winner"]]
    assert winner["stage"] == "final"
    assert winner["keeps_budget"]
    assert winner["n_images"] == 16  # of 40, 24 were searched on; the one that is cut off among them
    assert {point["label"] for point in points if point["kind"] == "reference"} >= {"untouched", "int8"}
    assert {point["label"] for point in points} >= {"readout"}
    for point in points:
        latency, drop = (point["values"][axis] for axis in ("latency_ms", "drop_pct"))
        assert latency["value"] > 0
        assert drop["low"] <= drop["value"] <= drop["high"]
        assert point["simulated"] == (point["stage"] == "screened")
    assert document["job"]["budget"] == {"max_drop_pct": 20, "latency_ms": None, "size_mb": None, "minutes": 30}
    assert set(document["axes"]) == {"top1_pct", "drop_pct", "latency_ms", "file_bytes", "memory_bytes"} | (
        {"agreement_pct"} if any(point["stage"] != "final" for point in points) else set()
    )
    assert document["hypervolume"]["found"] > 0
    assert f"Artifact  {run / 'winner'}" in done.out
    report = json.loads((run / "winner" / "report.json").read_text())
    assert report["recipe"]["yaml"] == winner["recipe"]
    assert report["data"]["images"]["n_images"] == 16
    evaluated = json.loads(martlet("eval", run, "--images", images, "--json").out)
    assert evaluated["n_images"] == 39
    # the command that makes the winner again
    words = winner["command"].split()
    assert Recipe.load(words[words.index("--recipe") + 1]).to_yaml() == winner["recipe"]
    # again: nothing is measured twice, and all is as it was
    before = {p: p.stat().st_mtime_ns for kind in ("measured", "final", "screened") for p in (run / kind).iterdir()}
    again = search("--max-drop", 20, *FEW)
    assert {
        p: p.stat().st_mtime_ns for kind in ("measured", "final", "screened") for p in (run / kind).iterdir()
    } == before
    assert again.out == done.out


def test_bad_use_is_one_line(search, martlet, images, tmp_path, monkeypatch):
    out = tmp_path / "run"
    cases = {
        "a search needs a budget: --max-drop in points, --latency-ms or --size-mb": (),
        "--max-drop is between 0 and 100 points, not 0: no number of images": ("--max-drop", 0),
        "--latency-ms is a positive number, not -1": ("--max-drop", 20, "--latency-ms", -1),
        "--minutes is a positive number, not 0": ("--max-drop", 20, "--minutes", 0),
        "there is no strategy 'tpee'; did you mean tpe": ("--max-drop", 20, "--strategy", "tpee"),
        "telling a drop of 1 points from none takes 299 that weren't searched on": ("--max-drop", 1),
        "fuse has nothing": ("--max-drop", 20, "--recipe", "fuse"),
        "--peer takes NAME=DIR, not 'nncf'": ("--max-drop", 20, "--peer", "nncf"),
        "torch only simulates integers": ("--max-drop", 20, "--engine", "torch"),
    }
    for message, arguments in cases.items():
        result = search(*arguments)
        assert (result.status, result.err.count("\n")) == (2, 1), (message, result.err)
        assert message in result.err
    assert "and searching takes 20: 319 in all" in search("--max-drop", 1).err
    assert not out.exists()
    out.mkdir()
    (out / "mine.txt").write_text("mine")
    assert "exists and is no search; choose another --out" in search("--max-drop", 20, *FEW).err
    (out / "mine.txt").unlink()
    job = {"martlet_search": folder.VERSION, "job": {"model": {"name": "another"}}}
    (out / "job.json").write_text(json.dumps(job))
    assert "is a search with another model" in search("--max-drop", 20, *FEW).err
    (out / "job.json").write_text("{")
    damaged = search("--max-drop", 20, *FEW)
    assert (damaged.status, "is damaged or of another version" in damaged.err) == (1, True)
