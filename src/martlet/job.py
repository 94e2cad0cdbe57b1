"""The main job: a model in, an artifact out, and everything that is said about it measured."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from martlet import engine as engines
from martlet.core import pipeline, report, store
from martlet.core.errors import DataError, UsageError
from martlet.core.facts import Fact
from martlet.core.kept import Kept
from martlet.core.model import Model
from martlet.core.recipe import Recipe
from martlet.core.store import Artifact
from martlet.core.technique import Context, Progress, Technique, silent
from martlet.deployed import deploy, resolved
from martlet.proof import BATCH, Clock, Duel, describe_images, describe_recipe, gate

if TYPE_CHECKING:
    from martlet.core.report import Document
    from martlet.data.calibration import Calibration
    from martlet.data.images import Images
    from martlet.engine.base import Session
    from martlet.measure.accuracy import Logits


def compress(
    model: str | Model | Callable[[], Model],
    *,
    images: Images | str | Path | Iterable[Any],
    recipe: Recipe | str = "int8",
    engine: str = "openvino",
    out: str | Path,
    calib: Images | str | Path | Iterable[Any] | None = None,
    num_calib: int = 64,
    train: Images | str | Path | Iterable[Any] | None = None,
    teacher: str | Model | None = None,
    max_drop: float | None = None,
    overwrite: bool = False,
    threads: int | None = None,
    seed: int = 0,
    progress: Progress = silent,
    command: str | None = None,
) -> Artifact:
    """Compresses a model, measures it against the untouched one on the engine, and writes an artifact folder.

    Args:
        model: what `load_model` takes or gives; or a function that gives it, called once the rest is known to be right.
        images: what accuracy and fidelity are measured on; labels are used if there are any.
        recipe: a shipped recipe's name, techniques joined by `|`, a YAML file, or a Recipe.
        engine: `openvino`, `onnxruntime` or `torch`.
        out: the folder to write; written beside first, so it is whole or not there. Learning that was stopped stays
            in `.NAME.resume` beside it, from which the same call goes on.
        calib: images that techniques may learn from; without it, a sample of `train`, or of `images`, of which it is
            then not tested.
        num_calib: how many calibration images.
        train: what techniques that train the model train it on, with labels if there are any.
        teacher: whose outputs they learn, as `martlet.source.load_other` takes it; the untouched model without.
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
    from martlet.data import open_images
    from martlet.source import load_model

    clock, out = Clock(), Path(out)
    target = engines.get(engine)
    target.version()
    store.check_free(out, overwrite)
    recipe = Recipe.load(recipe) if isinstance(recipe, str) else recipe
    recipe.facts()
    kept = Kept.beside(out)
    context = Context(
        seed=seed,
        engine=target.name,
        int8=target.int8,
        precisions=target.alternatives(),
        progress=progress,
        kept=kept,
    )
    for technique in recipe.passes:
        technique.check_engine(context)
    with clock("load"):
        source = load_model(model) if isinstance(model, str) else model if isinstance(model, Model) else model()
        facts = recipe.facts(source.facts)
        num_calib = num_calib if recipe.needs_images else 0
        test, training = open_images(images), None
        if train is not None:
            training = open_images(train)
            if training.source == test.source and isinstance(train, str | Path):
                raise UsageError("--images and --train are the same; what is tested on can't be trained on")
        test, calibration = _data(test, train if calib is None else calib, num_calib, source, seed, progress)
        context.images = calibration
        if training is not None:
            from martlet.data.examples import Examples

            context.training = Examples.read(training, source.preprocess, source.num_classes, progress)
        if teacher is not None:
            from martlet.source import load_other

            context.teacher = load_other(teacher, source)
    patches: list[report.Patches] = []

    def look(model: Model, technique: Technique) -> None:
        if Fact.ALL_TOKENS in technique.breaks:
            from martlet.measure.patches import patches as of

            patches.extend(of(model, test))

    with clock("compress"):
        compressed = pipeline.run(source, recipe, context, look)
        assert compressed.facts == facts
    with store.writing(out, overwrite) as folder, tempfile.TemporaryDirectory() as plain:
        with clock("lower"):
            progress("write the artifact's files", 0, 2)
            graphs = {"baseline": pipeline.traced(source), "artifact": pipeline.traced(compressed)}
            files = store.write_model(folder, compressed, target, graphs["artifact"])
            store.seal(folder, compressed, engine, files)  # so that torch, which runs artifacts, can open it
            progress("write the baseline's files", 1, 2)
            baseline_files = store.write_model(Path(plain), source, target, graphs["baseline"])
            store.seal(Path(plain), source, engine, baseline_files)
        described = None
        if training is not None and context.training is not None:
            described = describe_images(training, len(context.training), None)
        duel = Duel(
            target, source, compressed, graphs, Path(plain), folder, baseline_files, files, threads, seed, progress
        )
        prove(duel, test, calibration, clock, max_drop, command, patches, described)
    shutil.rmtree(kept.folder, ignore_errors=True)
    return store.load(out)


def prove(
    duel: Duel,
    test: Images,
    calibration: Calibration | None,
    clock: Clock,
    max_drop: float | None,
    command: str | None,
    patches: Sequence[report.Patches] = (),
    training: dict[str, Any] | None = None,
) -> Document:
    """Measures both sides on the test images, and seals the artifact's folder with the report. Returns the report.

    patches, training: what the report says of them, if there is anything.
    """
    document = duel.measure(test, clock)
    document["recipe"] = describe_recipe(duel.compressed)
    document["data"] = {
        "images": describe_images(test, document["fidelity"]["n_images"], None),
        "calibration": calibration and describe_images(calibration.images, calibration.num_images, duel.seed),
    }
    if training:
        document["data"]["training"] = training
    if patches:
        document["patches"] = [*patches]
    document["gate"] = gate(document, max_drop)
    document["command"] = command
    document["seconds"] = clock.total()
    store.write_report(duel.artifact_folder, document)
    store.seal(duel.artifact_folder, duel.compressed, duel.engine.name, duel.artifact_files)
    return document


def _data(
    test: Images, calib: Any, num_calib: int, model: Model, seed: int, progress: Progress
) -> tuple[Images, Calibration | None]:
    """Test images, and calibration batches if any are needed."""
    from martlet.data import open_images
    from martlet.data.calibration import Calibration

    if isinstance(calib, str | Path) and str(calib) == test.source:
        raise UsageError("--images and --calib are the same; leave --calib out, and a part of --images is kept for it")
    if test.labelled:
        test.check_labels(model.num_classes)
    if num_calib == 0:
        return test, None
    if calib is not None:
        pool = open_images(calib)
    else:
        if len(test) < 2 * num_calib:
            raise DataError(
                f"{test.source} has {len(test)} images, too few to keep {num_calib} for calibration and test on "
                f"others; give --calib, or a smaller --num-calib"
            )
        pool, test = test.split(num_calib, seed)
    return test, Calibration(pool, model.preprocess, n=num_calib, seed=seed, progress=progress)


def evaluate(
    model: str | Path | Artifact | Model,
    images: Images | str | Path | Iterable[Any],
    *,
    engine: str | None = None,
    threads: int | None = None,
    worst_case: int | None = None,
    trust_code: bool = False,
    progress: Progress = silent,
) -> dict[str, Any]:
    """How often a model or an artifact is right, run by an engine.

    engine: None is an artifact's own, and OpenVINO for a model. threads: None is all cores. worst_case: of how many
    images it is also found, in PyTorch, what they cost once they are made to cost as much as they can; for what can
    stop early. trust_code: run the Python file that a model comes from, or an artifact in PyTorch or on another engine.

    Returns `model`, `engine`, `precision`, `threads`, `simulated`, `images` (as in the report), `n_images`, and
    `top1_pct` and `top5_pct`, which are None without labels; and `exits`: of each stage of what can stop early the
    `share_pct` of images that left after it, its `top1_pct` and `gmacs`; else None. With `worst_case`, what
    `measure.worst_case` gives.

    Raises:
        MartletError: see `martlet.core.errors`.
    """
    from martlet.data import open_images
    from martlet.measure import accuracy

    model = resolved(model, trust_code)
    with deploy(model, engine, trust_code, progress) as deployed:
        test = open_images(images)
        if test.labelled:
            test.check_labels(deployed.num_classes)
        session = deployed.open(BATCH, threads)
        found = accuracy.logits({deployed.name: session}, test, deployed.preprocess, progress)
        logits = found.values[deployed.name]
        attacked = (
            {} if worst_case is None else {"worst_case": _worst_case(model, test, worst_case, trust_code, progress)}
        )
        return {
            **deployed.describe(session),
            "images": describe_images(test, len(logits), None),
            "n_images": len(logits),
            "top1_pct": accuracy.topk_pct(logits, found.labels, 1),
            "top5_pct": accuracy.topk_pct(logits, found.labels, 5),
            "exits": _exits(session, found, deployed.name),
            **attacked,
        }


def _worst_case(model: Artifact | Model, test: Images, n: int, trust_code: bool, progress: Progress) -> dict[str, Any]:
    """Of the first n images."""
    import torch

    from martlet.data.batches import batches
    from martlet.measure.worst_case import worst_case

    model = model.model(trust_code=trust_code) if isinstance(model, Artifact) else model
    batch, _, _ = next(batches(test, model.preprocess, n))
    return worst_case(model, torch.from_numpy(batch), progress=progress)


def _exits(session: Session, found: Logits, name: str) -> list[dict[str, Any]] | None:
    """Where images left, if they could."""
    from martlet.engine.staged import StagedSession
    from martlet.measure import stages

    return stages.shares(session, found, name) if isinstance(session, StagedSession) else None


def bench(
    models: Sequence[str | Path | Artifact | Model],
    *,
    engine: str | None = None,
    threads: int | None = None,
    seed: int = 0,
    trust_code: bool = False,
    progress: Progress = silent,
) -> dict[str, Any]:
    """Latency at batch 1, all models interleaved, and throughput over batch sizes, each model after the other.

    What can stop early runs all its stages: what an image can cost at most. `compress` times real images.

    engine: None is each artifact's own, and OpenVINO for a model. seed: of the input, which is noise, and of the order
    of timing. trust_code: as of `evaluate`.

    Returns `created`, `environment`, and `models`: of each `model`, `engine`, `precision`, `threads`, `simulated`,
    `file_bytes`, `latency_ms`, `speedup` (how many times faster than the first; None if either is simulated) and
    `throughput`.

    Raises:
        MartletError: see `martlet.core.errors`.
    """
    import numpy as np

    from martlet.measure import latency, size

    if not models:
        raise UsageError("there is nothing to time; name at least one model or artifact")
    rng = np.random.default_rng(seed)
    with ExitStack() as stack:
        all_deployed = [stack.enter_context(deploy(model, engine, trust_code, progress)) for model in models]
        sessions = [deployed.open(1, threads, leaving=False) for deployed in all_deployed]
        probes = [rng.standard_normal((1, 3, *d.preprocess.size), dtype=np.float32) for d in all_deployed]
        runs = {str(i): (lambda i=i: sessions[i](probes[i])) for i in range(len(sessions))}
        times = list(latency.interleave(runs, seed=seed, progress=progress).values())  # ms, of each model
        return {
            "created": datetime.now(UTC).isoformat(timespec="seconds"),
            "environment": report.environment(),
            "models": [
                {
                    **deployed.describe(session),
                    "file_bytes": size.file_bytes(deployed.folder, deployed.files),
                    "latency_ms": latency.summary(ms),
                    "speedup": (
                        None if deployed.simulated or all_deployed[0].simulated else latency.ratio(times[0], ms, seed)
                    ),
                    "throughput": latency.throughput(
                        lambda batch, deployed=deployed: deployed.open(batch, threads, leaving=False),
                        deployed.preprocess.size,
                        progress,
                    ),
                }
                for deployed, session, ms in zip(all_deployed, sessions, times, strict=True)
            ],
        }
