"""A run that is killed, which it can't answer: the place it writes to is as before, and the next run cleans up."""

import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest


@pytest.fixture
def out(tmp_path: Path) -> Path:
    folder = tmp_path / "models"
    folder.mkdir()
    return folder / "vit"


@pytest.fixture
def arguments(tiny: list[str], images: Path, out: Path) -> list[object]:
    """The cheapest job there is that writes everything."""
    return ["compress", *tiny, "--images", images, "--recipe", "none", "--engine", "torch", "--limit", 8, "--out", out]


@pytest.fixture
def kill(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    """Starts `martlet ARGUMENTS…`, kills it once the file appears in the folder it writes, and gives that folder."""
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    monkeypatch.setenv("TMPDIR", str(scratch))  # what it can't clean up there goes with this test

    def run(out: Path, file: str, *arguments: object, folder: str = "partial-{pid}-*") -> Path:
        code = "import sys; from martlet.cli import main; sys.exit(main())"
        command = [sys.executable, "-c", code, *map(str, arguments)]
        with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as process:
            pattern = f".{out.name}.{folder.format(pid=process.pid)}/{file}"
            while not (found := list(out.parent.glob(pattern))):
                assert process.poll() is None, process.stderr and process.stderr.read()
                time.sleep(0.01)
            process.kill()
        return found[0].parent

    return run


def contents(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def test_nothing_is_left_in_its_place_and_the_next_run_cleans_up(martlet, kill, arguments, out):
    half = kill(out, "weights.safetensors", *arguments)
    assert list(out.parent.iterdir()) == [half]  # and no `out`
    assert not (half / "report.json").exists()
    assert martlet("report", half).status != 0
    done = martlet(*arguments)
    assert done.status in (0, 3), done.err
    assert list(out.parent.iterdir()) == [out]


@pytest.mark.slow
def test_what_was_there_stays_until_the_new_is_whole(martlet, kill, arguments, out):
    done = martlet(*arguments)
    assert done.status in (0, 3), done.err
    before = contents(out)
    half = kill(out, "artifact.json", *arguments, "--overwrite")
    assert contents(out) == before
    assert sorted(out.parent.iterdir()) == sorted([out, half])
    assert martlet("report", out).status == 0
    refused = martlet(*arguments)
    assert (refused.status, contents(out)) == (2, before)
    done = martlet(*arguments, "--overwrite", "--seed", 1)
    assert done.status in (0, 3), done.err
    assert list(out.parent.iterdir()) == [out]
    assert json.loads((out / "report.json").read_text())["command"].endswith("--overwrite --seed 1")


@pytest.mark.slow
def test_learning_goes_on_where_it_was_killed(martlet, kill, arguments, out, tmp_path):
    recipe = tmp_path / "learned.yaml"
    recipe.write_text("martlet: 1\npasses:\n  - uniform: {steps: 150}\n")
    learning = [recipe if argument == "none" else argument for argument in arguments] + ["--num-calib", 4]
    kept = kill(out, "*.safetensors", *learning, folder="resume")
    assert [file.suffix for file in kept.iterdir()] in ([".safetensors"], [".safetensors", ".partial"])
    assert not out.exists()
    done = martlet(*learning)
    assert done.status in (0, 3), done.err
    assert list(out.parent.iterdir()) == [out]
    resumed = contents(out)["weights.safetensors"]
    done = martlet(*learning, "--overwrite")
    assert contents(out)["weights.safetensors"] == resumed
