"""`martlet train`, what it leaves behind, and recipes that train in `martlet compress`."""

import json

import pytest
import torch

from martlet.cli.options import parse_kwargs
from martlet.core.errors import MartletError
from martlet.core.kept import Kept
from martlet.source import load_model
from martlet.training import loop

DIGITS = "martlet:digits-train"


@pytest.fixture(scope="module")
def trained(martlet, tiny, tmp_path_factory):
    """A model trained on few digits, and what was said."""
    root = tmp_path_factory.mktemp("trained")
    out = root / "vit"
    done = martlet(
        "train", *tiny, "--images", DIGITS, "--limit", 64, "--epochs", 2, "--tensorboard", root / "curves", "--out", out
    )
    assert done.status == 0, done.err
    return out, done, root / "curves"


def test_train_tells_and_writes_what_happened(trained, tiny):
    out, done, curves = trained
    assert "2 steps of 64 images, of 64" in done.out
    assert str(out / "training.html") in done.out
    document = json.loads((out / "training.json").read_text())
    assert document["recipe"] == "finetune(epochs=2.0)"
    assert document["images"] == [DIGITS, 64]
    assert document["passes"][0]["training"]["steps"] == 2
    assert document["command"].startswith(f"martlet train {tiny[0]}")
    page = (out / "training.html").read_text()
    assert page.count("<polyline") == 2  # of the loss and of the rate
    assert "finetune" in page
    assert [*curves.glob("events.out.tfevents.*")]
    assert [path.name for path in out.parent.iterdir() if path.name.startswith(".")] == []


def test_what_was_trained_gives_its_weights(trained, tiny):
    out, _, _ = trained
    whole = load_model(str(out))
    alone = load_model(
        "timm:vit_tiny_patch16_224",
        weights=out / "weights.safetensors",
        model_kwargs=parse_kwargs(tiny[2]),
        num_classes=10,
    )
    images = torch.randn(2, 3, 32, 32)
    with torch.inference_mode():
        assert torch.equal(whole.module(images), alone.module(images))


@pytest.mark.slow
def test_what_was_trained_is_trained_on_and_compressed(martlet, trained, tmp_path):
    out, _, _ = trained
    done = martlet(
        "compress", out, "--images", "martlet:digits", "--limit", 8, "--train", DIGITS, "--recipe", "distill",
        "--epochs", 0.05, "--engine", "torch", "--out", tmp_path / "small", "--json",
    )  # fmt: skip
    assert done.status in (0, 3), done.err
    document = json.loads(done.out)
    assert document["data"]["training"]["n_images"] == 4000
    assert "Images it was trained on" in (tmp_path / "small" / "report.html").read_text()
    steps = document["recipe"]["steps"]
    assert [step["name"] for step in steps] == ["finetune", "distill"]
    assert steps[1]["record"]["images"] == 3920
    assert steps[1]["record"]["steps"] == 2


def test_a_training_that_was_stopped_goes_on_but_not_as_another(martlet, tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(loop, "SAVE_SECONDS", 0.0)
    out = tmp_path / "vit"
    arguments = ["train", *tiny, "--images", DIGITS, "--limit", 64, "--out", out]
    save = Kept.save

    def save_and_stop(self, key, tensors, data):
        save(self, key, tensors, data)
        raise MartletError("halted")

    with monkeypatch.context() as patch:
        patch.setattr(Kept, "save", save_and_stop)
        assert martlet(*arguments).err == "martlet: halted\n"
    other = martlet(*arguments, "--epochs", 1)
    assert other.status == 2
    assert "keeps a training that was stopped, with another recipe; delete it to begin anew" in other.err
    begun = []
    monkeypatch.setattr(
        loop._Run, "_resume", lambda self, state, its=loop._Run._resume: begun.append(its(self, state)) or begun[-1]
    )
    assert martlet(*arguments).status == 0
    assert begun == [1]
    assert [path.name for path in tmp_path.iterdir()] == ["vit"]


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--recipe", "fuse"], "no pass of fuse trains; join one to it, as in 'fuse | distill'"),
        (["--recipe", "fuse", "--epochs", 3], "--epochs limits passes that train, and fuse has none"),
        (["--recipe", "finetune | finetune | bf16 | fuse"], "fuse requires"),
        (["--teacher", "timm:vit_small"], "timm has no model 'vit_small'"),
        (["--num-classes", 5], "and the model has 5 classes (0 to 4)"),
    ],
)
def test_bad_use_of_train(martlet, tiny, tmp_path, more, said):
    done = martlet("train", *tiny, "--images", DIGITS, "--limit", 64, "--out", tmp_path / "out", *more)
    assert done.status == 2
    assert said in done.err
    assert not (tmp_path / "out").exists()


def test_what_is_tested_on_is_not_trained_on(martlet, tiny, tmp_path):
    done = martlet(
        "compress", *tiny, "--images", DIGITS, "--train", DIGITS, "--recipe", "distill", "--out", tmp_path / "out"
    )
    assert done.status == 2
    assert "--images and --train are the same" in done.err
