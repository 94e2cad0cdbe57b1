"""Staged artifacts on every engine: images leave, the rest goes on, and nothing costs more than it may."""

import json
import math

import numpy as np
import pytest
import torch

from martlet import engine as engines
from martlet.core import pipeline, store
from martlet.core.errors import ArtifactError, EngineError
from martlet.core.recipe import Recipe
from martlet.core.technique import Context
from martlet.engine.staged import POLICY, StagedSession, read_policy
from martlet.graph.stages import leaves, run, stages, window
from martlet.source import load_model

TINY = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 3, "num_heads": 3}
RECIPE = Recipe.from_yaml("martlet: 1\npasses: [mue: {after: [1, 2]}]")


@pytest.fixture(scope="module")
def model():
    source = load_model("timm:vit_tiny_patch16_224", model_kwargs=TINY, num_classes=10, seed=3)
    return pipeline.traced(pipeline.run(source, RECIPE, Context()))


@pytest.fixture(scope="module")
def images() -> torch.Tensor:
    return (
        torch.randn(7, 3, 32, 32, generator=torch.Generator().manual_seed(1))
        * torch.linspace(0.1, 2, 7)[:, None, None, None]
    )


def set_windows_(model, *windows: tuple[float, float]) -> None:
    for exit_, bounds in zip(leaves(model.module), windows, strict=True):
        window(model.module, exit_).copy_(torch.tensor(bounds))


@pytest.fixture
def split(model, images):
    """Windows by which two images leave at the first exit, and half of the others at the second."""
    with torch.inference_mode():
        found = [[*given.values()] for given in run(stages(model.module), images)]
    first = found[0][1].sort().values
    at_first = float(first[-3:-1].mean())  # between two images, where rounding decides nothing
    left = found[1][1][found[0][1] < at_first].sort().values
    set_windows_(model, (-math.inf, at_first), (-math.inf, float(left[1:3].mean())))
    yield [logits.numpy() for logits, *_ in found], [c.double().numpy() for _, c, *_ in found[:-1]]
    set_windows_(model, (-math.inf, math.inf), (-math.inf, math.inf))


def write(model, engine: str, folder):
    with store.writing(folder, overwrite=True) as partial:
        store.seal(partial, model, engine, store.write_model(partial, model, engines.get(engine), model))
    return store.load(folder)


@pytest.fixture(scope="module")
def untaken(model, tmp_path_factory):
    """Of OpenVINO, with exits that no image takes."""
    return write(model, "openvino", tmp_path_factory.mktemp("untaken") / "out")


def slowly(logits, confidences, windows):
    """Every image by itself, in plain Python: its logits, and the stage after which it leaves."""
    answers, exits = [], []
    for i in range(len(logits[0])):
        for k, (low, high) in enumerate(windows):
            if not low <= confidences[k][i] < high:
                break
        else:
            k = len(windows)
        answers.append(logits[k][i])
        exits.append(k)
    return np.stack(answers), exits


@pytest.mark.parametrize("engine", ["openvino", "onnxruntime", "torch"])
def test_images_leave_one_by_one_and_in_batches(engine, model, images, split, tmp_path):
    logits, confidences = split
    windows = [tuple(window(model.module, e).double().tolist()) for e in leaves(model.module)]
    wanted, exits = slowly(logits, confidences, windows)
    assert np.bincount(exits).tolist() == [2, 3, 2]
    artifact = write(model, engine, tmp_path / "out")
    session = artifact.open(batch=7)
    assert np.abs(session(images.numpy()) - wanted).max() < 1e-5
    assert session.exits.tolist() == exits
    single = artifact.open(batch=1)
    for image, row, k in zip(images.numpy(), wanted, exits, strict=True):
        assert np.abs(single(image[None]) - row).max() < 1e-5
        assert single.exits.tolist() == [k]
    assert torch.allclose(model.module(images), torch.from_numpy(wanted), atol=1e-6)  # as the graph says, unstaged


def test_the_comparison_sees_a_batch_that_is_put_together_wrongly(model, images, split, tmp_path, monkeypatch):
    logits, confidences = split
    windows = [tuple(window(model.module, e).double().tolist()) for e in leaves(model.module)]
    wanted, _ = slowly(logits, confidences, windows)
    session = write(model, "torch", tmp_path / "out").open(batch=7)
    stage = StagedSession._stage
    monkeypatch.setattr(
        StagedSession,
        "_stage",
        lambda self, k, inputs: stage(self, k, [each[::-1].copy() for each in inputs] if k else inputs),
    )
    assert np.abs(session(images.numpy()) - wanted).max() > 1e-3


def test_thresholds_that_are_never_reached_give_the_untouched_logits(untaken, images):
    source = load_model("timm:vit_tiny_patch16_224", model_kwargs=TINY, num_classes=10, seed=3)
    with torch.inference_mode():
        wanted = source.module(images)
        assert torch.equal(pipeline.run(source, RECIPE, Context()).module(images), wanted)
    session = untaken.open(batch=7)
    assert np.abs(session(images.numpy()) - wanted.numpy()).max() < 1e-5
    assert session.exits.tolist() == [2] * 7


@pytest.mark.parametrize("empty", [(math.inf, math.inf), (-math.inf, -math.inf), (0.5, 0.5)])
def test_no_image_passes_the_cap_and_stages_behind_it_are_not_there(model, images, tmp_path, empty):
    set_windows_(model, (-math.inf, math.inf), empty)
    artifact = write(model, "openvino", tmp_path / "out")
    set_windows_(model, (-math.inf, math.inf), (-math.inf, math.inf))
    assert not (artifact.path / "stage3.xml").exists()
    steps = read_policy(artifact.path)
    assert json.loads((artifact.path / POLICY).read_text())["max_macs"] == steps[-1].macs
    session = artifact.open(batch=7)
    for scale in (0.0, 1.0, 1e3):
        session(scale * images.numpy())
        assert max(session.exits) == 1 == len(steps) - 1


def test_the_account_holds_every_mac_once(untaken, images):
    ops = untaken.open(batch=1).profile(images[:1].numpy(), repeats=1)
    assert sum(op.macs for op in ops) == read_policy(untaken.path)[-1].macs


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: d["stages"][0].update(low=0.9, high=0.5), "the window of stage 1 is out of order, from 0.9 to 0.5"),
        (lambda d: d.update(martlet_policy=7), "is a policy of version 7; this Martlet reads version 1"),
        (lambda d: d["stages"][1].pop("macs"), "is damaged: KeyError"),
        (lambda d: d["stages"][1].update(macs=1), "don't rise to the"),
        (lambda d: d["stages"][0].update(stem="../model"), "names a file outside the artifact"),
        (lambda d: d.update(max_macs=1), "don't rise to the 1 that an image may cost"),
    ],
)
def test_a_policy_that_cannot_be_is_refused(change, message, model, tmp_path):
    engines.get("torch").lower(model, tmp_path)
    data = json.loads((tmp_path / POLICY).read_text())
    change(data)
    (tmp_path / POLICY).write_text(json.dumps(data))
    with pytest.raises(ArtifactError, match=message):
        read_policy(tmp_path)


def test_a_policy_that_is_no_json_is_refused(tmp_path):
    (tmp_path / POLICY).write_text("{")
    with pytest.raises(ArtifactError, match="is damaged: it is not JSON"):
        read_policy(tmp_path)


def test_a_stage_that_is_missing_or_of_another_build_is_refused(model, tmp_path):
    artifact = write(model, "onnxruntime", tmp_path / "out")
    stage = artifact.path / "stage2.onnx"
    other = (artifact.path / "stage3.onnx").read_bytes()
    stage.write_bytes(other)
    with pytest.raises(ArtifactError, match=r"is damaged: stage2\.onnx is not what was written"):
        store.load(artifact.path)
    stage.unlink()
    with pytest.raises(ArtifactError, match=r"is incomplete: stage2\.onnx is missing"):
        store.load(artifact.path)
    with pytest.raises(EngineError, match=r"has no stage2\.onnx; compress the model again"):
        artifact.open()
