"""Artifact: a folder with the engine's files, the weights, the recipe, the preprocessing and the report.

It reloads without pickle, without data and without the weights it was made from; to run, and to be compressed further.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from martlet.core.errors import ArtifactError, MartletError, UsageError
from martlet.core.model import Model, Step
from martlet.core.recipe import Recipe

if TYPE_CHECKING:
    from PIL import Image

    from martlet.core.report import Document
    from martlet.data.preprocess import Preprocess
    from martlet.engine.base import Engine, Session

VERSION = 1
MANIFEST = "artifact.json"
WINNER = "winner"
"""Where the folder of a search has its artifact."""
OLD = "-old"
WEIGHTS = "weights.safetensors"


@dataclass(frozen=True)
class Artifact:
    """A reloaded artifact folder. `martlet.load(path)` makes one."""

    path: Path
    manifest: dict[str, Any]

    @property
    def engine(self) -> str:
        """The engine that it was made for."""
        return self.manifest["engine"]

    @property
    def precision(self) -> str:
        """What the engine computes the floating-point parts in."""
        return self.manifest["model"]["precision"]

    @cached_property
    def recipe(self) -> Recipe:
        return Recipe.from_yaml((self.path / "recipe.yaml").read_text(encoding="utf-8"), "recipe.yaml")

    @cached_property
    def report(self) -> Document:
        from martlet.core import report

        return report.read(self.path / "report.json")

    @cached_property
    def preprocess(self) -> Preprocess:
        from martlet.data.preprocess import Preprocess

        return Preprocess.from_json(json.loads((self.path / "preprocess.json").read_text(encoding="utf-8")))

    @property
    def class_names(self) -> tuple[str, ...] | None:
        names = self.manifest["model"]["class_names"]
        return tuple(names) if names else None

    def open(self, *, batch: int = 1, threads: int | None = None, trust_code: bool = False) -> Session:
        """Compiles the artifact's own engine files for a batch size.

        trust_code: run the Python file that the model came from, if it came from one and the engine is torch.

        Raises:
            EngineError: the engine isn't installed here or refuses the files.
            UsageError: the engine needs code that isn't trusted.
        """
        from martlet import engine

        return engine.get(self.engine).open(
            self.path, batch=batch, precision=self.precision, threads=threads, trust_code=trust_code
        )

    @cached_property
    def _single(self) -> Session:
        return self.open()

    def __call__(self, images: Image.Image | Sequence[Image.Image]) -> np.ndarray:
        """Logits (B, K) of one PIL image or several, preprocessed as the model wants them."""
        several = images if isinstance(images, Sequence) else [images]
        return np.concatenate([self._single(self.preprocess(image)[None]) for image in several])

    def model(self, *, trust_code: bool = False) -> Model:
        """The compressed model in torch, from its tensors and records alone, ready for more techniques.

        trust_code: run the Python file again that the model came from, if it came from one.

        Raises:
            ArtifactError: this version of the host library or of torch gives another structure.
            UsageError: the model came from a Python file, and it isn't trusted.
        """
        import safetensors.torch

        from martlet import source
        from martlet.core import pipeline

        saved = self.manifest["model"]
        model = Model(
            name=str(self.path),
            module=source.rebuild(saved["origin"], trust_code=trust_code),
            preprocess=self.preprocess,
            num_classes=saved["num_classes"],
            origin=saved["origin"],
            class_names=self.class_names,
        )
        steps = [Step.from_json(each) for each in self.manifest["steps"]]
        try:
            pipeline.restore_(model, steps)
            safetensors.torch.load_model(model.module, str(self.path / WEIGHTS))
        except (KeyError, RuntimeError) as error:
            made, line = self.report["environment"]["versions"], str(error).strip().splitlines()[0]
            wanted = " ".join(f"{name}=={made[name]}" for name in ("torch", "timm") if name in made)
            raise ArtifactError(
                f"{self.path} rebuilds to another structure with the libraries installed here ({line}); "
                f"it was made with {wanted}"
            ) from error
        return model


def find(path: str | Path) -> Path | None:
    """Where the artifact lies that a path names: there, or in a search's folder its winner; None if there is none."""
    return next((folder for folder in (Path(path), Path(path) / WINNER) if (folder / MANIFEST).is_file()), None)


def load(path: str | Path) -> Artifact:
    """Opens an artifact folder, or a search's winner, and checks that every file is there and as it was written.

    Raises:
        UsageError: it is no artifact.
        ArtifactError: of another version, incomplete or damaged; says which file.
    """
    path = find(path) or Path(path)
    try:
        manifest = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        raise UsageError(f"{path} is no artifact: it has no {MANIFEST}; `martlet compress … --out` makes one") from None
    except ValueError:
        raise ArtifactError(f"{path / MANIFEST} is damaged: it is not JSON") from None
    version = manifest.get("martlet_artifact") if isinstance(manifest, dict) else None
    if version != VERSION or not isinstance(manifest.get("files"), dict):
        raise ArtifactError(f"{path} is an artifact of version {version}; this Martlet reads version {VERSION}")
    for name, expected in manifest["files"].items():
        if Path(name).name != name:
            raise ArtifactError(f"{path / MANIFEST} names a file outside the artifact: {name!r}")
        file = path / name
        if not file.is_file():
            raise ArtifactError(f"{path} is incomplete: {name} is missing; compress again with --overwrite")
        if file.stat().st_size != expected["bytes"] or _sha256(file) != expected["sha256"]:
            raise ArtifactError(f"{path} is damaged: {name} is not what was written; compress again with --overwrite")
    return Artifact(path, manifest)


def check_free(path: Path, overwrite: bool) -> None:
    """Refuses, before any work is done, a folder that can't or mustn't be replaced.

    Raises:
        UsageError: it exists and --overwrite wasn't given, it holds something that is no artifact, or it can't be made.
    """
    above = next(folder for folder in path.absolute().parents if folder.exists())
    if not above.is_dir() or not os.access(above, os.W_OK):
        why = "may not be written to" if above.is_dir() else "is no folder"
        raise UsageError(f"{path} can't be made, because {above} {why}; choose another --out")
    if not path.exists() or (path.is_dir() and not any(path.iterdir())):
        return
    if not overwrite:
        raise UsageError(f"{path} exists; add --overwrite to replace it, or choose another --out")
    if not (path / MANIFEST).is_file():
        raise UsageError(f"{path} is no artifact, so --overwrite leaves it alone; choose another --out")


@contextlib.contextmanager
def writing(path: Path, overwrite: bool = False) -> Iterator[Path]:
    """Gives a new folder beside `path`, which takes its name if the block ends well, and vanishes if it doesn't.

    Raises:
        UsageError: as `check_free`.
        MartletError: the disk is full.
    """
    prefix = f".{path.name}.partial-"
    for stale in sorted(path.parent.glob(f"{prefix}*")):
        pid = stale.name.removeprefix(prefix).split("-")[0]
        if pid.isdigit() and not _alive(int(pid)):
            if stale.name.endswith(OLD) and not path.exists():  # killed between the two renames below
                stale.rename(path)
            else:
                shutil.rmtree(stale)
    check_free(path, overwrite)
    path.parent.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix=f"{prefix}{os.getpid()}-", dir=path.parent))
    folder.chmod(0o755)
    try:
        yield folder
        check_free(path, overwrite)
        if path.exists():
            old = folder.with_name(folder.name + OLD)
            path.rename(old)
            try:
                folder.rename(path)
            except BaseException:
                old.rename(path)
                raise
            shutil.rmtree(old)
        else:
            folder.rename(path)
    except Exception as error:
        # safetensors raises an error of its own, which names the system's only in its text
        if getattr(error, "errno", None) == errno.ENOSPC or f"os error {errno.ENOSPC})" in str(error):
            raise MartletError(f"the disk of {path.parent.resolve()} is full; nothing was left behind") from error
        raise
    finally:
        if folder.exists():
            shutil.rmtree(folder)


def write_model(folder: Path, model: Model, engine: Engine, traced: Model | None = None) -> list[str]:
    """Writes what runs and what rebuilds: engine files, weights, recipe, preprocessing. Returns the engine files.

    traced: the model's `pipeline.traced`, where there is one already.
    """
    import safetensors.torch

    files = engine.lower(traced or model, folder)
    safetensors.torch.save_model(model.module, str(folder / WEIGHTS))
    recipe = Recipe(tuple(step.technique for step in model.steps))
    (folder / "recipe.yaml").write_text(recipe.to_yaml(), encoding="utf-8")
    _write_json(folder / "preprocess.json", model.preprocess.to_json())
    return files or [WEIGHTS]


def seal(folder: Path, model: Model, engine: str, engine_files: Sequence[str]) -> None:
    """Writes the manifest, last: with it the folder is an artifact."""
    from martlet import engine as engines

    files = {
        file.name: {"bytes": file.stat().st_size, "sha256": _sha256(file)}
        for file in sorted(folder.iterdir())
        if file.name != MANIFEST
    }
    manifest = {
        "martlet_artifact": VERSION,
        "engine": engine,
        "engine_files": list(engine_files),
        "model": {
            "name": model.name,
            "num_classes": model.num_classes,
            "class_names": model.class_names,
            "origin": model.origin,
            "precision": model.precision,
            "simulated": engines.get(engine).simulates(model),
        },
        "steps": [step.to_json() for step in model.steps],
        "files": files,
    }
    _write_json(folder / MANIFEST, manifest)


def write_report(folder: Path, document: Document) -> None:
    """Writes report.json and the page."""
    from martlet.report import html

    _write_json(folder / "report.json", document)
    html.write(document, folder / "report.html")


def _write_json(path: Path, data: Any) -> None:
    path.write_text(json.dumps(data, indent=1, ensure_ascii=False, allow_nan=False) + "\n", encoding="utf-8")


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
