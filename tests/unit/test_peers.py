"""benchmarks/peers.py: what it records, what it skips, and what it refuses to mix."""

import importlib
import json
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from martlet.core.errors import ArtifactError, UsageError
from martlet.data import open_images
from martlet.data.calibration import Calibration
from martlet.source import load_model

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def peers(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    monkeypatch.setenv("GOMP_SPINCOUNT", "")  # main sets it for its own process
    return importlib.import_module("peers")


@pytest.fixture
def case(peers: ModuleType) -> Any:
    """A transformer of 0.37 M parameters, and images of noise."""
    model = load_model("timm:test_vit", num_classes=10)
    rng = np.random.default_rng(0)
    noise = [(rng.integers(0, 256, (180, 160, 3), np.uint8), int(label)) for label in range(10)]
    calibration = Calibration(open_images(noise), model.preprocess, n=4)
    probe = next(iter(calibration))[:1].numpy()
    return peers.Case(model=model, calibration=calibration, probe=probe, threads=1), open_images(noise)


def test_a_contender_that_fails_is_an_entry_and_the_others_are_measured(
    peers: ModuleType, case: Any, tmp_path: Path
) -> None:
    case, images = case

    def missing(case: Any, folder: Path) -> Any:
        raise ModuleNotFoundError("No module named 'peer'\n  in a second line")

    def nan(case: Any, folder: Path) -> Any:
        run = peers.eager(case).open("f32")
        return peers.Ready(open=lambda _: peers.Peer(lambda x: run(x) * np.nan, 1), bits="none")

    chosen = [c for c in peers.CONTENDERS if c.name in (peers.OPENVINO_FP32, "torch fp32 (eager)")]
    broken = [peers.Contender("missing", "peer", "f32", missing), peers.Contender("nan", "peer", "f32", nan)]
    absent = peers.Contender("absent", "peer", "f32", lambda case, folder: None)
    tests = {"noise": peers.cropped(images, case.model.preprocess)}
    record = peers.measure(case, tests, [*broken, absent, *chosen], minutes=0)
    entries = {entry["name"]: entry for entry in record["entries"]}
    assert list(entries) == ["missing", "nan", "torch fp32 (eager)", peers.OPENVINO_FP32]
    assert entries["missing"]["error"] == "ModuleNotFoundError: No module named 'peer'"
    assert entries["nan"]["error"] == "NumericsError: gives NaN or infinity"
    assert "latency_ms" not in entries["missing"]
    openvino = entries[peers.OPENVINO_FP32]
    assert openvino["latency_ms"]["n"] == entries["torch fp32 (eager)"]["latency_ms"]["n"] >= 5
    assert openvino["speedup_over_fp32"] == {"median": 1.0, "low": 1.0, "high": 1.0}
    assert record["nncf"] is None
    assert openvino["speedup_over_nncf"] is None
    assert openvino["coverage"]["macs_pct"] == {"f32": 100.0}
    [tested] = openvino["accuracy"]
    assert (tested["images"], tested["n"], tested["agreement_pct"]) == ("noise", 10, 100.0)
    assert tested["logit_sqnr_db"] > 60
    peers.write(tmp_path / "results.json", record)
    assert json.loads((tmp_path / "results.json").read_text()) == record


@pytest.mark.slow
def test_martlet_states_the_bits_and_both_accuracies(peers: ModuleType, case: Any) -> None:
    case, images = case
    chosen = [c for c in peers.CONTENDERS if c.name == "openvino int8 (Martlet)"]
    tests = {"noise": peers.cropped(images, case.model.preprocess)}
    [entry] = peers.measure(case, tests, chosen, minutes=0)["entries"]
    assert entry["bits"]["linear_weight"] == "8"
    assert entry["coverage"]["macs_pct"]["i8"] > 90
    assert {found["floating_point"] for found in entry["accuracy"]} == {"f32", entry["floating_point"]}


def test_cropped_images_are_preprocessed_to_the_same_values(peers: ModuleType, case: Any) -> None:
    case, images = case
    whole = [image for _, image in images.map(case.model.preprocess)]
    plain = case.model.preprocess.override({"resize": None})
    crops = [image for _, image in peers.cropped(images, case.model.preprocess).map(plain)]
    np.testing.assert_array_equal(np.stack(whole), np.stack(crops))


def test_the_faster_nncf_preset_is_the_one_to_beat(peers: ModuleType) -> None:
    times = {peers.NNCF: np.array([3.0, 3.0, 9.0]), peers.OTHER_NNCF: np.array([4.0, 4.0, 1.0]), "other": np.zeros(3)}
    assert peers.faster_nncf(times) == peers.NNCF
    assert peers.faster_nncf({**times, peers.NNCF: np.full(3, 5.0)}) == peers.OTHER_NNCF
    assert peers.faster_nncf({"other": np.zeros(3)}) is None


def test_finished_models_are_not_run_again(
    peers: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    runs: list[str] = []

    def run(subject: Any, *_: Any) -> dict[str, Any]:
        runs.append(subject.name)
        failed = {"name": "torch fp32 (compile)", "error": "RuntimeError: no compiler"}
        return {"name": subject.name, "weights": "random", "seconds": 1.0, "nncf": None, "entries": [failed]}

    monkeypatch.setattr(peers, "run", run)
    command = ["--quick", "--out", str(tmp_path / "peers.json"), "--models"]
    assert peers.main([*command, "shvit_s4", "repvit_m1"]) == 0
    shown = capsys.readouterr()
    assert "torch fp32 (compile) failed: RuntimeError: no compiler" in shown.out
    assert peers.main([*command, "repvit_m1", "fastvit_t8"]) == 0
    assert runs == ["shvit_s4", "repvit_m1", "fastvit_t8"]
    assert peers.main([*command, "repvit_m1", "--again"]) == 0
    assert runs[3:] == ["repvit_m1"]
    models = json.loads((tmp_path / "peers.json").read_text())["models"]
    assert sorted(model["name"] for model in models) == ["fastvit_t8", "repvit_m1", "shvit_s4"]


def test_results_of_other_settings_or_another_machine_are_not_mixed(peers: ModuleType, tmp_path: Path) -> None:
    path = tmp_path / "peers.json"
    settings = peers.Settings(threads=2, minutes=1.0)
    peers.write(path, peers.open_document(path, settings))
    assert peers.open_document(path, settings)["models"] == []
    with pytest.raises(UsageError, match=r"minutes 1\.0, and this is 2\.0; give another --out"):
        peers.open_document(path, peers.Settings(threads=2, minutes=2.0))
    document = json.loads(path.read_text())
    versions, torch = document["environment"]["versions"], document["environment"]["versions"].pop("torch")
    peers.write(path, document | {"environment": document["environment"] | {"versions": versions | {"gone": "1"}}})
    both = peers.open_document(path, settings)["environment"]["versions"]  # what one of the two lacks is no difference
    assert both["torch"] == torch
    assert both["gone"] == "1"
    peers.write(path, document | {"environment": document["environment"] | {"versions": versions | {"torch": "1"}}})
    with pytest.raises(UsageError, match=r"versions \{'torch': '1'\}, and this is \{'torch': "):
        peers.open_document(path, settings)
    document["environment"]["cpu"] = "another"
    peers.write(path, document)
    with pytest.raises(UsageError, match="cpu another"):
        peers.open_document(path, settings)
    assert peers.open_document(path, settings, timed=False)["environment"]["cpu"] == "another"
    with pytest.raises(UsageError, match=r"minutes 1\.0, and this is 2\.0; give another --out"):
        peers.open_document(path, peers.Settings(threads=2, minutes=2.0), timed=False)
    assert "environment" not in peers.open_document(tmp_path / "accuracy.json", settings, timed=False)
    path.write_text("{}")
    with pytest.raises(ArtifactError, match="no results of this benchmark"):
        peers.open_document(path, settings)


def test_an_unknown_model_is_refused(peers: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert peers.main(["--models", "shvit_s5", "--out", str(tmp_path / "peers.json")]) == 2
    assert "did you mean shvit_s4" in capsys.readouterr().err
