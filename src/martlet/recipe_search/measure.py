"""What the engine makes of recipes: compressed for good, run on many images, timed in turns with the references."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from martlet.core import pipeline, store
from martlet.core.errors import UsageError
from martlet.core.recipe import Recipe
from martlet.core.technique import Batches, Context, Progress
from martlet.data.calibration import Resized
from martlet.measure.latency import interleave
from martlet.measure.stages import gather
from martlet.recipe_search import confidence, space
from martlet.recipe_search.folder import Folder
from martlet.recipe_search.recipes import split
from martlet.recipe_search.screen import in_mean, losses, work
from martlet.recipe_search.space import Supply

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

    supply: what techniques learn from. pool: images that losses are measured on while there is a search.
    """

    source: Model
    engine: Engine
    folder: Folder
    supply: Supply
    pool: Batches
    threads: int | None
    seed: int
    progress: Progress

    @property
    def context(self) -> Context:
        return self.supply.context(self.engine, self.seed, self.progress)

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
            seconds = round(time.perf_counter() - start, 3)
            self.folder.put("compressed", recipe.digest(), {"work": work(graph), "seconds": seconds})
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
        runs = {name: self._run(session, preprocess[name]) for name, session in sessions.items()}
        exits = {name: left for name, (_, left) in runs.items() if left is not None}
        times = self.turns(sessions, preprocess, exits, lambda its: (x.numpy() for x in Resized(self.pool, its)))
        seconds = round((time.perf_counter() - start) / len(named), 3)
        first = self.folder.get("measured", FLOAT.digest())
        float_ms = first["latency_ms"] if first else float(np.median(times["float"]))
        found = {}
        for name, recipe in named.items():
            if recipe == FLOAT and first:
                continue
            path = self.files(recipe)
            made = self.folder.get("compressed", path.name)
            found[recipe.digest()] = {
                "recipe": recipe.to_yaml(),
                **losses(runs["float"][0], runs[name][0]),
                **latency(float_ms, times["float"], times[name], self.seed),
                "file_bytes": self.file_bytes(path),
                "precision": self.precision(recipe),
                **in_mean(made["work"], exits.get(name)),
                "seconds": made["seconds"],
                "measured_seconds": seconds,
            }
        return found

    def final(
        self, recipes: Mapping[str, Recipe], peers: Mapping[str, Path], images: Images
    ) -> dict[str, dict[str, Any]]:
        """By name, everything on images that no search has seen, in one run; the first name is the untouched model."""
        from martlet.data.batches import batches
        from martlet.measure import accuracy, memory

        [reference, *_] = recipes
        sessions = self.opened(recipes, BATCH, peers)
        preprocess = {name: self.preprocess(recipe) for name, recipe in recipes.items()}
        preprocess |= {name: store.load(path).preprocess for name, path in peers.items()}
        outcome = accuracy.logits(sessions, images, preprocess, self.progress)
        singly = self.opened(recipes, 1, peers)
        times = self.turns(
            singly, preprocess, outcome.exits, lambda its: (batch for batch, _, _ in batches(images, its, BATCH))
        )
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

    def turns(
        self,
        sessions: Mapping[str, Session],
        preprocess: Mapping[str, Preprocess],
        exits: Mapping[str, np.ndarray],
        images: Callable[[Preprocess], Iterable[np.ndarray]],
    ) -> dict[str, np.ndarray]:
        """Milliseconds of each, interleaved, on noise in the shape of its image.

        A model that can stop early is called with an image for each stage after which any leave, and its time is their
        mean, weighted by how many leave there.

        exits: of those models, after which stage each of the images (N,) left. images: all of these, in batches.
        """
        runs, shares = dict[str, Callable[[], object]](), dict[str, dict[str, float]]()
        for name, session in sessions.items():
            if name in exits:
                stages, firsts, counts = np.unique(exits[name], return_index=True, return_counts=True)
                found = gather(images(preprocess[name]), firsts.tolist())
                calls = {f"{name} {k}": found[i][None] for k, i in zip(stages, firsts.tolist(), strict=True)}
                shares[name] = dict(zip(calls, counts / counts.sum(), strict=True))
            else:
                rng = np.random.default_rng(self.seed)
                calls = {name: rng.standard_normal((1, 3, *preprocess[name].size), dtype=np.float32)}
                shares[name] = {name: 1.0}
            runs |= {call: partial(session, given) for call, given in calls.items()}
        times = interleave(runs, seed=self.seed, min_seconds=space.SECONDS, progress=self.progress)
        return {
            name: np.sum([share * times[call] for call, share in its.items()], axis=0) for name, its in shares.items()
        }

    def file_bytes(self, path: Path) -> int:
        from martlet.measure import size

        return size.file_bytes(path, store.load(path).manifest["engine_files"])

    def _run(self, session: Session, preprocess: Preprocess) -> tuple[np.ndarray, np.ndarray | None]:
        """The logits of the pool, and after which stage each image left, if any can."""
        logits, exits = list[np.ndarray](), list[np.ndarray]()
        for images in Resized(self.pool, preprocess):
            for image in images.numpy():
                logits.append(session(image[None]))
                if session.exits is not None:
                    exits.append(session.exits)
            self.progress("run images", len(logits), self.pool.num_images)
        return np.concatenate(logits), np.concatenate(exits) if exits else None


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
