"""What stopping early saves and costs: a ViT-Ti tuned to CIFAR-10, a cascade on ImageNet, a stream of frames.

    python benchmarks/exits.py --parts accuracy       # half an hour on two quiet cores
    python benchmarks/exits.py --parts latency        # ten minutes, with nothing else running
    python benchmarks/exits.py --parts stream         # five minutes, the last of timing
    python benchmarks/exits.py --parts search         # half an hour, with nothing else running

Writes results/exits.json. The ViT-Ti is tuned once and kept in --work; exits leave its weights as they are. Thresholds
are solved on calibration images and judged on test images that nothing was learned from. Rows that are there already
aren't done again, and training that was stopped goes on.
"""

from __future__ import annotations

import argparse
import functools
import json
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

import peers
from martlet import engine as engines
from martlet.cli.terminal import note, working
from martlet.core import pipeline, report, store
from martlet.core.errors import MartletError
from martlet.core.kept import Kept
from martlet.core.model import Model
from martlet.core.recipe import Recipe
from martlet.core.technique import Context, Progress
from martlet.data import open_images
from martlet.data.batches import batches
from martlet.data.calibration import Calibration
from martlet.data.examples import Examples
from martlet.data.images import Images
from martlet.engine.base import Piece, cores
from martlet.engine.staged import StagedSession, read_policy, write_policy
from martlet.functional.exits import Budget, Plan, decide, plan, solve
from martlet.graph.stages import unstaged
from martlet.measure import latency
from martlet.measure.stages import pick, spread
from martlet.recipe_search.whole import search
from martlet.source import load_model
from martlet.techniques.exits.eco_m2f import LIKELIEST, EcoM2F
from search import told
from setups import moving_cifar
from setups.cifar import ASSETS, CLASSES
from setups.tuning_tasks import base

HOST = ("resolution: {size: 160}", "finetune: {epochs: 2.0, batch: 32, rate: 1.0e-4, precision: bf16}")
NAME = "timm:vit_tiny_patch16_224 at 160 px, tuned to CIFAR-10"
NUM_TRAIN, NUM_CALIB, NUM_TEST = 8000, 1000, 2000
NUM_SEARCHED, NUM_SEARCH_TRAIN, SEARCH_MINUTES = 800, 4000, 20.0
"""Of the test images, those that a search sees; those that its exits are trained on."""
TRAINING = "{epochs: 4.0, batch: 64, precision: bf16}"
EXITS = {
    "linear_exits": (f"linear_exits: {TRAINING}",),
    "lgvit": (f"lgvit: {TRAINING}",),
    "lgvit, int8": (f"lgvit: {TRAINING}", "int8"),
    "mue": ("mue",),
    "dyn_perceiver": (f"dyn_perceiver: {TRAINING}",),
}
"""Passes on the host, by the name of the row: exits, and what else is done, also to what they are timed against."""
SHARES = (0.5, 0.6, 0.7, 0.8, 0.9)
"""Mean budgets, of what the last exit costs."""
DROPS = (0.5, 1.0, 2.0)
"""Points of top-1 that may be lost on the calibration images."""
BETAS = (0.0, 0.05, 0.1, 0.2, 0.4)
"""Balances of a gate."""
MEMBERS = ("timm:efficientnet_lite0", "timm:vit_tiny_patch16_224")
MEMBER_WEIGHTS = ("efficientnet_lite0.in1k.safetensors", "vit_tiny_patch16_224.in1k.safetensors")
PARTS = ("accuracy", "latency", "stream", "search")
BATCHES = (1, 16)
ONE = "one"
"""What the files are called of a graph that computes all exits."""
TIMED, ASKED, SECONDS = 64, 16, 45.0
"""Images that are timed, and of a batch that all exits are asked for; and of timing a batch size."""
Job = Callable[[str, Path, Path, Progress], dict[str, Any]]


def main(argv: Sequence[str] | None = None) -> int:
    """Fills in the rows that are missing. Returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--rows", nargs="+", metavar="ROW", help="of these alone, such as lgvit or cascade")
    parser.add_argument("--out", type=Path, default=peers.ROOT / "results" / "exits.json")
    parser.add_argument("--assets", type=Path, default=ASSETS, help="folder with data and weights")
    parser.add_argument("--work", type=Path, default=Path("runs/exits"), help="where the tuned model is kept")
    options = parser.parse_args(argv)
    document: dict[str, Any] = json.loads(options.out.read_text(encoding="utf-8")) if options.out.is_file() else {}
    document = {"benchmark": "exits"} | {part: {} for part in PARTS} | document
    ways: dict[str, Job] = {name: functools.partial(tuned, options.work, passes) for name, passes in EXITS.items()}
    ways["cascade"] = cascade
    more: dict[str, Job] = {"lgvit, gate": functools.partial(gated, options.work)}
    jobs = {"accuracy": ways | more, "latency": ways, "stream": {"moving CIFAR": moving}}
    jobs["search"] = {"ViT-Ti": functools.partial(searched, options.work)}
    try:
        for part in options.parts:
            for name, job in jobs[part].items():
                if name in document[part] or name not in (options.rows or [name]):
                    continue
                with working(f"{part} of {name}") as progress:
                    document[part][name] = job(part, options.assets, options.out, progress)
                peers.write(options.out, document)
                note(f"{part} of {name} is in {options.out}")
    except MartletError as error:
        note(str(error))
        return error.exit_status
    if not options.rows and {*options.parts} == {*PARTS}:
        shutil.rmtree(Kept.beside(options.out).folder, ignore_errors=True)
    return 0


def prepared(work: Path, assets: Path, out: Path, progress: Progress) -> tuple[Model, Context, Images]:
    """The ViT-Ti, what techniques learn from, and the images of CIFAR-10 to test on."""
    pool = open_images(assets / "data" / "cifar10" / "train.parquet", limit=NUM_TRAIN + NUM_CALIB, seed=0)
    calib, train = pool.split(NUM_CALIB, seed=0)
    test = open_images(assets / "data" / "cifar10" / "test.parquet", limit=NUM_TEST, seed=0)
    kept = Kept.beside(out)
    if not (work / store.MANIFEST).is_file():
        smaller, learn = map(recipe, HOST)
        source = pipeline.run(base(assets), smaller, Context(progress=progress))
        training = Examples.read(train, source.preprocess, CLASSES, progress)
        model = pipeline.run(source, learn, Context(training=training, progress=progress, kept=kept))
        work.parent.mkdir(parents=True, exist_ok=True)
        with store.writing(work, overwrite=True) as folder:
            store.seal(folder, model, "torch", store.write_model(folder, model, engines.get("torch")))
    source = replace(store.load(work).model(), name=NAME)
    context = Context(
        images=Calibration(calib, source.preprocess, n=NUM_CALIB, seed=0),
        training=Examples.read(train, source.preprocess, CLASSES, progress),
        engine="openvino",
        int8=engines.get("openvino").int8,
        progress=progress,
        kept=kept,
    )
    return source, context, test


def tuned(work: Path, passes: Sequence[str], part: str, assets: Path, out: Path, progress: Progress) -> dict[str, Any]:
    """A row of the ViT-Ti."""
    source, context, test = prepared(work, assets, out, progress)
    assert isinstance(context.images, Calibration)
    model, plain = (pipeline.run(source, recipe(*each), context) for each in (passes, passes[1:]))
    return judge(plain, pipeline.traced(model), context.images, test, part, progress)


def recipe(*passes: str) -> Recipe:
    """Of passes as YAML."""
    return Recipe.from_yaml(
        f"martlet: 1\npasses: [{', '.join(f'{{{each}}}' if ':' in each else each for each in passes)}]"
    )


def gated(work: Path, part: str, assets: Path, out: Path, progress: Progress) -> dict[str, Any]:
    """A gate on the exits of LGViT, with what it lets go at each balance."""
    source, context, test = prepared(work, assets, out, progress)
    exits = pipeline.run(source, recipe(*EXITS["lgvit"]), context)
    rows, row = [], {}
    for beta in BETAS:
        model = pipeline.traced(pipeline.run(exits, Recipe((EcoM2F(beta=beta),)), context))
        with tempfile.TemporaryDirectory() as folder:
            session = opened(model, Path(folder, "staged"))
            gmacs, unseen = costs(session), ask(session, batches(test, model.preprocess, ASKED), progress)
        truth, limits = unseen["answers"] == unseen["labels"], [LIKELIEST[1]] * (len(gmacs) - 1)
        rows.append({"beta": beta, "test": _test(plan(unseen["confidences"], truth, gmacs, limits))})
        row = {
            "model": model.name,
            "gmacs": gmacs.tolist(),
            "n_calibration": NUM_CALIB,
            "n_test": truth.shape[1],
            "top1_pct": (100 * truth.mean(1)).tolist(),
        }
    return row | {"budgets": rows, "environment": report.environment(("torch", "timm", "openvino", "numpy"))}


def moving(part: str, assets: Path, out: Path, progress: Progress) -> dict[str, Any]:
    """A row of two networks on a stream."""
    return moving_cifar.measure(assets, progress)


def searched(work: Path, part: str, assets: Path, out: Path, progress: Progress) -> dict[str, Any]:
    """What `martlet search --train` finds for the ViT-Ti: exits among everything else."""
    source, _, test = prepared(work, assets, out, progress)
    train = open_images(assets / "data" / "cifar10" / "train.parquet", limit=NUM_SEARCH_TRAIN, seed=0)
    found = search(
        source,
        images=test,
        train=train,
        out=work.with_name(f"{work.name}-search"),
        max_drop=1.0,
        minutes=SEARCH_MINUTES,
        num_images=NUM_SEARCHED,
        progress=progress,
    )
    return told(found.document, SEARCH_MINUTES, "its own weights", "cifar10") | {
        "n_training": len(train),
        "why": found.why,
    }


def cascade(part: str, assets: Path, out: Path, progress: Progress) -> dict[str, Any]:
    """EfficientNet-Lite0 before ViT-Ti, on ImageNet: half of the images to calibrate, the others to test."""
    first, last = (assets / "weights" / file for file in MEMBER_WEIGHTS)
    source = load_model(MEMBERS[1], weights=last)
    images = open_images(assets / "data" / "imagenet1k-val-227px" / "test.parquet")
    calib, test = images.split(len(images) // 2, seed=0)
    calibration = Calibration(calib, source.preprocess, n=len(calib), seed=0)
    members = recipe(f"cascade: {{first: ['{MEMBERS[0]}={first}']}}")
    model = pipeline.run(source, members, Context(images=calibration, progress=progress))
    found = judge(source, model, calibration, test, part, progress)
    if part == "accuracy":
        alone = load_model(MEMBERS[0], weights=first)
        found["alone"] = [_alone(each, test, progress) for each in (alone, source)]
    return found


def judge(
    source: Model, model: Model, images: Calibration, test: Images, part: str, progress: Progress
) -> dict[str, Any]:
    """model: traced, with exits that no image takes yet."""
    with tempfile.TemporaryDirectory() as folder:
        session = opened(model, Path(folder, "staged"))
        gmacs = costs(session)
        seen = ask(session, ((batch.numpy(), None, None) for batch in images), progress)
        unseen = ask(session, batches(test, model.preprocess, ASKED), progress)
        right, truth = seen["answers"] == images.labels, unseen["answers"] == unseen["labels"]
        if part == "latency":
            budgets = {f"staged at {drop:g}": Budget(lost=drop / 100) for drop in DROPS}
            solved = {which: solve(seen["confidences"], right, gmacs, budget) for which, budget in budgets.items()}
            policies = {which: found.thresholds for which, found in solved.items() if found is not None}
            return {
                "thresholds": {which: [str(t) for t in limits] for which, limits in policies.items()},
                "test": {
                    which: _test(plan(unseen["confidences"], truth, gmacs, limits))
                    for which, limits in policies.items()
                },
                "batches": timed(source, model, Path(folder), policies, unseen["confidences"], test, progress),
                "environment": report.environment(),
            }
    rows = []
    for kind, values in (("mean", [share * gmacs[-1] for share in SHARES]), ("drop", DROPS)):
        for value in values:
            budget = Budget(mean=value) if kind == "mean" else Budget(lost=value / 100)
            found = solve(seen["confidences"], right, gmacs, budget)
            if found is None or (kind == "mean" and value < gmacs[0]):
                continue
            rows.append(
                {
                    kind: value,
                    "thresholds": [str(each) for each in found.thresholds],
                    "calibration": {"gmacs": found.cost, "top1_pct": 100 * (1 - found.wrong)},
                    "test": _test(plan(unseen["confidences"], truth, gmacs, found.thresholds)),
                }
            )
    return {
        "model": model.name,
        "gmacs": gmacs.tolist(),
        "n_calibration": right.shape[1],
        "n_test": truth.shape[1],
        "top1_pct": (100 * truth.mean(1)).tolist(),
        "budgets": rows,
        "environment": report.environment(("torch", "timm", "openvino", "numpy")),
    }


def written(model: Model, path: Path) -> Path:
    """The artifact for OpenVINO."""
    path.mkdir()
    store.seal(path, model, "openvino", store.write_model(path, model, engines.get("openvino")))
    return path


def opened(model: Model, path: Path) -> StagedSession:
    """The artifact, and what asks its stages."""
    session = engines.get("openvino").open(written(model, path), batch=ASKED)
    assert isinstance(session, StagedSession)
    return session


def costs(session: StagedSession) -> np.ndarray:
    """GMACs of an image that leaves at each exit, and at the end."""
    return np.array([step.macs for step in session.steps]) / 1e9


def ask(session: StagedSession, groups: Iterable[Any], progress: Progress) -> dict[str, np.ndarray]:
    """Every exit's confidence (E, N) and answer (E + 1, N), as the engine gives them, and the labels."""
    confidences, answers, labels = [], [], []
    for i, (images, known, _) in enumerate(groups):
        whole = np.concatenate([images, np.zeros((ASKED - len(images), *images.shape[1:]), images.dtype)])
        found = [[each[: len(images)] for each in given.values()] for given in session.through(whole)]
        confidences.append(np.stack([values[1] for values in found[:-1]]))
        answers.append(np.stack([values[0].argmax(1) for values in found]))
        labels += known or []
        progress("batches through every exit", i, i + 1)
    return {
        "confidences": np.concatenate(confidences, 1),
        "answers": np.concatenate(answers, 1),
        "labels": np.array(labels),
    }


def timed(
    source: Model,
    model: Model,
    folder: Path,
    policies: Mapping[str, np.ndarray],
    confidences: np.ndarray,
    test: Images,
    progress: Progress,
    seed: int = 0,
) -> dict[str, Any]:
    """Mean milliseconds of an image on OpenVINO: the untouched model, with exits at each number of points lost, none
    leaving, and one graph that computes all that the stages do, so that what the runtime costs stands apart from what
    heads cost.

    folder: the model's artifact is `staged` in it.
    """
    exits = decide(confidences, next(iter(policies.values())))
    images = pick(test, model.preprocess, spread(exits, TIMED), seed)
    target, found = engines.get("openvino"), {}
    written(source, folder / "source")
    for which, limits in policies.items():
        path = shutil.copytree(folder / "staged", folder / which)
        steps = zip(read_policy(path), [*limits, np.inf], strict=True)
        write_policy(path, [step._replace(high=float(high)) for step, high in steps])
    whole = unstaged(model.module)  # type: ignore[arg-type]
    example = torch.zeros(2, 3, *model.preprocess.size)
    target.write(Piece(model, whole.module, (example,), whole.inputs, whole.outputs), folder, ONE)
    for batch in BATCHES:
        sessions = {which: target.open(folder / which, batch=batch) for which in ("source", *policies)}
        sessions["never"] = target.open(folder / "staged", batch=batch)
        sessions["one graph"] = target.sessions(folder, {ONE: [batch]}, "f32", cores(), False)[ONE][batch]
        groups = [images[i : i + batch] for i in range(0, len(images) - batch + 1, batch)]
        runs = {which: functools.partial(_each, session, groups) for which, session in sessions.items()}
        ms = latency.interleave(runs, seed=seed, min_seconds=SECONDS, max_seconds=2 * SECONDS, progress=progress)
        found[str(batch)] = {
            which: {
                "ms": latency.summary(times / len(groups) / batch),
                "speedup": latency.ratio(ms["source"], times, seed),
                "over_one_graph": latency.ratio(ms["one graph"], times, seed),
            }
            for which, times in ms.items()
        }
    return found


def _test(found: Plan) -> dict[str, Any]:
    return {
        "gmacs": found.cost,
        "top1_pct": 100 * (1 - found.wrong),
        "share_pct": (100 * found.share).tolist(),
    }


def _each(session: Any, groups: Sequence[np.ndarray]) -> None:
    for group in groups:
        session(group)


def _alone(model: Model, test: Images, progress: Progress) -> dict[str, Any]:
    from martlet.measure.macs import macs

    right = []
    for images, labels, _ in batches(test, model.preprocess, ASKED):
        with torch.inference_mode():
            right += (model.module(torch.from_numpy(images)).argmax(1) == torch.tensor(labels)).tolist()
        progress("images through the model alone", len(right), len(test))
    return {"model": model.name, "gmacs": macs(model) / 1e9, "top1_pct": 100 * float(np.mean(right))}


if __name__ == "__main__":
    sys.exit(main())
