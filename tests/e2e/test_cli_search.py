"""`martlet search`: from a budget to an artifact that runs elsewhere, and everything that can be wrong on the way."""

import json
import subprocess
import sys
import time

import numpy as np
import openvino
import pytest
import torch

from martlet.core.recipe import Recipe
from martlet.measure import memory
from martlet.recipe_search import folder, peers, space


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """What is said of times and memory is tested, and not the numbers."""
    monkeypatch.setattr(space, "SECONDS", 0.1)
    monkeypatch.setattr(memory, "peak_rss_bytes", lambda *_, **__: 1_000_000)
    monkeypatch.setattr(peers, "nncf_int8", plain)
    monkeypatch.setattr(peers, "check_installed", lambda: None)


def plain(module, images, folder, *, transformer):
    """In NNCF's place, the model as it is: NNCF takes half a minute."""
    assert transformer
    image = torch.from_numpy(np.concatenate(images)[:1])
    model = openvino.convert_model(module, example_input=image, input=[(-1, *image.shape[1:])])
    openvino.save_model(model, folder / "model.xml")
    return ["model.xml", "model.bin"]


ONE_BLOCK = "depth=1,img_size=32,patch_size=8,embed_dim=48,num_heads=3"
MODEL = ("timm:vit_tiny_patch16_224", "--model-kwargs", ONE_BLOCK, "--num-classes", 10)
FEW = ("--recipe", "readout | bf16", "--candidates", 8)
"""A space of four recipes."""
LEAST = ("--recipe", "bf16", "--candidates", 2)
KINDS = ("measured", "fronts", "final", "screened", "candidates", "compressed", "peers")


@pytest.fixture
def arguments(images, tmp_path):
    """Of a search of the smallest model there is."""
    common = ("--images", images, "--num-images", 24, "--num-calib", 4, "--threads", 1, "--out", tmp_path / "run")
    return ("search", *MODEL, *common)


@pytest.fixture
def search(martlet, arguments):
    return lambda *more: martlet(*arguments, *more)


def written(run):
    """When everything was measured."""
    return {path: path.stat().st_mtime_ns for kind in KINDS for path in (run / kind).rglob("*.json")}


def test_from_the_budget_to_an_artifact_on_other_images(search, martlet, images, tmp_path):
    run = tmp_path / "run"
    done = search("--max-drop", 20, *LEAST)
    assert done.status in (0, 3), done.err  # noise may make so small a model slower
    document = json.loads((run / "search.json").read_text())
    points = document["points"]
    [winner] = [point for point in points if point["winner"]]
    assert winner["stage"] == "final"
    assert winner["keeps_budget"]
    assert winner["n_images"] == 16  # of 40, 24 were searched on; the one that is cut off among them
    assert [point["label"] for point in points][:1] == ["untouched"]
    assert {point["label"] for point in points} >= {"int8", "untouched, in bf16"}
    [peer] = [point for point in points if point["kind"] == "peer"]
    assert (peer["label"], peer["stage"], peer["n_images"]) == ("NNCF int8", "final", 16)
    assert peer["values"]["drop_pct"]["low"] < peer["values"]["drop_pct"]["high"]
    assert peer["values"]["latency_ms"]["low"] <= peer["values"]["latency_ms"]["value"]
    assert document["peers_left_out"] == {}
    for point in points:
        latency, drop = (point["values"][axis] for axis in ("latency_ms", "drop_pct"))
        assert latency["value"] > 0
        assert drop["low"] <= drop["value"] <= drop["high"]
        assert point["simulated"] == (point["stage"] == "screened")
    assert document["job"]["budget"] == {"max_drop_pct": 20, "latency_ms": None, "size_mb": None, "minutes": 30}
    assert {"top1_pct", "drop_pct", "latency_ms", "file_bytes", "memory_bytes"} <= set(document["axes"])
    volume = document["hypervolume"]
    assert 0 < max(volume["found"], volume["others"]) <= volume["together"] <= volume["found"] + volume["others"]
    assert f"Artifact  {run / 'winner'}" in done.out
    report = json.loads((run / "winner" / "report.json").read_text())
    assert report["recipe"]["yaml"] == winner["recipe"]
    assert report["data"]["images"]["n_images"] == 16
    evaluated = json.loads(martlet("eval", run, "--images", images, "--json").out)
    assert evaluated["n_images"] == 39
    words = winner["command"].split()  # makes the winner again
    assert Recipe.load(words[words.index("--recipe") + 1]).to_yaml() == winner["recipe"]
    before = written(run)
    again = search("--max-drop", 20, *LEAST)
    assert written(run) == before  # nothing is measured twice
    assert again.out == done.out


@pytest.mark.slow
def test_the_same_seed_and_what_was_measured_give_the_same_front(search, tmp_path):
    run = tmp_path / "run"
    wide = ("--max-drop", 20, "--recipe", "fuse | tps | int8 | bf16", "--candidates", 12)
    search(*wide)
    first, before = json.loads((run / "search.json").read_text())["points"], written(run)
    (run / "study.db").unlink()
    for path in (run / "rounds").iterdir():
        path.unlink()
    search(*wide)
    assert written(run) == before
    assert json.loads((run / "search.json").read_text())["points"] == first


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["fronts", "screened", "measured", "final"])
def test_killed_at_any_moment_it_goes_on_and_the_best_so_far_is_there(
    kind, search, arguments, images, martlet, tmp_path
):
    run = tmp_path / "run"
    code = "import sys; from martlet.cli import main; sys.exit(main())"
    more = ("--max-drop", 20, "--recipe", "tps | int8 | bf16", "--candidates", 8)
    with subprocess.Popen([sys.executable, "-c", code, *map(str, (*arguments, *more))]) as process:
        while not list((run / kind).glob("*.json")):
            assert process.poll() is None
            time.sleep(0.02)
        process.kill()
    before = written(run)
    if kind not in ("measured", "fronts"):  # which may be before the first winner
        assert martlet("eval", run, "--images", images, "--limit", 8).status == 0
    done = search(*more)
    assert done.status in (0, 3), done.err
    after = written(run)
    assert {path: after[path] for path in before} == before
    points = json.loads((run / "search.json").read_text())["points"]
    assert [point["stage"] for point in points if point["winner"]] == ["final"]
    assert not [path for path in run.iterdir() if "partial" in path.name]


@pytest.mark.slow
def test_a_budget_that_nothing_keeps_leaves_the_nearest(search, tmp_path):
    done = search("--max-drop", 20, "--latency-ms", 0.0001, *FEW)
    assert done.status == 3
    assert (
        "nothing found keeps a drop of 20 points and 0.0001 ms: nothing measured keeps the latency; the nearest"
        in done.out
    )
    [winner] = [p for p in json.loads((tmp_path / "run" / "search.json").read_text())["points"] if p["winner"]]
    assert not winner["keeps_budget"]
    assert (tmp_path / "run" / "winner" / "report.json").is_file()
    other = search("--max-drop", 20, "--latency-ms", 0.0002, *FEW)
    assert (other.status, "is a search with another budget" in other.err) == (2, True)
    assert search("--max-drop", 20, *FEW, "--overwrite").status in (0, 3)


@pytest.mark.slow
def test_what_each_technique_bought_is_told_by_leaving_it_out(search, martlet, tmp_path):
    run = tmp_path / "run"
    assert martlet("explain", run).err.startswith(f"martlet: {run} is no search")
    search("--max-drop", 20, "--size-mb", 0.15, "--recipe", "fuse | int8 | bf16", "--candidates", 8)
    told = json.loads(martlet("explain", run, "--json").out)
    without = {entry["technique"]: entry["values"] for entry in told["without"]}
    names = [technique.name for technique in Recipe.from_yaml(told["recipe"]).passes]
    assert list(without) == names
    assert without["int8"]["file_bytes"] > 1.3 * told["winner"]["file_bytes"]
    assert without["fuse"]["file_bytes"] == told["winner"]["file_bytes"]
    assert told["winner"]["drop_pct"] == 0  # against itself
    before = written(run)
    assert json.loads(martlet("explain", run, "--json").out) == told
    assert written(run) == before
    assert "without" in martlet("explain", run).out


def test_bad_use_is_one_line(search, tmp_path):
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
        "--ray-address needs --workers": ("--max-drop", 20, "--ray-address", "127.0.0.1:1"),
        "no Ray cluster answers at 127.0.0.1:1 (": ("--max-drop", 20, "--workers", 2, "--ray-address", "127.0.0.1:1"),
        "--ray-address is HOST:PORT, ray://HOST:PORT or auto": ("--max-drop", 20, "--workers", 2, "--ray-address", "x"),
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
