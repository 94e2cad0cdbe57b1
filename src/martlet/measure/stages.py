"""Models that can stop early: how long each stage takes, and where images leave."""

from __future__ import annotations

import tempfile
from collections.abc import Collection, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np

from martlet.core.technique import Progress, silent
from martlet.measure import accuracy, latency
from martlet.measure.pictures import class_name, thumbnail

if TYPE_CHECKING:
    from martlet.core.model import Model
    from martlet.core.report import ExitExample, Exits, ExitShare
    from martlet.data.images import Images
    from martlet.data.preprocess import Preprocess
    from martlet.engine.staged import StagedSession
    from martlet.measure.accuracy import Logits

BATCH = 8
"""Images that are decoded at once."""


def stage_ms(model: Model, engine: str, image: np.ndarray, seed: int = 0, progress: Progress = silent) -> list[float]:
    """Median milliseconds of each stage at batch 1, interleaved, on an image, float32 (1, 3, H, W), that never leaves.

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
        return times(session, image, seed, progress)


def times(session: StagedSession, image: np.ndarray, seed: int = 0, progress: Progress = silent) -> list[float]:
    """Median milliseconds of each stage on an image that doesn't leave, interleaved."""
    runs = {str(k): run for k, run in enumerate(session.alone(image))}
    return [float(np.median(ms)) for ms in latency.interleave(runs, seed=seed, progress=progress).values()]


def spread(exits: np.ndarray, n: int) -> np.ndarray:
    """Which n of the images, or all, in order, so that as large a share leaves at each exit (N,) as of all."""
    count = min(n, len(exits))
    return np.sort(np.argsort(exits, kind="stable")[((np.arange(count) + 0.5) * len(exits) / count).astype(int)])


def pick(images: Images, preprocess: Preprocess, chosen: np.ndarray, seed: int) -> np.ndarray:
    """The chosen of the readable images (n, 3, H, W), shuffled."""
    from martlet.data.batches import batches

    found = gather((batch for batch, _, _ in batches(images, preprocess, BATCH)), chosen.tolist())
    return np.stack([*found.values()])[np.random.default_rng(seed).permutation(len(found))]


def gather(batches: Iterable[np.ndarray], chosen: Collection[int]) -> dict[int, np.ndarray]:
    """The chosen of images that come in batches (B, 3, H, W), by their number."""
    wanted, found, start = set(chosen), dict[int, np.ndarray](), 0
    for batch in batches:
        found |= {i: image for i, image in enumerate(batch, start) if i in wanted}
        start += len(batch)
        if len(found) == len(wanted):
            break
    return found


def shares(session: StagedSession, found: Logits, which: str) -> list[dict[str, Any]]:
    """Of each stage the share of images that left after it, how many of them were right, and what it costs."""
    exits, values, told = found.exits[which], found.values[which], list[dict[str, Any]]()
    for k, step in enumerate(session.steps):
        rows = np.flatnonzero(exits == k)
        labels = [found.labels[i] for i in rows]
        told.append(
            {
                "share_pct": 100 * len(rows) / len(exits),
                "top1_pct": accuracy.topk_pct(values[rows], labels, 1) if len(rows) else None,
                "gmacs": step.macs / 1e9,
            }
        )
    return told


def left(
    session: StagedSession,
    found: Logits,
    which: str,
    ms: Sequence[float],
    names: tuple[str, ...] | None,
    test: Images,
) -> Exits:
    """What a report says of where the images left. ms: of each stage."""
    told = shares(session, found, which)
    stages = [cast("ExitShare", each | {"latency_ms": sum(ms[: k + 1])}) for k, each in enumerate(told)]
    return {
        "stages": stages,
        "mean_gmacs": sum(each["share_pct"] * each["gmacs"] for each in stages) / 100,
        "max_gmacs": stages[-1]["gmacs"],
        "examples": _examples(found, which, names, test),
    }


def _examples(found: Logits, which: str, names: tuple[str, ...] | None, test: Images, n: int = 4) -> list[ExitExample]:
    """The first n images that left first, and the first n that left last."""
    exits, values = found.exits[which], found.values[which]
    order = np.argsort(exits, kind="stable")
    chosen = dict.fromkeys([*order[:n].tolist(), *np.sort(np.argsort(-exits, kind="stable")[:n]).tolist()])
    examples: dict[int, ExitExample] = {}
    for i, (record, picture) in enumerate(test.map(thumbnail)):
        if i in chosen:
            examples[i] = {
                "image": record.name,
                "label": None if record.label is None else class_name(names, record.label),
                "artifact": class_name(names, int(values[i].argmax())),
                "stage": int(exits[i]) + 1,
                "jpeg_base64": picture,
            }
        if len(examples) == len(chosen):
            break
    return [examples[i] for i in chosen if i in examples]
