"""Fewer tokens, timed: NNCF's int8, Martlet's int8 and bf16, with all tokens and with fewer, interleaved on OpenVINO.

    python benchmarks/tokens.py                              # every case: some twenty minutes on two cores
    python benchmarks/tokens.py --cases "vit_tiny 224, batch 1"

Writes one JSON file, case after case; started again with the same settings, it goes on where it stopped. Accuracy is
that of real weights on the real images of --assets, less those that calibrate; random weights are timed only.
"""

from __future__ import annotations

import argparse
import functools
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

import peers
from martlet import engine as engines
from martlet.cli.terminal import note, show, table, working
from martlet.core import pipeline, registry
from martlet.core.errors import MartletError
from martlet.core.recipe import Recipe
from martlet.core.technique import Context, Progress
from martlet.engine.base import Session, cores
from martlet.engine.openvino import XML
from martlet.measure import latency

if TYPE_CHECKING:
    from rich.table import Table

    from martlet.core.model import Model
    from martlet.data.calibration import Calibration
    from martlet.data.images import Images

NNCF, INT8 = "int8 (NNCF)", "int8"
TURN = 10
"""Calls in a row, when a model's turns are timed: the first of a turn finds another model's data in the caches."""


@dataclass(frozen=True, kw_only=True)
class Workload:
    """A timm model at one size and batch. weights: a file of the assets, None for seeded random ones.

    image_size: pixels of a side, if not the model's own; position embeddings are resampled.
    schedules: tokens removed by block, by `tps`, whose time and accuracy is asked for, in int8 and in bf16.
    """

    name: str
    model: str
    batch: int = 1
    image_size: int | None = None
    weights: str | None = None
    schedules: tuple[Mapping[int, int], ...] = field(default_factory=tuple)


VIT_TINY = "vit_tiny_patch16_224.in1k.safetensors"
FASTEST = {3: 25, 6: 88}
"""Of what `martlet search` found for ViT-Ti in bfloat16 with AMX, the fastest within one point, on 650 images."""
DEEPER = {3: 65, 6: 65}
"""The same, in int8 without AMX, on 64 images."""
FASTEST_384 = {3: 192, 6: 192}
"""The same shares of 576 patches."""
WORKLOADS = (
    Workload(name="vit_tiny 224, batch 1", model="vit_tiny_patch16_224", weights=VIT_TINY, schedules=(FASTEST, DEEPER)),
    Workload(name="deit_small 224, batch 1", model="deit_small_patch16_224", schedules=(FASTEST, DEEPER)),
    Workload(
        name="vit_tiny 384, batch 1",
        model="vit_tiny_patch16_224",
        image_size=384,
        weights=VIT_TINY,
        schedules=(FASTEST_384,),
    ),
    Workload(name="vit_tiny 224, batch 8", model="vit_tiny_patch16_224", batch=8, schedules=(FASTEST, DEEPER)),
    Workload(name="deit_small 224, batch 8", model="deit_small_patch16_224", batch=8, schedules=(FASTEST, DEEPER)),
)


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What must be equal for two workloads to stand in one file. seconds: of timing one workload, call by call."""

    threads: int
    seconds: float
    calibration_images: int = peers.HELD_OUT
    calibration_images_random: int = 8
    seed: int = 0
    turn: int = TURN
    gomp_spincount: str = "10000"


def main(argv: Sequence[str] | None = None) -> int:
    """Runs what the command line asks for. Returns the exit status."""
    options = _options(argv)
    settings = Settings(threads=cores(), seconds=options.seconds)
    os.environ[peers.SPIN] = settings.gomp_spincount  # read when torch is loaded
    try:
        document = peers.open_document(options.out, settings, "tokens", "workloads")
        for workload in options.cases:
            if workload.name in {found["name"] for found in document["workloads"]} and not options.again:
                note(f"{workload.name} is in {options.out} already; --again measures it anew")
                continue
            with working(workload.name) as progress:
                record = run(workload, options.assets, settings, progress)
            document["workloads"] = [w for w in document["workloads"] if w["name"] != workload.name] + [record]
            peers.write(options.out, document)
    except MartletError as error:
        note(str(error))
        return error.exit_status
    for record in document["workloads"]:
        show(f"{record['name']}, {record['weights']}", _table(record))
    return 0


def run(workload: Workload, assets: Path, settings: Settings, progress: Progress) -> dict[str, Any]:
    """Prepares, times and tests the entries of one workload. Returns its record."""
    import torch

    from martlet.data import open_images
    from martlet.data.calibration import Calibration
    from martlet.models.random_weights import randomize_
    from martlet.source import load_model

    torch.set_num_threads(settings.threads)
    start = time.perf_counter()
    weights = assets / "weights" / workload.weights if workload.weights else None
    size = {"img_size": workload.image_size} if workload.image_size else None
    model = load_model(f"timm:{workload.model}", weights=weights, model_kwargs=size, seed=settings.seed)
    if not weights:
        randomize_(model.module, settings.seed)  # biases of zero would be left out of some files and not of others
    n = settings.calibration_images if weights else settings.calibration_images_random
    pool, rest = open_images(peers._images(assets, peers.VALIDATION)).split(peers.HELD_OUT, settings.seed)
    calibration = Calibration(pool, model.preprocess, n=n, batch_size=8, seed=settings.seed)
    tests = {}
    if weights:
        sample = open_images(peers._images(assets, peers.SAMPLE))
        tests = {
            peers.SAMPLE: peers.cropped(sample, model.preprocess),
            peers.VALIDATION: peers.cropped(rest, model.preprocess),
        }
    probe = next(iter(calibration))[: workload.batch].numpy()
    engine = engines.get("openvino")
    entries: list[dict[str, Any]] = []
    with ExitStack() as stack:
        sessions: dict[str, Session] = {}
        opened: dict[str, Session] = {}  # at batch 1, for accuracy
        for name, write in contenders(model, calibration, workload, settings):
            progress(f"prepare {name}", 0, 0)
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
            precision = write(folder)
            open_at = functools.partial(engine.open, folder, precision=precision, threads=settings.threads)
            sessions[name] = open_at(batch=workload.batch)
            if tests:
                opened[name] = sessions[name] if workload.batch == 1 else open_at(batch=workload.batch)
            entries.append({"name": name, "floating_point": precision})
        runs = {name: (lambda session=session: session(probe)) for name, session in sessions.items()}
        times = latency.interleave(runs, seed=settings.seed, min_seconds=settings.seconds, progress=progress)
        turns = in_turns(runs, settings)
        for entry in entries:
            name = entry["name"]
            entry["latency_ms"] = latency.summary(times[name])
            entry["in_turns_ms"] = latency.summary(turns[name])
            for key, baseline in (("nncf", NNCF), ("int8", INT8)):
                entry[f"speedup_over_{key}"] = latency.ratio(times[baseline], times[name], settings.seed)
                entry[f"speedup_over_{key}_in_turns"] = latency.ratio(turns[baseline], turns[name], settings.seed)
            if tests:
                progress(f"test {name}", 0, 0)
                entry["accuracy"] = _accuracy(opened[name], tests, model, progress)
    return {
        "name": workload.name,
        "model": workload.model,
        "weights": workload.weights or model.origin["weights"],
        "batch": workload.batch,
        "image_size": list(model.preprocess.size),
        "calibration": {"images": peers.VALIDATION, "n": calibration.num_images, "seed": settings.seed},
        "seconds": round(time.perf_counter() - start, 1),
        "entries": entries,
    }


def contenders(
    model: Model, calibration: Calibration, workload: Workload, settings: Settings
) -> Iterator[tuple[str, Callable[[Path], str]]]:
    """Each name, and what writes its files into a folder and says the precision of its floating-point parts.

    bf16 is left out where the machine has no instructions for it.
    """
    engine = engines.get("openvino")

    def nncf(folder: Path) -> str:
        """As NNCF's documentation says for transformers; the model is converted at the batch that is timed."""
        import nncf
        import openvino as ov
        import torch

        example = torch.zeros(workload.batch, 3, *model.preprocess.size)
        converted = ov.convert_model(model.module, example_input=example, input=[tuple(example.shape)])
        images = np.concatenate([batch.numpy() for batch in calibration])
        whole = len(images) - len(images) % workload.batch
        batches = np.split(images[:whole], whole // workload.batch)
        quantized = nncf.quantize(
            converted, nncf.Dataset(batches), subset_size=len(batches), model_type=nncf.ModelType.TRANSFORMER
        )
        ov.save_model(quantized, folder / XML, compress_to_fp16=False)
        return "bf16" if "bf16" in engine.alternatives() else "f32"

    def martlet(recipe: Recipe) -> Callable[[Path], str]:
        def write(folder: Path) -> str:
            context = Context(
                images=calibration, seed=settings.seed, int8=engine.int8, precisions=engine.alternatives()
            )
            done = pipeline.run(model, recipe, context)
            engine.lower(done, folder)
            return done.precision

        return write

    yield NNCF, nncf
    formats = {INT8: Recipe.load("int8").passes[1:]}
    if "bf16" in engine.alternatives():
        formats["bf16"] = (registry.technique("bf16")(),)
    fuse = registry.technique("fuse")()
    for name, passes in formats.items():
        yield name, martlet(Recipe((fuse, *passes)))
    yield "tokens-int8", martlet(Recipe.load("tokens-int8"))
    for schedule in workload.schedules:
        text = ", ".join(f"{block}: {r}" for block, r in schedule.items())
        tps = registry.technique("tps").from_settings({"r": schedule})
        for name, passes in formats.items():
            yield f"{name}, tps {{{text}}}", martlet(Recipe((fuse, tps, *passes)))


def in_turns(runs: Mapping[str, Callable[[], object]], settings: Settings) -> dict[str, np.ndarray]:
    """Milliseconds as `interleave` gives them, but of one that is called again and again, as a server does.

    In each round every model has a turn, in a new random order: one call that isn't timed, and the median of `turn`.
    """
    rng, names = np.random.default_rng(settings.seed), list(runs)
    times: dict[str, list[float]] = {name: [] for name in names}
    start = time.perf_counter()
    while time.perf_counter() - start < settings.seconds or len(times[names[0]]) < 10:
        for i in rng.permutation(len(names)):
            runs[names[i]]()
            calls = []
            for _ in range(settings.turn):
                before = time.perf_counter_ns()
                runs[names[i]]()
                calls.append(time.perf_counter_ns() - before)
            times[names[i]].append(float(np.median(calls)) / 1e6)
    return {name: np.array(values) for name, values in times.items()}


def _accuracy(session: Session, tests: Mapping[str, Images], model: Model, progress: Progress) -> dict[str, Any]:
    """Top-1 of all test images together, and of each set."""
    from martlet.measure import accuracy

    right = total = 0.0
    found: dict[str, Any] = {}
    for name, images in tests.items():
        result = accuracy.logits({"it": session}, images, model.preprocess.override({"resize": None}), progress)
        top1 = accuracy.topk_pct(result.values["it"], result.labels, 1)
        assert top1 is not None
        found[name] = {"n": len(result.labels), "top1_pct": top1}
        right, total = right + top1 * len(result.labels), total + len(result.labels)
    return {"n": int(total), "top1_pct": right / total, "sets": found}


def _table(record: Mapping[str, Any]) -> Table:
    from martlet.report import units, verdict

    headings = ["Entry", "ms", "Over NNCF", "In turns", "Top-1 %"]
    rows = [
        [
            entry["name"],
            units.number(entry["latency_ms"]["median"]),
            verdict.interval(entry["speedup_over_nncf"]),
            verdict.interval(entry["speedup_over_nncf_in_turns"]),
            f"{entry['accuracy']['top1_pct']:.2f}" if "accuracy" in entry else "",
        ]
        for entry in record["entries"]
    ]
    return table(headings, rows, numbers=headings[1:])


def _options(argv: Sequence[str] | None) -> argparse.Namespace:
    named = {workload.name: workload for workload in WORKLOADS}
    assets = Path(os.environ.get("MARTLET_ASSETS", peers.ROOT.parent / "shared"))
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--cases", nargs="+", choices=named, metavar="NAME", help=f"some of: {'; '.join(named)}")
    parser.add_argument("--assets", type=Path, default=assets, help="folder with data/ and weights/ (MARTLET_ASSETS)")
    parser.add_argument("--out", type=Path, default=peers.ROOT / "results/tokens.json", help="results/tokens.json")
    parser.add_argument("--seconds", type=float, default=15.0, help="of timing, for each case and way")
    parser.add_argument("--again", action="store_true", help="measure anew what is in --out already")
    options = parser.parse_args(argv)
    options.cases = [named[name] for name in options.cases] if options.cases else list(WORKLOADS)
    return options


if __name__ == "__main__":
    sys.exit(main())
