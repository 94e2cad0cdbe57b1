"""`martlet merge` as a function: a model and fine-tunes of it in, one model out, as an artifact."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from martlet.core import pipeline, store
from martlet.core.errors import RecipeError, SourceError, UsageError
from martlet.core.model import Model
from martlet.core.recipe import Recipe
from martlet.core.store import Artifact
from martlet.core.technique import Batches, Context, Progress, silent
from martlet.merging.technique import Finetune, Merging, State

if TYPE_CHECKING:
    from martlet.data.images import Images


def merge(
    model: str | Model | Callable[[], Model],
    finetunes: Sequence[str | Path],
    *,
    method: Recipe | str = "soup",
    out: str | Path,
    images: Sequence[Images | str | Path | Iterable[Any]] = (),
    num_images: int = 64,
    overwrite: bool = False,
    seed: int = 0,
    progress: Progress = silent,
) -> Artifact:
    """Merges fine-tunes, and writes an artifact folder to run in torch, to compress, or to take weights from.

    Args:
        model: what all were tuned from, as `load_model` takes or gives it, or a function that gives it. Of methods that
            don't look at it, such as `soup`, only the architecture counts.
        finetunes: files of weights, or artifacts of the same architecture.
        method: a technique of the family merge, joined with others if you like, or a recipe that has one.
        out: the folder to write.
        images: for methods that look at images, those of each fine-tune's task in order; or one set for all.
        num_images: of each set, how many are looked at.
        overwrite: replace an artifact at `out`.
        seed: of the sample of images, and of what a method draws.
        progress: called with what is being done, how far, of how much.

    Raises:
        UsageError: fewer than two fine-tunes, or neither one set of images nor one for each.
        RecipeError: no pass merges, or more than one.
        SourceError: weights that don't fit the model.
        MartletError: see `martlet.core.errors`; nothing is left at `out`.
    """
    from martlet import engine
    from martlet.source import load_model

    out = Path(out)
    store.check_free(out, overwrite)
    recipe = Recipe.load(method) if isinstance(method, str) else method
    recipe.facts()
    if sum(isinstance(technique, Merging) for technique in recipe.passes) != 1:
        raise RecipeError(f"one pass has to merge, and {recipe} has another number; see: martlet list techniques")
    if len(finetunes) < 2:
        raise UsageError(f"merging takes two fine-tunes or more, not {len(finetunes)}")
    if len(images) not in (0, 1, len(finetunes)):
        raise UsageError(
            f"give images once for all {len(finetunes)} fine-tunes, or once for each, not {len(images)} times"
        )
    source = load_model(model) if isinstance(model, str) else model if isinstance(model, Model) else model()
    recipe.facts(source.facts)
    sets = [_calibration(its, source, num_images, seed, progress) for its in images]
    own = sets if len(sets) == len(finetunes) else [None] * len(finetunes)
    context = Context(
        images=sets[0] if sets else None,
        finetunes=tuple(
            Finetune(name=str(spec), read=_reader(str(spec), source), images=its)
            for spec, its in zip(finetunes, own, strict=True)
        ),
        seed=seed,
        progress=progress,
    )
    done = pipeline.run(source, recipe, context)
    torch = engine.get("torch")
    with store.writing(out, overwrite) as folder:
        store.seal(folder, done, "torch", store.write_model(folder, done, torch))
    return store.load(out)


def _calibration(images: Any, model: Model, n: int, seed: int, progress: Progress) -> Batches:
    from martlet.data import open_images
    from martlet.data.calibration import Calibration

    return Calibration(open_images(images), model.preprocess, n=n, seed=seed, progress=progress)


def _reader(spec: str, model: Model) -> Callable[[], State]:
    """What reads a fine-tune's tensors, under the names that the model has for them."""

    def read() -> State:
        from martlet.source import checkpoint, load_model

        if not store.find(spec):
            module = copy.deepcopy(model.module)
            checkpoint.load_(module, Path(spec))
            return module.state_dict()
        state = load_model(spec).module.state_dict()
        if problem := checkpoint.mismatch(model.module, state):
            raise SourceError(f"{spec} doesn't fit {model.name}: {problem}")
        return state

    return read
