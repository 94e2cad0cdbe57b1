"""What others make of a model: that it runs as an artifact, and that one that isn't there is said in a line."""

import importlib.util
import json

import numpy as np
import pytest
import torch

from martlet import engine
from martlet.core import store
from martlet.recipe_search import peers
from martlet.recipe_search.screen import Held
from martlet.source import load_model


@pytest.fixture
def model():
    tiny = {"depth": 1, "img_size": 32, "patch_size": 8, "embed_dim": 48, "num_heads": 3}
    return load_model("timm:vit_tiny_patch16_224", model_kwargs=tiny, num_classes=10)


@pytest.fixture
def images():
    return Held([torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))])


@pytest.mark.slow
def test_nncf_makes_an_artifact_that_is_nearly_the_model(model, images, tmp_path):
    pytest.importorskip("openvino")
    if importlib.util.find_spec("nncf") is None:
        pytest.skip("NNCF isn't installed")
    made, left_out = peers.prepare(model, engine.get("openvino"), images, tmp_path)
    assert left_out == {}
    artifact = store.load(made[peers.NNCF])
    assert artifact.preprocess == model.preprocess
    assert "i8" in (artifact.path / "model.xml").read_text()
    [batch] = images
    with torch.inference_mode():
        exact = model.module(batch).numpy()
    error = artifact.open(batch=4, threads=1)(batch.numpy()) - exact
    assert 1e-4 < np.linalg.norm(error) / np.linalg.norm(exact) < 0.1
    before = json.dumps(artifact.manifest)
    assert peers.prepare(model, engine.get("openvino"), images, tmp_path) == (made, {})
    assert json.dumps(store.load(made[peers.NNCF]).manifest) == before


def test_without_nncf_there_is_a_line(model, images, tmp_path, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    made, left_out = peers.prepare(model, engine.get("openvino"), images, tmp_path)
    assert made == {}
    assert left_out == {"NNCF int8": "NNCF isn't installed; pip install nncf adds it"}
    assert list(tmp_path.iterdir()) == []
    made, left_out = peers.prepare(model, engine.get("onnxruntime"), images, tmp_path)
    assert (made, left_out) == ({}, {"NNCF int8": "its int8 is for openvino, not for onnxruntime"})


def test_what_fails_says_its_last_line(model, images, tmp_path, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(peers.sys, "executable", "/bin/false")
    assert peers.prepare(model, engine.get("openvino"), images, tmp_path)[1] == {
        "NNCF int8": "NNCF can't quantize this model: exit status 1"
    }
    assert list(tmp_path.iterdir()) == []
