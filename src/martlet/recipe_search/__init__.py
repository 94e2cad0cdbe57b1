"""From a budget to a recipe: a technique's settings, found by the engine's clock and by what they cost.

What can be searched is the technique's to say (`Technique.space`). Every space works alike: a few models timed on the
engine tell the time of every candidate, images in PyTorch tell what each loses, and the most promising are compressed
for good, and run and timed on the engine: what the search returns was measured.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from martlet import engine as engines
from martlet.core import report
from martlet.core.errors import RecipeError, UsageError
from martlet.core.recipe import Recipe
from martlet.core.technique import Progress, silent
from martlet.recipe_search.record import Record, write
from martlet.recipe_search.space import Budget, First, Space, expected_drop_pct

if TYPE_CHECKING:
    from martlet.core.model import Model
    from martlet.data.images import Images

__all__ = ["Found", "expected_drop_pct", "search"]


@dataclass(frozen=True, kw_only=True)
class Found:
    """A recipe with settings that keep the budget, ready for `compress`; its latency and its loss, as measured.

    references: by what it says of them, the measurements of what it was compared with.
    document: everything that was measured, as in the JSON file beside the recipe.
    """

    recipe: Recipe
    latency_ms: float
    drop_pct: float
    references: dict[str, dict[str, float]]
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
    """Finds the fastest settings within a drop, or those that lose least within a time.

    Writes the recipe with these settings to `out`, and everything measured beside it, as JSON. Started again with the
    same arguments after it was stopped, it goes on where it was. Test what it found on other images.

    Args:
        model: what `load_model` takes or gives; or a function that gives it.
        images: what settings are judged on and what techniques learn from; labels aren't used.
        out: the YAML file to write.
        max_drop: points of top-1 that may be lost against the untouched model; see `expected_drop_pct`.
        max_ms: milliseconds that a call at batch 1 may take. A search has one of the two budgets.
        recipe: one with a technique that has a space: one that removes tokens, whose `r` is searched, or `int8`, whose
            `float_layers` are. Of several, the first is searched, and the others are applied as they are.
        engine: `openvino` or `onnxruntime`.
        num_images: how many of the images. num_calib: how many of those techniques learn from.
        overwrite: replace what is at `out`, and start anew.
        threads, seed, progress: as of `compress`.

    Raises:
        MartletError: see `martlet.core.errors`; a budget that nothing keeps is a UsageError that names the nearest.
    """
    from martlet.data import open_images
    from martlet.data.calibration import Calibration
    from martlet.source import load_model

    budget = Budget.of(max_drop, max_ms)
    out, target = Path(out), engines.get(engine)
    if out.suffix not in (".yaml", ".yml"):
        raise UsageError(f"a search writes a recipe, so --out must end in .yaml, not {out.name!r}")
    recipe = Recipe.load(recipe) if isinstance(recipe, str) else recipe
    position, kind = _space(recipe)
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
    record = Record.open(out, json.loads(json.dumps(job)), overwrite)
    pool = Calibration(open_images(images), source.preprocess, n=num_images, seed=seed, progress=progress)
    space = kind(source, recipe, position, target, pool, First(pool, num_calib), threads, seed, progress, record)
    space.time()
    space.judge()
    chosen = space.verify(budget)
    measured = record.data["measured"]
    found = Found(
        recipe=space.candidate(chosen),
        references={said: measured[space.text(c)] for said, c in space.references.items()},
        document=record.data,
        **{key: measured[space.text(chosen)][key] for key in ("latency_ms", "drop_pct")},
    )
    write(out, "".join(f"# {line}\n" for line in _notes(found, budget)) + found.recipe.to_yaml())
    return found


def _space(recipe: Recipe) -> tuple[int, type[Space]]:
    """Where the recipe's first technique stands that can be searched, and its space.

    Raises:
        RecipeError: it has none.
    """
    for i, technique in enumerate(recipe.passes):
        if space := technique.space():
            return i, space
    raise RecipeError(
        f"a search needs a recipe with something to find, such as tokens-int8 or int8; {recipe} has nothing"
    )


def _notes(found: Found, budget: Budget) -> list[str]:
    """What stands above the recipe."""
    job = found.document["job"]
    beside = "; ".join(
        f"{said} {entry['latency_ms']:.3g} ms and {entry['drop_pct']:.2f} points"
        for said, entry in found.references.items()
    )
    return [
        f"Found by martlet search for {job['model']['name']} on {job['engine']['name']}: {budget.wish}.",
        f"Measured there, at batch 1: {found.latency_ms:.3g} ms, {found.drop_pct:.2f} points expected to be lost,",
        f"on the {job['images']['n']} images that it was searched on; {beside}.",
    ]
