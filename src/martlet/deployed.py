"""Models and artifacts as an engine runs them."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from martlet import engine as engines
from martlet.core import store
from martlet.core.model import Model
from martlet.core.store import Artifact
from martlet.core.technique import Progress, silent

if TYPE_CHECKING:
    from martlet.data.preprocess import Preprocess
    from martlet.engine.base import Engine, Session


@dataclass(frozen=True, kw_only=True)
class Deployed:
    """A model as the files of an engine; batch size and threads are chosen on opening them."""

    name: str
    engine: Engine
    folder: Path
    files: Sequence[str]
    precision: str
    preprocess: Preprocess
    num_classes: int
    simulated: bool
    trust_code: bool

    def open(self, batch: int, threads: int | None, leaving: bool = True) -> Session:
        """leaving: False runs every stage of what can stop early."""
        from martlet.engine.staged import StagedSession

        session = self.engine.open(
            self.folder, batch=batch, precision=self.precision, threads=threads, trust_code=self.trust_code
        )
        if isinstance(session, StagedSession):
            session.leaving = leaving
        return session

    def describe(self, session: Session) -> dict[str, Any]:
        return {
            "model": self.name,
            "engine": {"name": self.engine.name, "version": self.engine.version()},
            "precision": self.precision,
            "threads": session.threads,
            "simulated": self.simulated,
        }


def resolved(model: str | Path | Artifact | Model, trust_code: bool) -> Artifact | Model:
    """What a path or a name stands for."""
    from martlet.source import load_model

    if not isinstance(model, str | Path):
        return model
    return store.load(model) if store.find(model) else load_model(str(model), trust_code=trust_code)


@contextmanager
def deploy(
    model: str | Path | Artifact | Model,
    engine: str | None = None,
    trust_code: bool = False,
    progress: Progress = silent,
) -> Iterator[Deployed]:
    """An artifact as it lies, unless another engine is asked for; a model lowered to a folder that vanishes after.

    trust_code: run the Python file that it comes from, where that is needed.

    Raises:
        MartletError: it can't be loaded, or the engine can't take it.
    """
    asked = None if engine is None else engines.get(engine)
    model = resolved(model, trust_code)
    if isinstance(model, Artifact):
        saved = model.manifest["model"]
        own = engines.get(model.engine)
        if asked is None or asked.name == own.name:
            yield Deployed(
                name=str(model.path),
                engine=own,
                folder=model.path,
                files=model.manifest["engine_files"],
                precision=model.precision,
                preprocess=model.preprocess,
                num_classes=saved["num_classes"],
                simulated=saved["simulated"],
                trust_code=trust_code,
            )
            return
        model = model.model(trust_code=trust_code)
    target = asked or engines.get("openvino")
    target.version()
    with tempfile.TemporaryDirectory() as folder:
        progress(f"write for {target.name}", 0, 1)
        files = store.write_model(Path(folder), model, target)
        store.seal(Path(folder), model, target.name, files)
        yield Deployed(
            name=model.name,
            engine=target,
            folder=Path(folder),
            files=files,
            precision=model.precision,
            preprocess=model.preprocess,
            num_classes=model.num_classes,
            simulated=target.simulates(model),
            trust_code=True,  # whoever has the model in hand has trusted its code
        )
