"""What bad input gets: one line on standard error, the right exit status, nothing on standard output, nothing left."""

import pickle
import signal
import subprocess
import sys

import pytest
import safetensors.torch
import torch

FAILED, BAD_USE = 1, 2

SESSIONS = """
import gc, signal, sys
import numpy as np
from pathlib import Path
from martlet import engine, load_model
from martlet.cli.stop import Stopped, stoppable
from martlet.core import store

folder = Path(sys.argv[1])
openvino = engine.get("openvino")
tiny = dict(depth=1, img_size=16, patch_size=8, embed_dim=16, num_heads=1)
store.write_model(folder, load_model("timm:vit_tiny_patch16_224", num_classes=10, model_kwargs=tiny), openvino)
sessions = [openvino.open(folder) for _ in range(3)]
while sessions:  # in the order in which they came
    sessions.pop(0)(np.zeros((1, 3, 16, 16), np.float32))
    gc.collect()
try:
    with stoppable():
        signal.raise_signal(signal.SIGINT)
except Stopped as stopped:
    print(stopped)
"""

CODE = """
import torch
from torch import nn

def good():
    return nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, 10))

def nan():
    model = good()
    nn.init.constant_(model[2].weight, float("nan"))
    return model
"""


@pytest.fixture
def refused(martlet, tmp_path):
    """Runs, expects a refusal in one line, and gives the line."""

    def run(status, *arguments):
        before = sorted(tmp_path.rglob("*"))
        result = martlet(*arguments)
        assert (result.status, result.out) == (status, ""), result.err
        assert "Traceback" not in result.err
        assert result.err.startswith("martlet: ")
        assert result.err.count("\n") == 1
        assert sorted(tmp_path.rglob("*")) == before
        return result.err

    return run


@pytest.fixture
def compress(tiny, images, tmp_path):
    """Arguments of a job that would work."""
    return ["compress", *tiny, "--images", images, "--num-calib", 8, "--out", tmp_path / "out"]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], None),
        (["--version"], None),
        (["compres"], "compres"),
        (["list"], "WHAT"),
        (["list", "recipe"], "did you mean recipes"),
        (["compress", "timm:vit_tiny_patch16_224"], "--images"),
        (["compress", "--imagse"], "--images"),
        (["bench"], "MODEL"),
    ],
)
def test_arguments(martlet, arguments, said):
    result = martlet(*arguments)
    assert result.status == (0 if said is None else BAD_USE)
    assert (result.err == "") == (said is None)
    assert said is None or (said in result.err and result.err.count("\n") == 1)


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--recipe", "int9"], "there is no recipe 'int9'; did you mean int8"),
        (["--recipe", "bf16|int8"], "move"),
        (["--engine", "openvin"], "did you mean openvino"),
        (["--weights", "nowhere.safetensors"], "there is no weights file nowhere.safetensors"),
        (["--model-kwargs", "dept=2"], "dept"),
        (["--model-kwargs", "depth"], "name=value"),
        (["--model-kwargs", "{"], "no JSON"),
        (["--image-size", "33"], "can't take images of 33 × 33"),
        (["--image-size", "32,32,32"], "--image-size takes 1 or 2 whole numbers"),
        (["--mean", "0.5"], "--mean takes 3 numbers"),
        (["--interpolation", "cubic"], "bicubic"),
        (["--num-calib", "0"], "--num-calib"),
        (["--num-calib", "30"], "too few"),
        (["--threads", "0"], "--threads"),
        (["--num-classes", "3"], "class map"),
        (["--split", "tests"], "no split"),
        (["--class-map", "nowhere.json"], "nowhere.json"),
    ],
)
def test_options_of_compress(refused, compress, more, said):
    assert said in refused(BAD_USE, *compress, *more)


def test_an_unknown_model_gets_the_nearest_names(refused, images, tmp_path):
    said = refused(BAD_USE, "compress", "timm:vit_tny_patch16_224", "--images", images, "--out", tmp_path / "out")
    assert "did you mean vit_tiny_patch16_224" in said
    assert "did you mean timm:resnet18" in refused(BAD_USE, "eval", "resnet18", "--images", images)


def test_weights_that_do_not_fit(refused, compress, tmp_path):
    safetensors.torch.save_file({"blocks.0.extra": torch.zeros(1)}, tmp_path / "other.safetensors")
    said = refused(BAD_USE, *compress, "--weights", tmp_path / "other.safetensors")
    assert "1 unexpected (blocks.0.extra)" in said
    assert "missing" in said


def test_a_pickle_that_needs_code_is_refused(refused, compress, tmp_path):
    class Evil:
        def __reduce__(self):
            return (open, (str(tmp_path / "ran"), "w"))

    (tmp_path / "evil.pth").write_bytes(pickle.dumps({"w": Evil()}))
    torch.save({"w": Evil()}, tmp_path / "zipped.pth")
    for name in ("evil.pth", "zipped.pth"):
        refused(BAD_USE, *compress, "--weights", tmp_path / name)
    assert not (tmp_path / "ran").exists()
    assert "safetensors.torch.save_file" in refused(BAD_USE, *compress, "--weights", tmp_path / "zipped.pth")


def test_images_that_are_not_there(refused, tiny, images, tmp_path):
    (tmp_path / "empty").mkdir()
    for path, said in (
        (tmp_path / "empty", "no images"),
        (images.with_name(f"{images.name}s"), f"did you mean {images.name}"),
        (images / "class0" / "0.png", "neither a table nor a folder"),
    ):
        assert said in refused(BAD_USE, "eval", *tiny, "--images", path)


def test_too_many_unreadable_images_stop(refused, tiny, tmp_path):
    for i in range(10):
        (tmp_path / f"{i}.png").write_bytes(b"no image")
    assert "more than 5% of" in refused(BAD_USE, "eval", *tiny, "--images", tmp_path)


def test_images_to_learn_from_and_to_test_on_are_not_the_same(refused, compress, images):
    assert "are the same" in refused(BAD_USE, *compress, "--calib", images)
    assert "are the same" in refused(BAD_USE, *compress, "--calib", images, "--limit", 20)


def test_a_recipe_with_an_unknown_key(refused, compress, tmp_path):
    recipe = tmp_path / "mine.yaml"
    recipe.write_text("martlet: 1\npasses:\n  - int8:\n      range: mse\n")
    assert "int8 has no setting 'range'; did you mean ranges" in refused(BAD_USE, *compress, "--recipe", recipe)
    recipe.write_text("martlet: 1\npases: []\n")
    assert "did you mean passes" in refused(BAD_USE, *compress, "--recipe", recipe)


def test_an_engine_that_is_not_installed(refused, compress, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)  # what `import` finds when there is none
    said = refused(FAILED, *compress, "--engine", "onnxruntime")
    assert "isn't installed" in said
    assert "pip install 'martlet[onnxruntime]'" in said


def test_a_place_that_is_taken(refused, compress, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.tex").write_text("four years")
    assert "add --overwrite" in refused(BAD_USE, *compress)
    assert "is no artifact" in refused(BAD_USE, *compress, "--overwrite")
    assert (tmp_path / "out" / "thesis.tex").read_text() == "four years"


def test_a_place_that_cannot_be_made(refused, compress, tmp_path):
    (tmp_path / "file").write_text("")
    assert "is no folder; choose another --out" in refused(BAD_USE, *compress, "--out", tmp_path / "file" / "out")


def test_code_and_numbers_that_are_not_trusted(refused, images, tmp_path):
    (tmp_path / "net.py").write_text(CODE)
    sized = ("--image-size", "32", "--images", images)
    assert "--trust-code" in refused(BAD_USE, "eval", f"{tmp_path}/net.py:good", *sized)
    said = refused(FAILED, "eval", f"{tmp_path}/net.py:nan", *sized, "--trust-code")
    assert "NaN or infinity" in said


def test_layers_are_timed_on_engines_that_there_are_into_folders_that_there_are(refused, tiny):
    assert "did you mean openvino?" in refused(BAD_USE, "inspect", *tiny, "--engine", "openvin")
    assert "there is no folder" in refused(BAD_USE, "inspect", *tiny, "--html", "nowhere/page.html")


def test_what_is_no_artifact(refused, tiny, images, tmp_path):
    assert "is no artifact" in refused(BAD_USE, "report", tmp_path)
    assert "is no artifact" in refused(BAD_USE, "inspect", tmp_path)
    (tmp_path / "artifact.json").write_text('{"martlet_artifact": 99}')
    assert "version 99" in refused(FAILED, "report", tmp_path)
    assert "name it alone" in refused(BAD_USE, "eval", tmp_path, "--images", images, *tiny[1:])


@pytest.mark.parametrize(("signum", "said"), [(signal.SIGTERM, "terminated"), (signal.SIGINT, "interrupted")])
def test_stopped_while_measuring_it_leaves_nothing(martlet, compress, tmp_path, monkeypatch, signum, said):
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(scratch))
    before = signal.getsignal(signum)
    seen = []

    def measure(self, *arguments):
        seen.extend([*tmp_path.iterdir(), *scratch.iterdir()])
        signal.raise_signal(signum)

    monkeypatch.setattr("martlet.proof.Duel.measure", measure)
    result = martlet(*compress)
    assert len(seen) >= 3  # both folders, half written, and where they lie
    assert (result.status, result.out, result.err) == (128 + signum, "", f"martlet: {said}\n")
    assert list(tmp_path.iterdir()) == [scratch]
    assert not list(scratch.glob("tmp*"))  # torch keeps a cache of its own there
    assert signal.getsignal(signum) is before


def test_stopped_after_sessions_have_come_and_gone(tmp_path):
    done = subprocess.run([sys.executable, "-c", SESSIONS, tmp_path], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "interrupted\n")


def test_weights_of_the_last_of_a_cascade_are_beside_it_and_there_once(refused, tmp_path):
    rest = ("--images", "martlet:digits", "--max-drop", 1, "--out", tmp_path / "out")
    twice = refused(BAD_USE, "cascade", "martlet:digit_vit", "martlet:digit_vit=a.pt", "--weights", "b.pt", *rest)
    assert "martlet:digit_vit has weights twice: a.pt and --weights b.pt; leave one out" in twice
    assert "a.pt" in refused(BAD_USE, "cascade", "martlet:digit_vit", "martlet:digit_vit=a.pt", *rest)
