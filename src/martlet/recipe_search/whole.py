"""`find`: the journey as one call, with everything that can be wrong told before any work is done."""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from martlet import engine as engines
from martlet.core import report, store
from martlet.core.errors import DataError, UsageError
from martlet.core.kept import Kept
from martlet.core.recipe import Recipe
from martlet.core.technique import Progress, silent
from martlet.data.calibration import First
from martlet.recipe_search import confidence, strategies
from martlet.recipe_search import workers as ray_workers
from martlet.recipe_search.document import document
from martlet.recipe_search.folder import DOCUMENT, PAGE, TRAINED, Folder, code_digest
from martlet.recipe_search.journey import Evaluate, Journey
from martlet.recipe_search.limits import Limits
from martlet.recipe_search.measure import Measure
from martlet.recipe_search.recipes import Recipes
from martlet.recipe_search.record import write
from martlet.recipe_search.screen import Held, Screen, screened
from martlet.recipe_search.space import Supply, context
from martlet.recipe_search.study import Study
from martlet.report.pareto import write_page

if TYPE_CHECKING:
    from martlet.core.model import Model
    from martlet.core.store import Artifact
    from martlet.data.calibration import Calibration
    from martlet.data.examples import Examples
    from martlet.data.images import Images

SCREEN_CALIB = 8
"""Images that techniques learn from while recipes are screened."""
LEAST_JUDGED = 16
"""Images that losses are judged on, besides those that techniques learn from."""
LEAST_SOLVED = 64
"""Images that thresholds are solved on: of the three exits that models usually get."""


@dataclass(frozen=True, kw_only=True)
class Search:
    """What a search found. winner: the artifact. kept: whether it keeps the budget on images that no search has seen.

    why: in one line, how it does or why it doesn't. document: what search.json says.
    """

    winner: Artifact
    kept: bool
    why: str
    document: dict[str, Any]


def search(
    model: str | Model | Callable[[], Model],
    *,
    images: Images | str | Path | Iterable[Any],
    out: str | Path,
    max_drop: float | None = None,
    latency_ms: float | None = None,
    size_mb: float | None = None,
    minutes: float | None = 30.0,
    candidates: int | None = None,
    recipe: Recipe | str | None = None,
    engine: str = "openvino",
    strategy: str = "tpe",
    num_images: int = 256,
    num_calib: int = 32,
    train: Images | str | Path | None = None,
    peers: Mapping[str, str | Path] | None = None,
    workers: int = 0,
    ray_address: str | None = None,
    overwrite: bool = False,
    threads: int | None = None,
    seed: int = 0,
    progress: Progress = silent,
    command: str | None = None,
    rebuild: str | None = None,
) -> Search:
    """Finds the best recipe within a budget, and leaves the winner as an artifact in the folder `out`.

    Recipes are drawn from what techniques declare (`Technique.space`) and screened in PyTorch on few images; the most
    promising are compressed for good, run on more images and timed on the engine, in turns with the untouched model;
    the best of those are measured again on all other images, which nothing was searched on. Started again with the same
    arguments after it was stopped, it goes on where it was. `martlet.load(out)` opens the best so far at any time.

    Args:
        model: what `load_model` takes or gives; or a function that gives it.
        images: all of them; a part is searched on, the others are for the final numbers.
        out: the folder.
        max_drop: points of top-1 that may be lost against the untouched model.
        latency_ms: what a call at batch 1 may take. size_mb: what the engine's files may weigh, 1 MB being 10⁶ bytes.
        minutes: how long to search. candidates: how many recipes to draw. Whichever is reached first.
        recipe: search the settings of its techniques alone; None is all techniques that can be searched.
        engine: `openvino` or `onnxruntime`.
        strategy: how the next recipes are chosen: `tpe`, `nsga2`, `linas`, `greedy`, `constrained` or `random`.
        num_images: how many images are searched on. num_calib: how many of those techniques learn from.
        train: other images, that what has to be trained is trained on, for each recipe that has it: the heads of exits,
            whose thresholds are solved on half of the images that are searched on. Without them, nothing is trained.
        peers: folders of artifacts made by others, by name, to be measured with the finalists.
        workers: in how many processes recipes are screened, by Ray; 0 is this one. ray_address: of a cluster that is
            running; None starts one on this machine.
        overwrite: begin anew, where there is a search at `out`.
        threads, seed, progress, command: as of `compress`.
        rebuild: the command that makes a point again, but for `--recipe` and `--out`.

    Raises:
        MartletError: see `martlet.core.errors`. A budget that nothing keeps is none: `kept` says so.
    """
    from martlet.data import open_images
    from martlet.data.calibration import Calibration
    from martlet.data.examples import Examples
    from martlet.source import load_model

    limits, out = Limits(max_drop=max_drop, latency_ms=latency_ms, size_mb=size_mb), Path(out)
    limits.check()
    sampler = strategies.get(strategy)
    ray_workers.check(workers, ray_address)
    target = engines.get(engine)
    if not target.integer_kernels:
        raise UsageError(
            f"{engine} only simulates integers, so its times say nothing; search on openvino or onnxruntime"
        )
    version = target.version()
    if minutes is not None and minutes <= 0:
        raise UsageError(f"--minutes is a positive number, not {minutes:g}")
    only = Recipe.load(recipe) if isinstance(recipe, str) else recipe
    others = {name: store.load(path).path for name, path in (peers or {}).items()}
    images = open_images(images)
    num_searched = _searched(images, limits, num_images, num_calib)
    source = load_model(model) if isinstance(model, str) else model() if callable(model) else model
    if images.labelled:
        images.check_labels(source.num_classes)
    searched, held_out = images.split(num_searched, seed)
    learned = None if train is None else open_images(train)
    if learned is not None and learned.source == images.source and isinstance(train, str | Path):
        raise UsageError("--images and --train are the same; what is searched on and told can't be trained on")
    job = {
        "model": _identity(source),
        "code": {"martlet": report.environment()["versions"]["martlet"], "digest": code_digest()},
        "engine": {"name": engine, "version": version, "threads": threads},
        "images": {
            "source": images.source,
            "opened": images.opened,
            "searched": num_searched,
            "calibration": num_calib,
            "held_out": len(held_out),
            "labelled": images.labelled,
        },
        "training": learned and {"source": learned.source, "opened": learned.opened, "n": len(learned)},
        "recipe": only and only.to_yaml(),
        "budget": {"max_drop": max_drop, "latency_ms": latency_ms, "size_mb": size_mb},
        "strategy": strategy,
        "seed": seed,
    }
    training = None
    if learned is not None:
        training = Examples.read(learned, source.preprocess, source.num_classes, progress)
    recipes = Recipes.of(source.facts, replace(context(target), training=training), only)
    check_solved(num_searched, num_calib, bool(recipes.follow))
    folder = Folder.open(out, job, overwrite)
    pool = Calibration(searched, source.preprocess, n=num_searched, seed=seed, progress=progress)
    supply, judged = supplied(pool, num_calib, bool(recipes.follow), training, folder)
    few = replace(supply, calibration=Held(First(pool, SCREEN_CALIB)), apart=supply.apart and Held(supply.apart))
    screen = Screen(source, target, few, Held(First(judged, 2 * num_calib)), seed)
    measure = Measure(source, target, folder, supply, judged, threads, seed, progress)
    study = Study.open(folder.path / "study.db", 3 if size_mb is not None else 2, recipes, sampler, seed, source.facts)
    created = datetime.now(UTC).isoformat(timespec="seconds")
    again = rebuild or shlex.join(["martlet", "compress", source.name, "--images", images.source])

    def noted(journey: Journey) -> None:
        _write(journey, document(journey, job, created, again))

    with evaluator(screen, workers, ray_address, progress) as evaluate:
        journey = Journey(
            folder, limits, recipes, study, screen, measure, held_out, pool, minutes, candidates, others, evaluate,
            progress, command, noted,
        )  # fmt: skip
        journey.run()
    found = document(journey, job, created, again)
    _write(journey, found)
    artifact = store.load(folder.winner)
    kept, why = _verdict(journey, next(point for point in found["points"] if point["winner"]), artifact)
    return Search(winner=artifact, kept=kept, why=why, document=found)


def check_solved(num_searched: int, num_calib: int, judging: bool) -> None:
    """
    Raises:
        DataError: too few images to solve thresholds on.
    """
    solved = (num_searched - num_calib) // 2
    if judging and solved < LEAST_SOLVED:
        raise DataError(
            f"thresholds of exits are solved on half of the images that are searched on and not calibrated on, here "
            f"{solved}, and take {LEAST_SOLVED}; give --num-images {num_calib + 2 * LEAST_SOLVED} or more"
        )


def supplied(
    pool: Calibration, num_calib: int, judging: bool, training: Examples | None, folder: Folder
) -> tuple[Supply, First]:
    """What techniques learn from, and the images that recipes are judged on.

    judging: whether there are techniques that judge others, as thresholds of exits do: half of the images that nothing
    else learns from are for these.
    """
    solved = (pool.num_images - num_calib) // 2 if judging else 0
    apart = First(pool, solved, num_calib) if solved else None
    supply = Supply(
        calibration=First(pool, num_calib), apart=apart, training=training, kept=Kept(folder.path / TRAINED)
    )
    return supply, First(pool, pool.num_images, num_calib + solved)


@contextmanager
def evaluator(screen: Screen, count: int, address: str | None, progress: Progress) -> Iterator[Evaluate]:
    """What screens recipes: here, or in processes of Ray's."""

    def here(yamls: Sequence[str]) -> Iterator[tuple[int, dict[str, Any]]]:
        for i, yaml in enumerate(yamls):
            progress("screen recipes", i, len(yamls))
            yield i, screened(screen, yaml, progress)

    if not count:
        yield here
        return
    with ray_workers.workers(screen, count, address, progress) as there:
        yield there


def _searched(images: Images, limits: Limits, wanted: int, num_calib: int) -> int:
    """How many images are searched on, so that the others can tell the drop.

    Raises:
        DataError: there are too few.
    """
    n, least = len(images), num_calib + LEAST_JUDGED
    told = confidence.images_to_tell(limits.max_drop) if limits.max_drop is not None else LEAST_JUDGED
    if n < least + told:
        why = (
            f"telling a drop of {limits.max_drop:g} points from none takes {told} that weren't searched on (if none of "
            f"them changes, more changes at 95 % confidence; ln 0.05 / ln(1 - {limits.max_drop / 100:g}))"
            if limits.max_drop is not None
            else f"testing takes {told}"
        )
        raise DataError(
            f"{images.source} has {n} images; {why}, and searching takes {least}: {least + told} in all; give more, or "
            "a larger --max-drop"
        )
    return min(wanted, n - told)


def _identity(source: Model) -> dict[str, Any]:
    """What makes it this model: where it comes from, how it wants its images, and its weights."""
    from martlet.core.kept import digest

    state = source.module.state_dict()
    return {
        "name": source.name,
        "num_classes": source.num_classes,
        "preprocess": source.preprocess.to_json(),
        "weights_digest": digest([part for name in sorted(state) for part in (name, state[name])]),
    }


def _write(journey: Journey, found: dict[str, Any]) -> None:
    """search.json, its page, and the recipes that commands name."""
    path = journey.folder.path
    for point in found["points"]:
        recipe = path / "recipes" / f"{point['id']}.yaml"
        if point["recipe"] and (not recipe.exists() or recipe.read_text(encoding="utf-8") != point["recipe"]):
            write(recipe, point["recipe"])
    write(path / DOCUMENT, json.dumps(found, indent=1, ensure_ascii=False, allow_nan=False) + "\n")
    write_page(found, path / PAGE)


def _verdict(journey: Journey, winner: dict[str, Any], artifact: Artifact) -> tuple[bool, str]:
    """Whether the winner keeps the budget on held-out images and passes its own gate, and why or why not."""
    values = {axis: its["value"] for axis, its in winner["values"].items()}
    told = f"{values['drop_pct']:.2f} points, {values['latency_ms']:.2f} ms, {values['file_bytes'] / 1e6:.2f} MB"
    points, limits, n = journey.candidates_measured(), journey.limits, winner["n_images"]
    if not any(limits.keeps(point) for point in points):
        return False, f"nothing found keeps {limits}: {limits.why_not(points)}; the nearest has {told}"
    if not winner["keeps_budget"]:
        return False, (
            f"kept {limits} on the images that it was searched on, and on {n} others has {told}; give more "
            "images, or a smaller --max-drop"
        )
    reasons = [reason for reason in artifact.report["gate"]["reasons"] if "drops by" not in reason]
    if reasons:
        return False, f"keeps {limits}, but is {'; '.join(reasons)}"
    return True, f"keeps {limits} on {n} images that weren't searched on: {told}"
