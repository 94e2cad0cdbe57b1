"""`martlet train` as a function: a model and images in, a trained model out, as an artifact with its curves."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterable, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from martlet.core import pipeline, report, store
from martlet.core.errors import RecipeError, UsageError
from martlet.core.kept import Kept
from martlet.core.model import Model
from martlet.core.recipe import Recipe
from martlet.core.store import Artifact
from martlet.core.technique import Context, Progress, Scalars, silent, unplotted

if TYPE_CHECKING:
    from martlet.data.images import Images

RUN = "run.json"
PACKAGES = ("torch", "timm", "accelerate", "numpy")


def train(
    model: str | Model | Callable[[], Model],
    *,
    images: Images | str | Path | Iterable[Any],
    recipe: Recipe | str = "finetune",
    out: str | Path,
    teacher: str | Model | None = None,
    num_calib: int = 64,
    overwrite: bool = False,
    seed: int = 0,
    progress: Progress = silent,
    scalars: Scalars = unplotted,
    command: str | None = None,
) -> Artifact:
    """Trains a model by a recipe, and writes an artifact folder to run in torch, to compress, or to take weights from.

    Args:
        model: what `load_model` takes or gives, or a function that gives it.
        images: what it is trained on, with labels if the recipe learns from them. Never what it is tested on.
        recipe: as of `compress`; at least one of its passes trains.
        out: the folder to write, with `training.html` and `training.json` beside the weights. What was done of a
            training that was stopped is kept in `.NAME.resume` beside it, from which the same call goes on.
        teacher: as `martlet.source.load_other` takes it; the untouched model without.
        num_calib: how many of the images passes that don't train look at.
        overwrite: replace an artifact at `out`.
        seed: of the order of the images, of how they are changed, and of chance in the model.
        progress: called with what is being done, how far, of how much.
        scalars: called with every number that is plotted.
        command: what the user typed, for the page.

    Started by a launcher (`accelerate launch`, `torchrun`), all processes share each batch, and the first writes.

    Raises:
        UsageError: what was kept is of another training.
        RecipeError: no pass trains.
        MartletError: see `martlet.core.errors`; nothing is left at `out`.
    """
    from martlet.data import open_images
    from martlet.data.calibration import Calibration
    from martlet.data.examples import Examples
    from martlet.report.training import write
    from martlet.source import load_model, load_other
    from martlet.training.order import processes
    from martlet.training.technique import Training

    out, crew = Path(out), processes()
    store.check_free(out, overwrite)
    recipe = Recipe.load(recipe) if isinstance(recipe, str) else recipe
    recipe.facts()
    if not any(isinstance(technique, Training) for technique in recipe.passes):
        raise RecipeError(f"no pass of {recipe} trains; join one to it, as in '{recipe} | distill'")
    source = load_model(model) if isinstance(model, str) else model if isinstance(model, Model) else model()
    recipe.facts(source.facts)
    pool = open_images(images)
    its_teacher = None if teacher is None else load_other(teacher, source)
    kept = Kept.beside(out)
    run = {
        "model": [source.name, source.origin],
        "recipe": str(recipe),
        "images": [pool.source, len(pool)],
        "teacher": None if its_teacher is None else [its_teacher.name, its_teacher.origin],
        "seed": seed,
    }
    _claim(kept, run, crew.is_main_process)
    examples = Examples.read(pool, source.preprocess, source.num_classes, progress)
    context = Context(training=examples, teacher=its_teacher, seed=seed, progress=progress, kept=kept, scalars=scalars)
    if any(technique.needs_images and not isinstance(technique, Training) for technique in recipe.passes):
        context.images = Calibration(pool, source.preprocess, n=num_calib, seed=seed, progress=progress)
    done = pipeline.run(source, recipe, context)
    if crew.is_main_process:
        document = {
            **run,
            "model": source.name,
            "teacher": (its_teacher or source).name,
            "command": command,
            "created": datetime.now(UTC).isoformat(timespec="seconds"),
            "environment": report.environment(PACKAGES),
            "passes": [
                {"name": step.technique.name, "seconds": step.seconds, "training": step.record}
                for step in done.steps
                if isinstance(step.technique, Training)
            ],
        }
        with store.writing(out, overwrite) as folder:
            files = store.write_model(folder, done, _torch())
            text = json.dumps(document, indent=1, ensure_ascii=False, allow_nan=False) + "\n"
            (folder / "training.json").write_text(text, encoding="utf-8")
            write(document, folder / "training.html")
            store.seal(folder, done, "torch", files)
        shutil.rmtree(kept.folder, ignore_errors=True)
    crew.wait_for_everyone()
    return store.load(out)


def _torch() -> Any:
    from martlet import engine

    return engine.get("torch")


def _claim(kept: Kept, run: Mapping[str, Any], writes: bool) -> None:
    """Makes sure that what was kept, if anything was, is of this training.

    Raises:
        UsageError: it isn't; says in what it differs.
    """
    file, now = kept.folder / RUN, json.loads(json.dumps(run))
    if file.is_file() and any(kept.folder.glob("*.safetensors")):
        try:
            before = json.loads(file.read_text(encoding="utf-8"))
        except ValueError:
            before = {}
        if other := [name for name in now if now[name] != before.get(name)]:
            raise UsageError(
                f"{kept.folder} keeps a training that was stopped, with another {' and '.join(other)}; "
                f"delete it to begin anew, or choose another --out"
            )
    elif writes:
        kept.folder.mkdir(parents=True, exist_ok=True)
        partial = file.with_suffix(".partial")
        partial.write_text(json.dumps(now), encoding="utf-8")
        os.replace(partial, file)
