"""The schedule search: in which blocks a model loses tokens, and how many, by the engine's clock and by what it costs.

Latency is nearly a sum over blocks, so a handful of models timed on the engine tell that of every schedule; what a
schedule loses is computed on images in PyTorch, from the first block that reduces on. The most promising are then
compressed for good, and run and timed on the engine: what the search returns was measured.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from martlet import engine as engines
from martlet.core import pipeline, report
from martlet.core.errors import ArtifactError, NumericsError, RecipeError, UsageError
from martlet.core.recipe import Recipe
from martlet.core.technique import Batches, Context, Progress, silent

if TYPE_CHECKING:
    import torch

    from martlet.core.model import Model
    from martlet.data.images import Images
    from martlet.engine.base import Engine
    from martlet.vit.tokens import TokenReduction

VERSION = 1
PARTS = 12
"""A reduction takes a multiple of so many parts of the patches."""
MOST_REDUCTIONS = 3
WIDTH = 32
"""How many schedules with one more reduction are tried: those that promise most."""
TRIES = 4
"""How many schedules are compressed for good."""
MARGIN = 0.02
"""Of the latency: so far off may a prediction be, and the schedule is tried."""
TIMED_ON = 2
"""Images that models are calibrated on which are timed only."""
SECONDS = 6.0
"""Of timing, at least, for all models that are timed together."""

Schedule = tuple[tuple[int, int], ...]
"""Blocks, in their order, and the tokens that each removes."""


class Loss(NamedTuple):
    """What a schedule loses: the mean KL divergence from the untouched model in nats, and `expected_drop_pct`."""

    kl: float
    drop_pct: float


@dataclass(frozen=True, kw_only=True)
class Found:
    """A recipe with a schedule, ready for `compress`; its latency and its loss on the engine, as measured.

    document: everything that was measured, as in the JSON file beside the recipe.
    """

    recipe: Recipe
    latency_ms: float
    drop_pct: float
    document: dict[str, Any]


def search(
    model: str | Model | Callable[[], Model],
    *,
    images: Images | str | Path | Iterable[Any],
    out: str | Path,
    max_drop: float | None = None,
    max_ms: float | None = None,
    recipe: Recipe | str = "tokens-int8",
    engine: str = "openvino",
    num_images: int = 256,
    num_calib: int = 64,
    overwrite: bool = False,
    threads: int | None = None,
    seed: int = 0,
    progress: Progress = silent,
) -> Found:
    """Finds the fastest schedule within a drop, or the one that loses least within a time.

    Writes the recipe with that schedule to `out`, and everything measured beside it, as JSON. Started again with the
    same arguments after it was stopped, it goes on where it was. Test what it found on other images.

    Args:
        model: what `load_model` takes or gives; or a function that gives it.
        images: what schedules are judged on and what techniques learn from; labels aren't used.
        out: the YAML file to write.
        max_drop: points of top-1 that may be lost against the untouched model; see `expected_drop_pct`.
        max_ms: milliseconds that a call at batch 1 may take. A search has one of the two budgets.
        recipe: one with a technique that removes tokens, whose `r` is searched.
        engine: `openvino` or `onnxruntime`.
        num_images: how many of the images. num_calib: how many of those techniques learn from.
        overwrite: replace what is at `out`, and start anew.
        threads, seed, progress: as of `compress`.

    Raises:
        MartletError: see `martlet.core.errors`; a budget that no schedule keeps is a UsageError that names the nearest.
    """
    from martlet.data import open_images
    from martlet.data.calibration import Calibration
    from martlet.source import load_model

    if (max_drop is None) == (max_ms is None):
        raise UsageError("a search needs one budget: max_drop in points of top-1, or max_ms in milliseconds")
    out, target = Path(out), engines.get(engine)
    if out.suffix not in (".yaml", ".yml"):
        raise UsageError(f"a search writes a recipe, so --out must end in .yaml, not {out.name!r}")
    recipe = Recipe.load(recipe) if isinstance(recipe, str) else recipe
    position = _position(recipe)
    version = target.version()
    source = load_model(model) if isinstance(model, str) else model() if callable(model) else model
    recipe.facts(source.facts)
    job = {
        "model": {"name": source.name, "origin": source.origin, "preprocess": source.preprocess.to_json()},
        "recipe": recipe.to_yaml(),
        "engine": {"name": engine, "version": version, "threads": threads},
        "environment": report.environment(),
        "images": {"n": num_images, "calibration": num_calib, "seed": seed},
    }
    record = _Record.open(out, json.loads(json.dumps(job)), overwrite)
    pool = Calibration(open_images(images), source.preprocess, n=num_images, seed=seed, progress=progress)
    hunt = _Search(source, recipe, position, target, _First(pool, num_calib), threads, seed, progress, record)
    hunt.time_table()
    hunt.judge(pool)
    found = hunt.verify(pool, max_drop, max_ms)
    text = "".join(f"# {line}\n" for line in hunt.notes(found, max_drop, max_ms))
    _write(out, text + found.recipe.to_yaml())
    return found


def expected_drop_pct(reference: np.ndarray, logits: np.ndarray) -> float:
    """Points of top-1 to be lost, by the untouched model's own probabilities, without labels; logits (images, K).

    The mean over images of p(its first choice) - p(the other's first choice). Where the untouched model's probabilities
    are right, this is what labels would give on average, with much less chance in it: most first choices that change do
    so where the untouched model wasn't sure.
    """
    shifted = np.exp(reference.astype(np.float64) - reference.max(1, keepdims=True))
    p = shifted / shifted.sum(1, keepdims=True)
    lost = p.max(1) - np.take_along_axis(p, logits.argmax(1)[:, None], 1)[:, 0]
    return 100 * float(lost.mean())


class Table(NamedTuple):
    """Latency of every schedule, from that of a few.

    base_ms: nothing removed. fixed_ms: what one reduction takes. saved_ms: by tokens removed, in order, what one block
    saves that computes so many fewer. depth: of blocks that compute all their tokens.
    """

    base_ms: float
    fixed_ms: float
    saved_ms: tuple[tuple[int, float], ...]
    depth: int

    @classmethod
    def of(cls, base_ms: float, early_ms: Mapping[int, float], half_ms: tuple[int, int, float], depth: int) -> Table:
        """Solved for the parts.

        early_ms: by tokens removed, models that remove them in block 0, between its attention and its MLP, which counts
        as half a block. half_ms: block, tokens, time of a model that removes as many as one of these in a later block.
        """
        block, r, ms = half_ms
        saved = (ms - early_ms[r]) / block
        fixed = early_ms[r] - base_ms + (depth - 0.5) * saved
        by_removed = ((n, (base_ms + fixed - early) / (depth - 0.5)) for n, early in sorted(early_ms.items()))
        return cls(base_ms, fixed, ((0, 0.0), *by_removed), depth)

    def latency_ms(self, schedule: Schedule) -> float:
        removed, saved = 0, 0.0
        for i, (block, r) in enumerate(schedule):
            after = schedule[i + 1][0] if i + 1 < len(schedule) else self.depth - 1
            half = (self._saved(removed) + self._saved(removed + r)) / 2
            removed += r
            saved += half + (after - block - (i + 1 < len(schedule))) * self._saved(removed)
        return self.base_ms + len(schedule) * self.fixed_ms - saved

    def _saved(self, removed: int) -> float:
        """Between the measured points a line, past them the last one drawn on."""
        points = self.saved_ms
        right = next((i for i in range(1, len(points)) if removed <= points[i][0]), len(points) - 1)
        (a, at_a), (b, at_b) = points[right - 1], points[right]
        return at_a + (at_b - at_a) * (removed - a) / (b - a)


@dataclass
class _Search:
    source: Model
    recipe: Recipe
    position: int
    engine: Engine
    calibration: Batches
    threads: int | None
    seed: int
    progress: Progress
    record: _Record

    def __post_init__(self) -> None:
        from martlet.vit.tokens import Taken

        self.taken = Taken(self.source)
        self.depth = len(self.taken.vit.blocks) - bool(self.taken.found.num_read)
        """Blocks in which a reduction changes something."""

    @property
    def technique(self) -> TokenReduction:
        return self.recipe.passes[self.position]  # type: ignore[return-value]

    def candidate(self, schedule: Schedule) -> Recipe:
        """The recipe with this schedule; with none, the last block still leaves out what nobody reads."""
        from martlet.techniques.tokens.readout import Readout

        chosen = replace(self.technique, r=schedule) if schedule else Readout()
        return Recipe((*self.recipe.passes[: self.position], chosen, *self.recipe.passes[self.position + 1 :]))

    def compressed(self, schedule: Schedule, images: Batches) -> Model:
        context = Context(
            images=images,
            seed=self.seed,
            int8=self.engine.int8,
            precisions=self.engine.alternatives(),
            progress=self.progress,
        )
        return pipeline.run(self.source, self.candidate(schedule), context)

    def times(self, models: Mapping[str, Model]) -> dict[str, float]:
        """Median milliseconds of each, interleaved, at batch 1.

        Raises:
            UsageError: the engine only simulates them.
        """
        from martlet.job import deploy
        from martlet.measure import latency

        size = self.source.preprocess.size
        probe = np.random.default_rng(self.seed).standard_normal((1, 3, *size), dtype=np.float32)
        with ExitStack() as stack:
            runs = {}
            for name, model in models.items():
                deployed = stack.enter_context(deploy(model, self.engine.name, progress=self.progress))
                if deployed.simulated:
                    raise UsageError(
                        f"{self.engine.name} only simulates this recipe, so its times say nothing; "
                        "search on openvino or onnxruntime"
                    )
                session = deployed.open(1, self.threads)
                runs[name] = lambda session=session: session(probe)
            found = latency.interleave(runs, seed=self.seed, min_seconds=SECONDS, progress=self.progress)
        return {name: float(np.median(ms)) for name, ms in found.items()}

    def time_table(self) -> None:
        """Times what the table is solved from, if that isn't on record."""
        data = self.record.data
        if "table" not in data:
            most = self.technique.most(self.taken.patches)
            grid = sorted({max(1, most * part // 4) for part in (1, 2, 3, 4)})
            half = max(1, self.depth // 2)
            schedules: dict[str, Schedule] = {"base": (), "half": ((half, grid[len(grid) // 2]),)}
            schedules |= {str(r): ((0, r),) for r in grid}
            for schedule in schedules.values():
                if schedule:
                    replace(self.technique, r=schedule).check(self.source)
            images, models = _First(self.calibration, TIMED_ON), {}
            for i, (name, schedule) in enumerate(schedules.items()):
                self.progress("compress models to be timed", i, len(schedules))
                models[name] = self.compressed(schedule, images)
            times = self.times(models)
            data["table"] = {
                "base_ms": times.pop("base"),
                "half": [half, grid[len(grid) // 2], times.pop("half")],
                "early_ms": times,
                "depth": self.depth,
            }
            self.record.save()
        table = data["table"]
        early = {int(r): ms for r, ms in table["early_ms"].items()}
        self.table = Table.of(table["base_ms"], early, tuple(table["half"]), table["depth"])

    def judge(self, pool: Batches) -> None:
        """Computes the losses of schedules with one reduction, then of the most promising with one more, and so on."""
        patches = self.taken.patches
        grid = sorted({patches.number * part // PARTS for part in range(1, PARTS)} - {0})
        self.losses: dict[Schedule, Loss] = {}
        singles = [((block, r),) for block in range(1, self.depth) for r in grid if self._fits(((block, r),))]
        self._lose(pool, singles)
        for _ in range(1, MOST_REDUCTIONS):
            front = self.front()
            longer = {
                (*schedule, (block, r)): self.losses[schedule].kl + self.losses[(block, r),].kl
                for schedule in front
                for ((block, r),) in singles
                if block > schedule[-1][0] + 1
            }
            fits = [s for s in longer if s not in self.losses and self._fits(s)]
            best = _front({s: longer[s] for s in fits} | {s: loss.kl for s, loss in self.losses.items()}, self.table)
            chosen = [s for s in best if s not in self.losses]
            self._lose(pool, chosen[:: max(1, len(chosen) // WIDTH)][:WIDTH])

    def front(self) -> list[Schedule]:
        """The judged schedules that no other beats in both, the fastest first."""
        return _front({s: loss.kl for s, loss in self.losses.items()}, self.table)

    def _fits(self, schedule: Schedule) -> bool:
        """Whether so many can go, and it is faster."""
        from martlet.vit.tokens import Patches

        patches = self.taken.patches
        for _, r in schedule:
            if r > self.technique.most(patches):
                return False
            patches = Patches(patches.first, patches.number - r, None)
        return self.table.latency_ms(schedule) < self.table.base_ms

    def _lose(self, pool: Batches, schedules: Sequence[Schedule]) -> None:
        """Losses of those that aren't on record."""
        import torch

        known = self.record.data.setdefault("losses", {})
        wanted = [s for s in schedules if _text(s) not in known]
        if wanted:
            runs = {s: self.technique.run(self.taken.vit, self.taken.found, dict(s)) for s in wanted}
            logits: dict[Schedule, list[np.ndarray]] = {s: [] for s in wanted}
            reference: list[np.ndarray] = []
            with torch.inference_mode():
                for done, images in enumerate(pool):
                    before = self.taken.before(images)
                    reference.append(self.taken.logits(images, before[-1]).numpy())
                    for i, (schedule, run) in enumerate(runs.items()):
                        self.progress(
                            f"judge {len(wanted)} schedules",
                            done * len(wanted) + i,
                            len(wanted) * -(-pool.num_images // len(images)),
                        )
                        y = run(before[schedule[0][0]])
                        logits[schedule].append(self.taken.logits(images, y).numpy())
            whole = np.concatenate(reference)
            for schedule, parts in logits.items():
                known[_text(schedule)] = _loss(whole, np.concatenate(parts))._asdict()
            self.record.save()
        self.losses |= {s: Loss(**known[_text(s)]) for s in schedules}

    def verify(self, pool: Batches, max_drop: float | None, max_ms: float | None) -> Found:
        """Compresses the most promising for good, and takes the first that keeps the budget on the engine.

        Raises:
            UsageError: none does.
        """
        known = self.record.data.setdefault("measured", {})
        if "" not in known:
            known[""] = self._measure((), pool)
            self.record.save()
        for schedule in self._promising(max_drop, max_ms, known[""]["drop_pct"]):
            if _text(schedule) not in known:
                known[_text(schedule)] = self._measure(schedule, pool)
                self.record.save()
            entry = known[_text(schedule)]
            kept = entry["drop_pct"] <= max_drop if max_drop is not None else entry["latency_ms"] <= (max_ms or 0)
            if kept:
                recipe = self.candidate(schedule)
                return Found(
                    recipe=recipe, document=self.record.data, **{k: entry[k] for k in ("latency_ms", "drop_pct")}
                )
        told = "; ".join(
            f"{name or 'nothing'} removed: {e['latency_ms']:.2f} ms, {e['drop_pct']:.2f} points"
            for name, e in known.items()
        )
        budget = f"a drop of {max_drop:g} points" if max_ms is None else f"{max_ms:g} ms"
        raise UsageError(f"no schedule that was compressed keeps {budget} ({told}); allow more")

    def _promising(self, max_drop: float | None, max_ms: float | None, always_lost: float) -> list[Schedule]:
        """Of the front, the fastest that should keep the drop, or the most faithful that should keep the time.

        always_lost: points that the recipe loses with all tokens.
        """
        front = self.front()
        if max_drop is not None:
            return [s for s in front if self.losses[s].drop_pct + always_lost <= max_drop][:TRIES]
        most = (max_ms or 0) * (1 + MARGIN)
        return [s for s in reversed(front) if self.table.latency_ms(s) <= most][:TRIES]

    def _measure(self, schedule: Schedule, pool: Batches) -> dict[str, float]:
        """Time and loss on the engine, compressed with all calibration images."""
        import torch

        from martlet.job import deploy

        self.progress(f"compress with {_text(schedule) or 'nothing'} removed", 0, 0)
        model = self.compressed(schedule, self.calibration)
        times = self.times({"it": model})
        reference, logits = list[np.ndarray](), list[np.ndarray]()
        with deploy(model, self.engine.name, progress=self.progress) as deployed, torch.inference_mode():
            session = deployed.open(1, self.threads)
            for images in pool:
                reference.append(self.source.module(images).numpy())
                logits += [session(image[None]) for image in images.numpy()]
                self.progress("run images", len(logits), pool.num_images)
        loss = _loss(np.concatenate(reference), np.concatenate(logits))
        return {"latency_ms": times["it"], "predicted_ms": self.table.latency_ms(schedule), **loss._asdict()}

    def notes(self, found: Found, max_drop: float | None, max_ms: float | None) -> list[str]:
        """What stands above the recipe."""
        base = self.record.data["measured"][""]
        budget = f"at most {max_drop:g} points lost" if max_ms is None else f"at most {max_ms:g} ms"
        images = self.record.data["job"]["images"]["n"]
        return [
            f"Found by martlet search for {self.source.name} on {self.engine.name}: {budget}.",
            f"Measured there, at batch 1: {found.latency_ms:.3g} ms, {found.drop_pct:.2f} points expected to be lost,",
            f"on the {images} images that it was searched on; with all tokens {base['latency_ms']:.3g} ms and "
            f"{base['drop_pct']:.2f} points.",
        ]


class _First:
    """The first n of calibration images."""

    def __init__(self, images: Batches, n: int) -> None:
        self._images, self.num_images = images, min(n, images.num_images)

    def __iter__(self) -> Iterator[torch.Tensor]:
        left = self.num_images
        for batch in self._images:
            if left > 0:
                yield batch[:left]
                left -= len(batch)


@dataclass
class _Record:
    """All that a search has measured so far, in a file, so that it can go on after it was stopped."""

    path: Path
    data: dict[str, Any]

    @classmethod
    def open(cls, recipe: Path, job: dict[str, Any], overwrite: bool) -> _Record:
        """The record beside a recipe; new if there is none.

        Raises:
            UsageError: it is of another job. ArtifactError: it is no such record.
        """
        path = recipe.with_suffix(".json")
        if overwrite or not path.exists():
            if recipe.exists() and not overwrite:
                raise UsageError(f"{recipe} exists; add --overwrite to replace it, or choose another --out")
            return cls(path, {"martlet_search": VERSION, "job": job})
        try:
            data = json.loads(path.read_text(encoding="utf-8"))
            found = data["job"] if data["martlet_search"] == VERSION else None
        except (OSError, ValueError, KeyError, TypeError):
            data, found = {}, None
        if not isinstance(found, dict):
            raise ArtifactError(
                f"{path} is no record of a search; add --overwrite to replace it, or choose another --out"
            )
        other = next((key for key in job if found.get(key) != job[key]), None)
        if other is not None:
            raise UsageError(
                f"{path} is of a search with another {other}; add --overwrite to replace it, or choose another --out"
            )
        return cls(path, data)

    def save(self) -> None:
        _write(self.path, json.dumps(self.data, indent=1, allow_nan=False) + "\n")


def _write(path: Path, text: str) -> None:
    """Beside, then renamed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(text, encoding="utf-8")
    partial.replace(path)


def _position(recipe: Recipe) -> int:
    """Where the recipe's one technique stands that removes tokens.

    Raises:
        RecipeError: it has none.
    """
    from martlet.vit.tokens import TokenReduction

    for i, technique in enumerate(recipe.passes):
        if isinstance(technique, TokenReduction):
            return i
    raise RecipeError(f"a search needs a recipe that removes tokens, such as tokens-int8; {recipe} removes none")


def _front(losses: Mapping[Schedule, float], table: Table) -> list[Schedule]:
    """Those that no other beats in both latency and loss, the fastest first."""
    front: list[Schedule] = []
    for schedule in sorted(losses, key=lambda s: (table.latency_ms(s), losses[s])):
        if not front or losses[schedule] < losses[front[-1]]:
            front.append(schedule)
    return front


def _loss(reference: np.ndarray, logits: np.ndarray) -> Loss:
    """Raises:
    NumericsError: NaN or infinity.
    """
    from martlet.measure.fidelity import fidelity

    if not np.isfinite(logits).all():
        raise NumericsError("a model with fewer tokens gives NaN or infinity")
    return Loss(fidelity(reference, logits)["kl_mean"], expected_drop_pct(reference, logits))


def _text(schedule: Schedule) -> str:
    """`4: 64, 8: 32`."""
    return ", ".join(f"{block}: {r}" for block, r in schedule)
