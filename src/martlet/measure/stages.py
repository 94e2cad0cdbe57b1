"""How long each stage takes of a model that can stop early."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from martlet.core.technique import Progress, silent
from martlet.measure import latency

if TYPE_CHECKING:
    from martlet.core.model import Model


def stage_ms(
    model: Model, engine: str, image: np.ndarray, seed: int = 0, progress: Progress = silent
) -> list[float]:
    """Median milliseconds of each stage on an image, float32 (1, 3, H, W), at batch 1, interleaved, as if it never left.

    Raises:
        EngineError: the engine can't take the model.
    """
    from martlet import engine as engines
    from martlet.core import store
    from martlet.engine.staged import StagedSession

    target = engines.get(engine)
    with tempfile.TemporaryDirectory() as folder:
        progress(f"write stages for {engine}", 0, 1)
        store.seal(Path(folder), model, engine, store.write_model(Path(folder), model, target))
        session = target.open(Path(folder), precision=model.precision, trust_code=True)
        assert isinstance(session, StagedSession)
        runs = {str(k): run for k, run in enumerate(session.alone(image))}
        return [float(np.median(ms)) for ms in latency.interleave(runs, seed=seed, progress=progress).values()]
