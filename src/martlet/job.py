"""The main job: a model in, an artifact out, and everything that is said about it measured."""

from __future__ import annotations

import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from martlet import engine as engines
from martlet.core import pipeline, store
from martlet.core.errors import DataError, UsageError
from martlet.core.model import Model
from martlet.core.recipe import Recipe
from martlet.core.store import Artifact
from martlet.core.technique import Context, Progress, silent
from martlet.proof import Clock, Duel, describe_images, describe_recipe, gate

if TYPE_CHECKING:
    from martlet.data.calibration import Calibration
    from martlet.data.images import Images


def compress(
    model: str | Model,
    *,
    images: Images | str | Path | Iterable[Any],
    recipe: Recipe | str = "int8",
    engine: str = "openvino",
    out: str | Path,
    calib: Images | str | Path | Iterable[Any] | None = None,
    num_calib: int = 64,
    max_drop: float | None = None,
    overwrite: bool = False,
    threads: int | None = None,
    seed: int = 0,
    progress: Progress = silent,
    command: str | None = None,
) -> Artifact:
    """Compresses a model, measures it against the untouched one on the engine, and writes an artifact folder.

    Args:
        model: what `load_model` takes or gives.
        images: what accuracy and fidelity are measured on; labels are used if there are any.
        recipe: a shipped recipe's name, techniques joined by `|`, a YAML file, or a Recipe.
        engine: `openvino`, `onnxruntime` or `torch`.
        out: the folder to write; written beside first, so it is whole or not there.
        calib: images that techniques may learn from; without it, a sample of `images` that is then not tested on.
        num_calib: how many calibration images.
        max_drop: points of top-1 (of agreement, without labels) that the gate lets go.
        overwrite: replace an artifact at `out`.
        threads: cores to use; None is all.
        seed: of the calibration sample and of the order of timing.
        progress: called with what is being done, how far, of how much.
        command: what the user typed, for the report.

    Returns:
        The artifact, reloaded from disk. `artifact.report["gate"]` says whether it passed.

    Raises:
        MartletError: see `martlet.core.errors`; nothing is left at `out`.
    """
    from martlet.source import load_model

    from martlet.source import load_model

    clock, out = Clock(), Path(out)
    target = engines.get(engine)
    target.version()
    store.check_free(out, overwrite)
    recipe = Recipe.load(recipe) if isinstance(recipe, str) else recipe
    recipe.facts()
    with clock("load"):
        source = load_model(model) if isinstance(model, str) else model
        facts = recipe.facts(source.facts)
        test, batches, calibration = _data(images, calib, num_calib if recipe.needs_images else 0, source, seed)
    with clock("compress"):
        context = Context(images=batches, seed=seed, int8=target.int8, progress=progress)
        compressed = pipeline.run(source, recipe, context)
        assert compressed.facts == facts
    with store.writing(out, overwrite) as folder, tempfile.TemporaryDirectory() as plain:
        with clock("lower"):
            files = store.write_model(folder, compressed, target)
            baseline_files = store.write_model(Path(plain), source, target)
        duel = Duel(target, source, compressed, Path(plain), folder, baseline_files, files, threads, seed, progress)
        document = duel.measure(test, clock)
        document["recipe"] = describe_recipe(compressed)
        document["data"] = {
            "images": describe_images(test, document["fidelity"]["n_images"], None),
            "calibration": calibration,
        }
        document["gate"] = gate(document, max_drop)
        document["command"] = command
        document["seconds"] = clock.total()
        store.write_report(folder, document)
        store.seal(folder, compressed, engine, files)
    return store.load(out)


def _data(
    images: Any, calib: Any, num_calib: int, model: Model, seed: int
) -> tuple[Images, Calibration | None, dict[str, Any] | None]:
    """Test images, calibration batches if any are needed, and what the report says of the latter."""
    from martlet.data import open_images
    from martlet.data.calibration import Calibration

    if calib is not None and isinstance(images, str | Path) and str(images) == str(calib):
        raise UsageError("--images and --calib are the same; leave --calib out, and a part of --images is kept for it")
    test = open_images(images)
    if test.labelled:
        test.check_labels(model.num_classes)
    if num_calib == 0:
        return test, None, None
    if calib is not None:
        pool = open_images(calib)
    else:
        if len(test) < 2 * num_calib:
            raise DataError(
                f"{test.source} has {len(test)} images, too few to keep {num_calib} for calibration and test on others; "
                f"give --calib, or a smaller --num-calib"
            )
        pool, test = test.split(num_calib, seed)
    batches = Calibration(pool, model.preprocess, n=num_calib, seed=seed)
    return test, batches, describe_images(pool, batches.num_images, seed)


