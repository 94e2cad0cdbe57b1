"""Artifacts are whole or not there, and what is damaged says so."""

import errno
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from martlet.core import store
from martlet.core.errors import ArtifactError, MartletError, UsageError
from martlet.engine.torch import Torch
from martlet.source import load_model

TINY = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 1, "num_heads": 2}


@pytest.fixture(scope="module")
def written(tmp_path_factory) -> Path:
    """An artifact of an untouched tiny model for the torch engine."""
    out = tmp_path_factory.mktemp("store") / "artifact"
    model = load_model("timm:vit_tiny_patch16_224", model_kwargs=TINY, num_classes=3, seed=7)
    with store.writing(out) as folder:
        files = store.write_model(folder, model, Torch())
        store.seal(folder, model, "torch", files)
    return out


@pytest.fixture
def artifact(written, tmp_path) -> Path:
    """A copy that a test may damage."""
    copy = tmp_path / "artifact"
    copy.mkdir()
    for file in written.iterdir():
        (copy / file.name).write_bytes(file.read_bytes())
    return copy


def edit_manifest(artifact: Path, **changes: object) -> None:
    path = artifact / store.MANIFEST
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def make_artifact(path: Path) -> Path:
    """The least that counts as an artifact when a folder is to be replaced."""
    path.mkdir()
    (path / store.MANIFEST).write_text("{}")
    (path / "old").touch()
    return path


class TestWriting:
    def test_takes_its_name_at_the_end(self, tmp_path):
        out = tmp_path / "deep" / "out"
        with store.writing(out) as folder:
            (folder / "file").write_text("x")
            assert folder.parent == out.parent
            assert not out.exists()
        assert [file.name for file in out.iterdir()] == ["file"]
        assert os.listdir(out.parent) == ["out"]
        assert out.stat().st_mode & 0o777 == 0o755

    def test_vanishes_when_the_block_fails(self, tmp_path):
        out = tmp_path / "out"

        def fail_half_way() -> None:
            with store.writing(out) as folder:
                (folder / "file").write_text("x")
                raise ZeroDivisionError

        with pytest.raises(ZeroDivisionError):
            fail_half_way()
        assert os.listdir(tmp_path) == []

    def test_a_failure_leaves_the_old_artifact(self, tmp_path):
        out = make_artifact(tmp_path / "out")
        with pytest.raises(ZeroDivisionError), store.writing(out, overwrite=True):
            raise ZeroDivisionError
        assert sorted(os.listdir(out)) == [store.MANIFEST, "old"]
        assert os.listdir(tmp_path) == ["out"]

    def test_overwrite_replaces_an_artifact_whole(self, tmp_path):
        out = make_artifact(tmp_path / "out")
        with store.writing(out, overwrite=True) as folder:
            (folder / "new").touch()
        assert os.listdir(out) == ["new"]
        assert os.listdir(tmp_path) == ["out"]

    def test_an_existing_folder_needs_overwrite(self, tmp_path):
        out = make_artifact(tmp_path / "out")
        with pytest.raises(UsageError) as error, store.writing(out):
            pytest.fail("the block must not run")
        assert str(error.value) == f"{out} exists; add --overwrite to replace it, or choose another --out"

    def test_overwrite_leaves_what_is_no_artifact(self, tmp_path):
        (tmp_path / "photos").mkdir()
        (tmp_path / "photos" / "a.jpg").touch()
        with pytest.raises(UsageError, match=r"photos is no artifact, so --overwrite leaves it alone"):
            store.check_free(tmp_path / "photos", overwrite=True)
        (tmp_path / "file").touch()
        with pytest.raises(UsageError, match=r"file is no artifact, so --overwrite leaves it alone"):
            store.check_free(tmp_path / "file", overwrite=True)
        assert (tmp_path / "photos" / "a.jpg").exists()

    def test_an_empty_folder_is_free(self, tmp_path):
        (tmp_path / "out").mkdir()
        with store.writing(tmp_path / "out") as folder:
            (folder / "file").touch()
        assert os.listdir(tmp_path / "out") == ["file"]

    def test_what_appears_in_the_meantime_is_not_replaced(self, tmp_path):
        out = tmp_path / "out"
        with pytest.raises(UsageError, match="exists; add --overwrite"), store.writing(out):
            make_artifact(out)
        assert (out / "old").exists()
        assert os.listdir(tmp_path) == ["out"]

    def test_a_full_disk_is_one_line_and_leaves_nothing(self, tmp_path):
        def run_out_of_space() -> None:
            with store.writing(tmp_path / "out") as folder:
                (folder / "half").write_text("x")
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(folder / "half"))

        with pytest.raises(MartletError) as error:
            run_out_of_space()
        assert str(error.value) == f"the disk of {tmp_path} is full; nothing was left behind"
        assert os.listdir(tmp_path) == []

    def test_another_failure_of_the_disk_is_itself(self, tmp_path):
        with pytest.raises(OSError, match="Input/output error"), store.writing(tmp_path / "out"):
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        assert os.listdir(tmp_path) == []

    @pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="the system has no SIGKILL")
    def test_a_killed_run_leaves_no_artifact_and_the_next_one_cleans_up(self, tmp_path):
        out = tmp_path / "out"
        code = f"""
import sys, time
from pathlib import Path
from martlet.core import store
with store.writing(Path({str(out)!r})) as folder:
    (folder / "half").write_text("x")
    print("ready", flush=True)
    time.sleep(60)
"""
        with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout is not None
            assert process.stdout.readline() == "ready\n"
            process.kill()
        assert process.returncode == -signal.SIGKILL
        assert not out.exists()
        [partial] = os.listdir(tmp_path)
        assert partial.startswith(f".out.partial-{process.pid}-")
        with store.writing(out) as folder:
            (folder / "file").touch()
        assert os.listdir(tmp_path) == ["out"]

    def test_a_run_under_way_is_left_alone(self, tmp_path):
        with store.writing(tmp_path / "out") as first:
            with store.writing(tmp_path / "out") as second:
                assert first.exists()
                (second / "file").touch()
            assert first.exists()
            (tmp_path / "out" / "file").unlink()
        assert os.listdir(tmp_path / "out") == []


class TestLoad:
    def test_reloads_what_was_written(self, written):
        artifact = store.load(written)
        assert (artifact.engine, artifact.precision, artifact.recipe.passes) == ("torch", "f32", ())
        assert set(artifact.manifest["files"]) == {"weights.safetensors", "recipe.yaml", "preprocess.json"}
        model = load_model("timm:vit_tiny_patch16_224", model_kwargs=TINY, num_classes=3, seed=7)
        assert artifact.preprocess == model.preprocess
        images = torch.randn(2, 3, 32, 32)
        with torch.inference_mode():
            assert torch.equal(artifact.model().module(images), model.module(images))

    def test_nothing_in_it_is_pickle(self, written):
        for file in written.iterdir():
            start = file.read_bytes()[:2]
            assert start[:1] != b"\x80", f"{file.name} is a pickle"
            assert start != b"PK", f"{file.name} is a zip, as pickled checkpoints are"

    def test_no_folder(self, tmp_path):
        with pytest.raises(UsageError, match=r"gone is no artifact: it has no artifact\.json; `martlet compress"):
            store.load(tmp_path / "gone")

    def test_a_file_is_no_artifact(self, tmp_path):
        (tmp_path / "file").touch()
        with pytest.raises(UsageError, match=r"file is no artifact"):
            store.load(tmp_path / "file")

    def test_a_manifest_that_is_no_json(self, artifact):
        (artifact / store.MANIFEST).write_text("{")
        with pytest.raises(ArtifactError, match=r"artifact\.json is damaged: it is not JSON"):
            store.load(artifact)

    def test_another_version(self, artifact):
        edit_manifest(artifact, martlet_artifact=2)
        with pytest.raises(ArtifactError, match=r"is an artifact of version 2; this Martlet reads version 1"):
            store.load(artifact)

    @pytest.mark.parametrize("name", ["weights.safetensors", "recipe.yaml", "preprocess.json"])
    def test_a_missing_file_is_named(self, artifact, name):
        (artifact / name).unlink()
        with pytest.raises(ArtifactError, match=rf"is incomplete: {name} is missing; compress again with --overwrite"):
            store.load(artifact)

    def test_a_truncated_file_is_named(self, artifact):
        file = artifact / "weights.safetensors"
        file.write_bytes(file.read_bytes()[:-1])
        with pytest.raises(ArtifactError, match=r"is damaged: weights\.safetensors is not what was written"):
            store.load(artifact)

    def test_one_changed_bit_is_noticed(self, artifact):
        file = artifact / "weights.safetensors"
        data = bytearray(file.read_bytes())
        data[-1] ^= 1
        file.write_bytes(data)
        with pytest.raises(ArtifactError, match=r"is damaged: weights\.safetensors is not what was written"):
            store.load(artifact)

    @pytest.mark.parametrize("name", ["../secret", "/etc/hostname", "sub/file"])
    def test_a_path_outside_is_refused(self, artifact, name):
        manifest = json.loads((artifact / store.MANIFEST).read_text())
        edit_manifest(artifact, files=manifest["files"] | {name: {"bytes": 0, "sha256": ""}})
        with pytest.raises(ArtifactError) as error:
            store.load(artifact)
        assert str(error.value).endswith(f"names a file outside the artifact: {name!r}")

    def test_weights_that_do_not_fit_name_the_versions(self, artifact):
        manifest = json.loads((artifact / store.MANIFEST).read_text())
        manifest["model"]["origin"]["kwargs"]["embed_dim"] = 48
        edit_manifest(artifact, model=manifest["model"])
        (artifact / "report.json").write_text(
            json.dumps({"martlet_report": 1, "environment": {"versions": {"torch": "1.2.3", "timm": "4.5.6"}}})
        )
        with pytest.raises(
            ArtifactError, match=r"rebuilds to another structure .*made with torch==1\.2\.3 timm==4\.5\.6"
        ):
            store.load(artifact).model()
