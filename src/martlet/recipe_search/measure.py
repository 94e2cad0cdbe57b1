"""What the engine makes of recipes: compressed for good, run on many images, timed in turns with the references."""

from __future__ import annotations

import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from martlet.core import pipeline, store
from martlet.core.errors import UsageError
from martlet.core.recipe import Recipe
from martlet.core.technique import Batches, Context, Progress
from martlet.recipe_search import confidence, space
from martlet.recipe_search.folder import Folder
from martlet.recipe_search.recipes import split
from martlet.recipe_search.screen import losses, work

if TYPE_CHECKING:
    from martlet.core.model import Model
    from martlet.data.images import Images
    from martlet.data.preprocess import Preprocess
    from martlet.engine.base import Engine, Session

BATCH = 8
"""Images a call when final losses are measured; latency is measured at batch 1."""
FLOAT = Recipe()
"""The untouched model, of whose time all others are told as a ratio."""


@dataclass
class Measure:
    """Compresses recipes into the folder, and measures them on the engine.

    calibration: images that techniques learn from. pool: images that losses are measured on while there is a search.
    """

    source: Model
    engine: Engine
    folder: Folder
    calibration: Batches
    pool: Batches
    threads: int | None
    seed: int
    progress: Progress

    @property
    def context(self) -> Context:
        return space.context(self.engine, self.calibration, self.seed, self.progress)

    def files(self, recipe: Recipe) -> Path:
        """The artifact of what makes a recipe's files, compressed now unless it was before.

        Raises:
            MartletError: the model or the engine can't take it, or the engine only simulates it.
        """
        recipe, _ = split(recipe)
        path = self.folder.candidates / recipe.digest()
        if not (path / store.MANIFEST).is_file():
            start = time.perf_counter()
            model = pipeline.run(self.source, recipe, self.context)
            graph = pipeline.traced(model)  # once for all
            if self.engine.simulates(model):
                raise UsageError(f"{self.engine.name} only simulates this recipe")
            with store.writing(path, overwrite=False) as folder:
                store.seal(folder, model, self.engine.name, store.write_model(folder, model, self.engine, graph))
            integer, floating = work(graph)
            seconds = round(time.perf_counter() - start, 3)
            found = {"integer_macs": integer, "float_macs": floating, "seconds": seconds}
            self.folder.put("compressed", recipe.digest(), found)
        return path

    def precision(self, recipe: Recipe) -> str:
        """What the engine computes a recipe's floating-point parts in."""
        return pipeline.run(_without_weights(self.source), split(recipe)[1], self.context).precision

    def artifact(self, recipe: Recipe, folder: Path) -> None:
        """Writes a recipe's artifact, without a report, into a new folder."""
        path, (_, engine) = self.files(recipe), split(recipe)
        shutil.copytree(path, folder, dirs_exist_ok=True)
        if engine.passes:
            model = self.model(recipe)
            (folder / "recipe.yaml").write_text(recipe.to_yaml(), encoding="utf-8")
            store.seal(folder, model, self.engine.name, store.load(path).manifest["engine_files"])

    def model(self, recipe: Recipe) -> Model:
        """The compressed model in torch, as its artifact has it."""
        model = store.load(self.files(recipe)).model(trust_code=True)  # whoever searches has trusted the code
        model.name = self.source.name
        return pipeline.run(model, split(recipe)[1], self.context)

    def measure(self, recipes: Sequence[Recipe]) -> dict[str, dict[str, Any]]:
        """By digest, the losses on the pool and the time of each; in one interleaved run with the untouched model.

        A time is told as that of the untouched model in the first run, over how much faster this is in its own.
        """
        self.progress("compress", 0, len(recipes))
        named = {"float": FLOAT} | {recipe.digest(): recipe for recipe in recipes if recipe != FLOAT}
        start = time.perf_counter()
        sessions = self.opened(named, batch=1)
        preprocess = {name: self.preprocess(recipe) for name, recipe in named.items()}
        times = self.turns(sessions, preprocess)
        logits = {name: self._logits(session, preprocess[name]) for name, session in sessions.items()}
        seconds = round((time.perf_counter() - start) / len(named), 3)
        first = self.folder.get("measured", FLOAT.digest())
        float_ms = first["latency_ms"] if first else float(np.median(times["float"]))
        found = {}
        for name, recipe in named.items():
            if recipe == FLOAT and first:
                continue
            path = self.files(recipe)
            found[recipe.digest()] = {
                "recipe": recipe.to_yaml(),
                **losses(logits["float"], logits[name]),
                **latency(float_ms, times["float"], times[name], self.seed),
                "file_bytes": self.file_bytes(path),
                "precision": self.precision(recipe),
                **self.folder.get("compressed", path.name),
                "measured_seconds": seconds,
            }
        return found

    def final(
        self, recipes: Mapping[str, Recipe], peers: Mapping[str, Path], images: Images
    ) -> dict[str, dict[str, Any]]:
        """By name, everything on images that no search has seen, in one run; the first name is the untouched model."""
        from martlet.measure import accuracy, memory

        [reference, *_] = recipes
        sessions = self.opened(recipes, BATCH, peers)
        preprocess = {name: self.preprocess(recipe) for name, recipe in recipes.items()}
        preprocess |= {name: store.load(path).preprocess for name, path in peers.items()}
        outcome = accuracy.logits(sessions, images, preprocess, self.progress)
        times = self.turns(self.opened(recipes, 1, peers), preprocess)
        labels, found = outcome.labels, {}
        known = np.array([label is not None for label in labels])
        wanted = np.array([-1 if label is None else label for label in labels])
        float_ms = float(np.median(times[reference]))
        for name, logits in outcome.values.items():
            self.progress("measure memory", len(found), len(outcome.values))
            path = peers[name] if name in peers else self.files(recipes[name])
            precision = store.load(path).precision if name in peers else self.precision(recipes[name])
            entry = {
                **losses(outcome.values[reference], logits),
                **latency(float_ms, times[reference], times[name], self.seed),
                "file_bytes": self.file_bytes(path),
                "memory_bytes": memory.peak_rss_bytes(self.engine.name, path, precision, self.threads, trust_code=True),
            }
            if known.any():
                right = logits.argmax(1)[known] == wanted[known]
                was = outcome.values[reference].argmax(1)[known] == wanted[known]
                for key, values in (("top1", confidence.share_pct(right)), ("drop", confidence.drop(was, right))):
                    entry |= dict(zip((f"{key}_pct", f"{key}_low_pct", f"{key}_high_pct"), values, strict=True))
                entry["n_images"] = int(known.sum())
            found[name] = entry
        return found

    def opened(
        self, recipes: Mapping[str, Recipe], batch: int, peers: Mapping[str, Path] | None = None
    ) -> dict[str, Session]:
        """What runs each."""
        sessions = {}
        for i, (name, recipe) in enumerate(recipes.items()):
            self.progress("compress and compile", i, len(recipes))
            path, precision = self.files(recipe), self.precision(recipe)
            sessions[name] = self.engine.open(
                path, batch=batch, precision=precision, threads=self.threads, trust_code=True
            )
        for name, path in (peers or {}).items():
            sessions[name] = store.load(path).open(batch=batch, threads=self.threads, trust_code=True)
        return sessions

    def preprocess(self, recipe: Recipe) -> Preprocess:
        """How a recipe's model wants its images."""
        return store.load(self.files(recipe)).preprocess

    def turns(self, sessions: Mapping[str, Session], preprocess: Mapping[str, Preprocess]) -> dict[str, np.ndarray]:
        """Milliseconds of each, interleaved, on noise in the shape of its image."""
        from martlet.measure.latency import interleave

        def noise(size: tuple[int, int]) -> np.ndarray:
            return np.random.default_rng(self.seed).standard_normal((1, 3, *size), dtype=np.float32)

        runs = {name: partial(session, noise(preprocess[name].size)) for name, session in sessions.items()}
        return interleave(runs, seed=self.seed, min_seconds=space.SECONDS, progress=self.progress)

    def file_bytes(self, path: Path) -> int:
        from martlet.measure import size

        return size.file_bytes(path, store.load(path).manifest["engine_files"])

    def _logits(self, session: Session, preprocess: Preprocess) -> np.ndarray:
        from martlet.data.calibration import Resized

        found: list[np.ndarray] = []
        for images in Resized(self.pool, preprocess):
            found += [session(image[None]) for image in images.numpy()]
            self.progress("run images", len(found), self.pool.num_images)
        return np.concatenate(found)


def latency(float_ms: float, reference: np.ndarray, ms: np.ndarray, seed: int) -> dict[str, float]:
    """`latency_ms` and the ends of its interval, from paired times of one run and the reference's time."""
    from martlet.measure.latency import ratio

    faster = ratio(reference, ms, seed)
    return {
        "latency_ms": float_ms / faster["median"],
        "latency_low_ms": float_ms / faster["high"],
        "latency_high_ms": float_ms / faster["low"],
    }


def _without_weights(model: Model) -> Model:
    """The model with nothing in it, for what only says how an engine runs it."""
    from torch import nn

    return replace(model, module=nn.Identity(), steps=[])
