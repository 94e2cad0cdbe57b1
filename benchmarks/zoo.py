"""The zoo, and the architectures of timm beside it: what each counts, how it exports, and how long a call takes.

    python benchmarks/zoo.py --parts counts export     # whenever: neither depends on what else the machine does
    python benchmarks/zoo.py --parts latency           # on a quiet machine
    python benchmarks/zoo.py --models repvit_m0_9 --minutes 0.02 --out runs/zoo.json

Writes one JSON file, model after model, the smallest of every family first, then the others from small to large;
started again, it goes on where it stopped. Weights are random, so that every layer matters: no time and no count
depends on their values. Export is of the model as recipe `fuse` leaves it, and its logits on two images are held
against those of the untouched model in PyTorch. Times are of float32, all engines interleaved in one run for each model
and batch size. What fails is an entry that says why. Models over --max-gmacs are counted only, but for the smallest of
each family and those that are named. Files that engines run are kept in --work: clear it when Martlet has changed.
"""

from __future__ import annotations

import argparse
import gc
import shutil
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

import peers
from martlet import engine as engines
from martlet.cli.terminal import note, working
from martlet.core import pipeline, registry, report
from martlet.core.errors import MartletError, NumericsError, UsageError, nearest
from martlet.core.recipe import Recipe
from martlet.core.technique import Context, Progress, Stage
from martlet.engine.base import WHOLE, cores
from martlet.engine.openvino import OpenVINO

if TYPE_CHECKING:
    from torch import Tensor

    from martlet.core.model import Model

PARTS = ("counts", "export", "latency")
ENGINES = ("openvino", "onnxruntime", "torch")
EXPORTED = ("onnxruntime", "openvino")
"""The engines that read a file, the one that reads ONNX itself first; PyTorch runs the module."""
BATCHES = (1, 16)
FEW = 2
"""Images on which logits are compared."""
FEWEST = 3
"""Rounds that are timed at least: a call of the largest models on sixteen images takes a minute."""
LEAST_BETWEEN = 1e-3
"""That the logits of two images have to differ by, over the largest: what differs by less can't be compared."""


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What must be equal for two models to stand in one file."""

    precision: str = "f32"
    seed: int = 0


def main(argv: Sequence[str] | None = None) -> int:
    """Runs what the command line asks for. Returns the exit status."""
    options = _options(argv)
    settings = Settings()
    try:
        known = table()
        for name in options.models or ():
            if name not in known:
                raise UsageError(f"the table has no model {name!r}{nearest(name, known)}")
        document = open_document(options, settings)
        records = {record["name"]: record for record in document["models"]}
        for part in (part for part in PARTS if part in ("counts", *options.parts)):  # counts say what is left out
            for name in sorted(options.models or known, key=lambda name: _place(name, known, records)):
                record = records.setdefault(name, {"name": name})
                if part in record and not (options.again and part in options.parts):
                    continue
                another, size = _place(name, known, records)
                if part != "counts" and another and not options.models and size > 1e9 * options.max_gmacs:
                    continue
                exported = part != "latency" or "export" in record  # engines are timed on what was exported
                for each in (part,) if exported else ("export", part):
                    with working(name) as progress:
                        record[each] = measure(each, name, record, options, settings, progress)
                    document["models"] = list(records.values())
                    peers.write(options.out, document)
                    note(f"{name}: {line(each, record[each])}")
                gc.collect()
    except MartletError as error:
        note(str(error))
        return error.exit_status
    return 0


def open_document(options: argparse.Namespace, settings: Settings) -> dict[str, Any]:
    """The results so far. Counts and exports may come from any machine; all times are of one, whose `environment` is
    the document's. If it is another than this, and times are asked for anew, those of the other are dropped.

    Raises:
        UsageError: there are times of another machine or of other versions, and none are asked for anew.
    """
    document = peers.open_document(options.out, settings, "zoo", timed=False)
    if "latency" not in options.parts:
        return document
    here, timed = report.environment(peers.PACKAGES), [record for record in document["models"] if "latency" in record]
    if timed and (differs := peers.difference(document["environment"], here)):
        if not options.again:
            raise UsageError(
                f"{options.out} has times that were measured with {differs}; give another --out, or --again to drop "
                "these and keep the rest"
            )
        for record in timed:
            del record["latency"]
    elif timed:
        here["versions"] |= document["environment"]["versions"]
    return document | {"environment": here}


def table() -> tuple[str, ...]:
    """Every model that has a row, by timm's name for it."""
    from martlet import models

    return (*models.names(), *models.timm_names())


def measure(
    part: str,
    name: str,
    record: Mapping[str, Any],
    options: argparse.Namespace,
    settings: Settings,
    progress: Progress,
) -> dict[str, Any]:
    """One part of a model's record."""
    try:
        if part == "counts":
            return counts(name)
        if part == "export":
            return export(name, options.work / name, settings, progress)
        return latency(name, record, options, settings, progress)
    except MartletError as error:
        return {"error": str(error)}


def counts(name: str) -> dict[str, Any]:
    """Parameters and MACs per image, as the paper counts its model; and without attention, if the paper ignores it."""
    import torch

    from martlet import models
    from martlet.graph.trace import example_values, trace
    from martlet.measure.macs import macs_by_node, macs_run
    from martlet.measure.size import params

    module, size, row = models.skeleton(name), models.image_size(name), models.stated(name)
    found = {"image_size": list(size), "params": params(module), "macs": macs_run(module, size)}
    if row and not row.counts_attention:
        with torch.device("meta"):
            graph = trace(module, size)
            nodes = macs_by_node(graph, example_values(graph, size)).values()
        found["macs_without_attention"] = sum(node.macs for node in nodes if not node.attention)
    return found


def takes(technique: str, model: Model, traced: Model) -> bool:
    """Whether the technique's own check, with its usual settings, takes the model."""
    usual = registry.technique(technique)()
    try:
        usual.check(traced if usual.stage is Stage.GRAPH else model)
    except MartletError:
        return False
    return True


def load(name: str, settings: Settings) -> tuple[Model, Model]:
    """The model with random weights, untouched and fused."""
    from martlet import models
    from martlet.models.random_weights import randomize_
    from martlet.source import load_model

    classes = 1000 if name in models.timm_names() else None
    size = models.image_size(name)
    model = load_model(models.spec(name), num_classes=classes, weights="random", preprocess={"size": size})
    randomize_(model.module, settings.seed, noise(model, settings))
    return model, pipeline.run(model, Recipe.load("fuse"), Context(seed=settings.seed))


def export(name: str, folder: Path, settings: Settings, progress: Progress) -> dict[str, Any]:
    """What techniques take the model; for each engine the largest error of a logit over the largest logit, or why not.

    Raises:
        MartletError: the model can't be loaded, fused or traced, or its logits don't depend on the image.
    """
    import torch

    progress("load", 0, 0)
    model, fused = load(name, settings)
    images = noise(model, settings)
    with torch.inference_mode():
        expected = model.module(images).numpy()
    largest = np.abs(expected).max()
    between = float(np.abs(expected[0] - expected[1]).max() / largest)
    if not between > LEAST_BETWEEN:
        raise NumericsError(f"the logits of two images differ by {between:.1e}, so nothing can be told from them")
    traced = pipeline.traced(fused)
    taken = {technique: takes(technique, model, traced) for technique in registry.entries()}
    del model  # the largest take gigabytes, and what is written is in memory too
    found: dict[str, Any] = {
        "techniques": [technique for technique, takes_it in taken.items() if takes_it],
        "refused_by": [technique for technique, takes_it in taken.items() if not takes_it],
        "between_images": between,
    }
    for engine in EXPORTED:
        progress(f"export for {engine}", 0, 0)
        try:
            files = lower(traced, engine, folder)
            logits = engines.get(engine).open(folder / engine, batch=FEW, precision=settings.precision)(images.numpy())
            found[engine] = {
                "relative_error": float(np.abs(logits - expected).max() / largest),
                "file_bytes": sum(file.stat().st_size for file in files),
            }
        except MartletError as error:
            found[engine] = {"error": str(error)}
    return found


def noise(model: Model, settings: Settings) -> Tensor:
    """A few images (FEW, 3, H, W) that differ as a whole: the mean of noise alone is the same for all."""
    import torch
    from torch.nn.functional import interpolate

    generator, size = torch.Generator().manual_seed(settings.seed), model.preprocess.size
    coarse, fine = (torch.randn(FEW, 3, *its, generator=generator) for its in ((4, 4), size))
    return interpolate(coarse, size, mode="bilinear") + fine / 2


def lower(traced: Model, engine: str, folder: Path) -> list[Path]:
    """Writes the engine's files into a folder of its name, whole or not at all. Returns them.

    OpenVINO's are made of ONNX Runtime's, if that is there: writing ONNX takes longest.
    """
    place, partial = folder / engine, folder / f".{engine}"
    for old in (place, partial):
        shutil.rmtree(old, ignore_errors=True)
    partial.mkdir(parents=True)
    written = folder / "onnxruntime" / f"{WHOLE}.onnx"
    if engine == "openvino" and written.is_file():
        names = OpenVINO().convert(written, partial, traced.name)
    else:
        names = engines.get(engine).lower(traced, partial)
    partial.rename(place)
    return [place / name for name in names]


def latency(
    name: str, record: Mapping[str, Any], options: argparse.Namespace, settings: Settings, progress: Progress
) -> dict[str, Any]:
    """Milliseconds of a call on every engine at every batch size, those of one batch size in one interleaved run.

    Raises:
        MartletError: the model can't be loaded, or wasn't exported.
    """
    from martlet.engine.torch import TorchSession
    from martlet.measure import latency

    exported = record.get("export", {})
    files = [engine for engine in EXPORTED if "relative_error" in exported.get(engine, {})]
    progress("load", 0, 0)
    fused = load(name, settings)[1]  # the other goes: the largest take gigabytes
    if missing := [engine for engine in files if not (options.work / name / engine).is_dir()]:
        traced = pipeline.traced(fused)
        for engine in missing:
            progress(f"export for {engine}", 0, 0)
            lower(traced, engine, options.work / name)
    times: dict[str, Any] = {engine: {} for engine in (*files, "torch")}
    for batch in BATCHES:
        runs: dict[str, Callable[[], object]] = {}
        images = np.zeros((batch, 3, *fused.preprocess.size), dtype=np.float32)
        for engine in times:
            if engine == "torch":
                session = TorchSession(fused, batch, settings.precision, options.threads)
            else:
                session = engines.get(engine).open(
                    options.work / name / engine, batch=batch, precision=settings.precision, threads=options.threads
                )
            runs[engine] = lambda session=session, images=images: session(images)
        seconds = 60 * options.minutes / len(BATCHES)
        found = latency.interleave(
            runs,
            seed=settings.seed,
            min_seconds=seconds,
            max_seconds=2 * seconds,
            fewest=FEWEST,
            progress=progress,
        )
        for engine, ms in found.items():
            times[engine][str(batch)] = latency.summary(ms)
    return {"date": datetime.now(UTC).date().isoformat(), "threads": options.threads, "ms": times}


def line(part: str, found: Mapping[str, Any]) -> str:
    """What a part found, in one line."""
    if "error" in found:
        return f"{part} failed: {found['error']}"
    if part == "counts":
        return f"{found['params'] / 1e6:.2f} M parameters, {found['macs'] / 1e9:.3f} GMACs"
    if part == "export":
        return ", ".join(
            f"{engine} {'failed: ' + its['error'] if 'error' in its else format(its['relative_error'], '.1e')}"
            for engine, its in found.items()
            if engine in EXPORTED
        )
    return ", ".join(
        f"{engine} {' / '.join(format(ms['median'], '.2f') for ms in its.values())} ms"
        for engine, its in found["ms"].items()
    )


def family(name: str) -> str:
    """What its models have in common: the title of their paper, or the name of one that is our own."""
    from martlet import models

    paper = models.paper(name)
    return paper.title if paper else name


def _place(name: str, known: Sequence[str], records: Mapping[str, Any]) -> tuple[bool, float]:
    """Where it stands in the order: (False, size) of the smallest of its family, (True, size) of another."""
    size = _size(records.get(name))
    its = [other for other in known if other != name and family(other) == family(name)]
    return any((_size(records.get(other)), other) < (size, name) for other in its), size


def _size(record: Mapping[str, Any] | None) -> float:
    """MACs, by which models are ordered and left out; one that can't be counted comes last."""
    return (record or {}).get("counts", {}).get("macs", float("inf"))


def _options(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", metavar="NAME", help="some of the table, by timm's name")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS), help="of what is measured")
    parser.add_argument("--again", action="store_true", help="measure these parts anew where they are in --out already")
    parser.add_argument("--minutes", type=float, default=0.1, help="of timing, for each model (default: 0.1)")
    parser.add_argument("--max-gmacs", type=float, default=2.5, help="of models that are exported (default: 2.5)")
    parser.add_argument("--threads", type=int, default=cores(), help="of the engines (default: every core)")
    parser.add_argument("--work", type=Path, default=Path("runs/zoo"), help="folder for what engines run")
    parser.add_argument("--out", type=Path, default=peers.ROOT / "results/zoo.json", help="results/zoo.json")
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(main())
