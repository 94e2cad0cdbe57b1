"""Smaller networks without training: Martlet's techniques and Torch-Pruning's, on one model, images and count of MACs.

    python benchmarks/prune.py --small DIR                        # accuracy of every entry: two hours of a core
    python benchmarks/prune.py --models vit_tiny --entries ziplm magnitude --ratios 0.4
    python benchmarks/prune.py --entries "ziplm, distill" --ratios 0.2    # ten minutes of training; quiet machine
    python benchmarks/prune.py --parts accuracy claims            # and what papers claim beside one other way
    python benchmarks/prune.py --parts latency --timed magnitude  # OpenVINO, interleaved; needs a quiet machine
    python benchmarks/prune.py --parts table --table blocks.json  # what blocks take, for a `latency_table`
    python benchmarks/prune.py --parts slimming --table blocks.json       # whether ziplm with it meets target latencies

Writes one JSON file, entry after entry; started again with the same settings, it goes on where it stopped. All entries
of a model get the same calibration images and are tested on the same others. Torch-Pruning also gets the labels. Its
ratio of channels is searched until as many MACs are gone, counted as ours are: attention's products included. So is
comcat's, of attention's parameters. What ours leave is kept in --work as artifacts, which int8, training and timing
start from. int8 is tested on OpenVINO. Training is by the logits of the whole model, without labels. The model of
Tiny-ImageNet, which has no kept weights, is trained by small_models.py into DIR.
"""

from __future__ import annotations

import argparse
import functools
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict, astuple, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

import peers
from martlet import engine as engines
from martlet.cli.terminal import note, show, table, working
from martlet.core import pipeline, registry, report, store
from martlet.core.errors import MartletError, RecipeError, UsageError
from martlet.core.kept import digest
from martlet.core.recipe import Recipe
from martlet.core.technique import Context, Progress, Technique
from martlet.engine.base import cores
from martlet.measure import latency
from martlet.measure.size import params
from martlet.vit.budget import total_macs
from martlet.vit.latency_law import fit_law, read_law
from martlet.vit.structure import BlockShape, restore_structure_, shape_of
from martlet.vit.view import view
from setups.prune_ways import CLAIMS, ENTRIES, OURS, PER_MATRIX, THEIRS, per_matrix, torch_pruning
from setups.subjects import SUBJECTS

if TYPE_CHECKING:
    from martlet.core.model import Model
    from martlet.data.calibration import Calibration
    from martlet.data.images import Images

OTHERS = {"vit_tiny": ("tiny-imagenet-200/train.parquet", 650), "vit_tiny_200": (None, 10_000)}
"""By model, as `subjects` has them: images that training sees besides those that calibrate, none of which it has the
labels of. None: the rest of those that calibration draws from."""
RATIOS = (0.2, 0.4)
PARTS = ("accuracy", "claims", "latency", "table", "slimming")
ENGINE = "openvino"
BLOCKS = tuple(
    BlockShape(heads, qk, v, hidden)
    for heads, qk, v, hidden in (
        (3, 64, 64, 768),
        (3, 64, 64, 192),
        (3, 64, 16, 768),
        (3, 16, 64, 768),
        (3, 16, 16, 192),
        (2, 64, 64, 384),
        (2, 32, 32, 768),
        (1, 64, 64, 768),
        (1, 16, 16, 192),
        (1, 64, 16, 384),
    )
)
"""Sizes of a ViT-Ti's blocks and smaller ones."""
TIMED = ("ziplm", "afm", "comcat")
"""Entries of which speed is asked, unless others are named, each also followed by int8."""
DISTILL: dict[str, Any] = {"epochs": 1000.0, "batch": 50, "rate": 3e-5}
BATCH = 50


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What must be equal for two entries to stand in one file."""

    calibration_images: int = 650
    test_images: int = 1000
    seed: int = 0


def main(argv: Sequence[str] | None = None) -> int:
    """Runs what the command line asks for. Returns the exit status."""
    options = _options(argv)
    settings = Settings()
    try:
        document = peers.open_document(options.out, settings, "prune", "models", timed=False)
        for name in options.models:
            bench = Bench(name, options, settings)
            found = next((m for m in document["models"] if m["weights"] == bench.model.origin["weights"]), None)
            if found is None:
                document["models"].append(found := bench.described())
            for _ in measured(bench, found, options):
                peers.write(options.out, document)
            show(_table(found))
    except MartletError as error:
        note(str(error))
        return error.exit_status
    return 0


def measured(bench: Bench, found: dict[str, Any], options: argparse.Namespace) -> Iterator[None]:
    """Fills in what is asked for and isn't found yet, piece by piece. Times are measured again."""
    for ratio in options.ratios:
        for name in options.entries if "accuracy" in options.parts else ():
            if any((e["name"], e["prune_ratio"]) == (name, ratio) for e in found["entries"]):
                note(f"{name} at {ratio} is there already")
                continue
            with working(f"{bench.name}: {name} at {ratio}") as progress:
                entry = bench.entry(name, ratio, options.minutes, progress)
            found["entries"].append(entry | {"environment": environment()})
            yield
    for claim in CLAIMS if "claims" in options.parts else ():
        told = found.setdefault("claims", {"models": []})
        if any(e["claim"] == claim for e in told["models"]):
            note(f"{claim} is there already")
            continue
        with working(f"{bench.name}: {claim}") as progress:
            told["models"] += claimed(bench, claim, progress)
        told["environment"] = environment()
        yield
    if "table" in options.parts:  # which slimming takes
        with working(f"{bench.name}: table") as progress:
            peers.write(options.table, block_table(bench, options.seconds, progress))
    parts: dict[str, Callable[[Bench, argparse.Namespace, Progress], Any]] = {
        "latency": timed,
        "slimming": slimmed,
    }
    for part in (each for each in parts if each in options.parts):
        with working(f"{bench.name}: {part}") as progress:
            found[part] = {"environment": environment(), "models": parts[part](bench, options, progress)}
        yield


def environment() -> dict[str, Any]:
    """This machine and its versions, Torch-Pruning's too."""
    return report.environment((*peers.PACKAGES, "torch-pruning"))


class Bench:
    """A model, the images that calibrate, and those that test it, which are read when they are first asked for."""

    def __init__(self, name: str, options: argparse.Namespace, settings: Settings) -> None:
        from martlet.data import open_images

        self.name, self.subject, self.settings = name, SUBJECTS[name], settings
        self.model, self.data = self.subject.load(options), options.assets / "data"
        self.work = options.work / f"{name}-{digest([self.model.origin['weights']])[:8]}"
        self.pool, self.rest = open_images(self.data / self.subject.calibration), None
        if len(self.pool) > settings.calibration_images:
            self.pool, self.rest = self.pool.split(settings.calibration_images, settings.seed)
        self.macs = total_macs(self.model)

    @functools.cached_property
    def calibration(self) -> Calibration:
        from martlet.data.calibration import Calibration

        n, seed = self.settings.calibration_images, self.settings.seed
        return Calibration(self.pool, self.model.preprocess, n=n, batch_size=25, seed=seed)

    @functools.cached_property
    def test(self) -> Images:
        from martlet.data import open_images

        limit, seed = self.settings.test_images, self.settings.seed
        return peers.cropped(open_images(self.data / self.subject.test, limit=limit, seed=seed), self.model.preprocess)

    def described(self) -> dict[str, Any]:
        """What is said of the model before anything is cut."""
        return {
            "name": self.name,
            "model": self.model.name,
            "weights": self.model.origin["weights"],
            "images": {"calibration": self.subject.calibration, "test": self.subject.test},
            "n": len(self.test),
            "macs": self.macs,
            "parameters": params(self.model.module),
            "base_top1_pct": self.top1_pct(self.model),
            "entries": [],
        }

    def entry(self, name: str, prune_ratio: float, minutes: float, progress: Progress) -> dict[str, Any]:
        """Prunes and tests. What can't be is an entry that says why."""
        start = time.process_time()
        fixed, more = {"name": name, "prune_ratio": prune_ratio}, {}
        try:
            found = self.smaller(name, prune_ratio, progress)
            top1_pct = None
            if (then := OURS[name].then if name in OURS else "") == "int8":
                top1_pct = self.int8_top1_pct(found, progress)
            elif then == "distill":
                found, more = self.trained(found, minutes, progress)
        except (MartletError, RuntimeError, ValueError, ZeroDivisionError, IndexError) as error:
            return fixed | {"failed": peers._told(error)}
        return fixed | {
            "macs_removed_ratio": 1 - total_macs(found) / self.macs,
            "parameters": params(found.module),
            "top1_pct": self.top1_pct(found) if top1_pct is None else top1_pct,
            "cpu_seconds": round(time.process_time() - start, 1),
            **more,
        }

    def smaller(self, name: str, prune_ratio: float, progress: Progress) -> Model:
        """The model without such a share of its MACs."""
        if name in THEIRS:
            return self.least(
                lambda ratio: replace(
                    self.model, module=torch_pruning(self.model, THEIRS[name], ratio, self.gradients)
                ),
                prune_ratio,
            )
        if name == PER_MATRIX:
            return self.least(lambda ratio: per_matrix(self.model, ratio), prune_ratio)
        ours = OURS[name]
        its = replace(ours, then="")
        kept = self.work / f"{next(key for key, value in OURS.items() if value == its)} {prune_ratio}"
        if not (kept / store.MANIFEST).is_file():
            if ours.of == "attention":
                done = self.least(lambda ratio: self.run(ours.at(ratio), progress), prune_ratio)
            else:
                done = self.run(ours.at(ours.share(self.model, prune_ratio, self.macs)), progress)
            torch = engines.get("torch")
            kept.parent.mkdir(parents=True, exist_ok=True)
            with store.writing(kept, overwrite=True) as folder:
                store.seal(folder, done, "torch", store.write_model(folder, done, torch))
        return store.load(kept).model()

    def run(self, technique: Technique, progress: Progress) -> Model:
        return pipeline.run(self.model, Recipe((technique,)), self.context(progress))

    def context(self, progress: Progress) -> Context:
        return Context(images=self.calibration, seed=self.settings.seed, progress=progress)

    def least(self, at: Callable[[float], Model], prune_ratio: float) -> Model:
        """At the least ratio of its own, to 1 in 200, that removes so many MACs."""
        low, high, found = 0.0, 1.0, None
        while high - low > 1 / 200:
            middle = (low + high) / 2
            try:
                pruned = at(middle)
            except RecipeError:  # so much can't go
                high = middle
                continue
            if total_macs(pruned) > (1 - prune_ratio) * self.macs:
                low = middle
            else:
                high, found = middle, pruned
        if found is None:
            raise UsageError(f"no ratio removes {prune_ratio:.0%} of the MACs")
        return found

    def trained(self, model: Model, minutes: float, progress: Progress) -> tuple[Model, dict[str, Any]]:
        """The model after so long a training by the whole one's logits, and what there is to tell of it."""
        import torch

        from martlet.data import open_images
        from martlet.data.examples import Examples

        file, n = OTHERS[self.name]
        others = self.rest if file is None else open_images(self.data / file)
        assert others is not None
        sets = self.pool, others.sample(n, self.settings.seed)
        parts = [Examples.read(images, model.preprocess, model.num_classes, progress) for images in sets]
        examples = Examples(torch.cat([part.pixels for part in parts]), None, model.preprocess, "both")
        technique = registry.technique("distill").from_settings(DISTILL | {"minutes": minutes})
        context = Context(training=examples, teacher=self.model, seed=self.settings.seed, progress=progress)
        done = pipeline.run(model, Recipe((technique,)), context)
        steps = done.steps[-1].record["steps"]
        return done, {"training": {"minutes": minutes, "steps": steps, "images": len(examples), **DISTILL}}

    def gradients(self, score: str) -> dict[str, Any]:
        """Of the cross entropy with the labels, over all calibration images; computed once."""
        if not hasattr(self, "_found"):
            import torch

            from martlet.data.batches import batches

            twin = self.model.copy().module.eval().requires_grad_(True)
            crop = self.model.preprocess.override({"resize": None})
            labelled = peers.cropped(self.pool, self.model.preprocess)
            for images, labels, _ in batches(labelled, crop, 25):
                loss = torch.nn.functional.cross_entropy(twin(torch.from_numpy(images)), torch.tensor(labels))
                loss.backward()
            self._found = {n: p.grad for n, p in twin.named_parameters() if p.grad is not None}
        return self._found if score == "taylor" else {}

    def top1_pct(self, model: Model) -> float:
        import torch

        with torch.inference_mode():
            return self._top1_pct(lambda images: model.module(torch.from_numpy(images)).numpy())

    def int8_top1_pct(self, model: Model, progress: Progress) -> float:
        """Of the model in int8, on the engine."""
        engine = engines.get(ENGINE)
        done = pipeline.run(model, Recipe.load("int8"), self.for_engine(progress))
        with tempfile.TemporaryDirectory() as name:
            engine.lower(done, Path(name))
            return self._top1_pct(engine.open(Path(name), batch=BATCH, precision=done.precision, threads=cores()))

    def for_engine(self, progress: Progress) -> Context:
        engine = engines.get(ENGINE)
        return replace(self.context(progress), engine=ENGINE, int8=engine.int8, precisions=engine.alternatives())

    def _top1_pct(self, run: Callable[[np.ndarray], np.ndarray]) -> float:
        from martlet.data.batches import batches

        right, crop = 0, self.model.preprocess.override({"resize": None})
        for images, labels, _ in batches(self.test, crop, BATCH):
            right += int((run(images).argmax(1) == np.array(labels)).sum())
        return 100 * right / len(self.test)


def claimed(bench: Bench, claim: str, progress: Progress) -> list[dict[str, Any]]:
    """What each way of one of CLAIMS leaves. Zeros are those among all parameters."""
    found = []
    for name, model in CLAIMS[claim](bench.model, bench.context(progress)):
        zeros = sum(int((p == 0).sum()) for p in model.module.parameters())
        found.append(
            {
                "claim": claim,
                "name": name,
                "parameters": params(model.module),
                "zeros_ratio": zeros / params(model.module),
                "macs_removed_ratio": 1 - total_macs(model) / bench.macs,
                "top1_pct": bench.top1_pct(model),
            }
        )
    return found


def timed(bench: Bench, options: argparse.Namespace, progress: Progress) -> list[dict[str, Any]]:
    """The whole model and the pruned ones on OpenVINO, in float and in int8, interleaved, at batch 1.

    With one thread, and with all, each of which waits for the others at every product.
    """
    context, precision, seed = bench.for_engine(progress), floating(), bench.settings.seed
    probe = next(iter(bench.calibration))[:1].numpy()
    models, macs_removed = {}, {}
    for name, model in _timed_models(bench, options.timed, options.ratios, progress):
        rounded = pipeline.run(model, Recipe.load("int8"), context)
        for form, each, computed in (precision, model, precision), ("int8", rounded, rounded.precision):
            models[f"{name}, {form}"] = each, computed
            macs_removed[f"{name}, {form}"] = 1 - total_macs(model) / bench.macs
    found = []
    for threads in sorted({1, cores()}):
        with ExitStack() as stack:
            runs = {name: running(stack, model, computed, probe, threads) for name, (model, computed) in models.items()}
            times = latency.interleave(runs, seed=seed, min_seconds=options.seconds, progress=progress)
        found += [
            {
                "name": name,
                "threads": threads,
                "macs_removed_ratio": macs_removed[name],
                "latency_ms": latency.summary(ms),
                "speedup": latency.ratio(times[f"whole, {name.rpartition(', ')[2]}"], ms, seed),
            }
            for name, ms in times.items()
        ]
    return found


def floating() -> str:
    """What floating point is computed in where nothing else is said: bf16, if the machine has it fast."""
    return "bf16" if "bf16" in engines.get(ENGINE).alternatives() else "f32"


def running(
    stack: ExitStack, model: Model, precision: str, probe: np.ndarray, threads: int = 0
) -> Callable[[], object]:
    """What calls the model on the engine, with all threads if it isn't said; its files go with the stack."""
    engine, folder = engines.get(ENGINE), Path(stack.enter_context(tempfile.TemporaryDirectory()))
    engine.lower(model, folder)
    return functools.partial(engine.open(folder, precision=precision, threads=threads), probe)


def block_table(bench: Bench, seconds: float, progress: Progress) -> dict[str, Any]:
    """What a block of each of some sizes takes: the whole model, all of whose blocks have them, over its depth."""
    precision = floating()
    depth = len(view(bench.model.module).blocks)
    probe = next(iter(bench.calibration))[:1].numpy()
    runs = {}
    with ExitStack() as stack:
        for shape in BLOCKS:
            progress(f"prepare {shape}", 0, 0)
            model = bench.model.copy()
            blocks = [[i, *astuple(shape), True] for i in range(depth)]
            restore_structure_(model.module, {"blocks": blocks, "removed": [], "width": None})
            runs[shape] = running(stack, model, precision, probe)
        named = {str(shape): run for shape, run in runs.items()}
        times = latency.interleave(named, seed=bench.settings.seed, min_seconds=seconds, progress=progress)
    rows = [asdict(shape) | {"latency_ms": latency.summary(times[str(shape)])["median"] / depth} for shape in runs]
    fit_law(rows)  # raises, if they don't hold together
    cpu = report.environment(peers.PACKAGES)["cpu"]
    return {"engine": ENGINE, "cpu": cpu, "floating_point": precision, "model": bench.model.name, "blocks": rows}


def slimmed(bench: Bench, options: argparse.Namespace, progress: Progress) -> list[dict[str, Any]]:
    """Models that ziplm cut by a table of latencies: what each takes, interleaved with the whole, and what was asked.

    A table's times are of whole models over their depth, so a ratio of the time in blocks is one of the model's time.
    """
    precision = floating()
    vit = view(bench.model.module)
    law = read_law(str(options.table), "slimming", ENGINE)
    in_blocks = sum(law(shape_of(block)) for block in vit.blocks)
    models = {0.0: bench.model}
    for ratio in options.ratios:
        settings = {"prune_ratio": ratio, "latency_table": str(options.table)}
        technique = registry.technique("ziplm").from_settings(settings)
        models[ratio] = pipeline.run(bench.model, Recipe((technique,)), bench.for_engine(progress))
    probe = next(iter(bench.calibration))[:1].numpy()
    runs = {}
    with ExitStack() as stack:
        for ratio, model in models.items():
            runs[str(ratio)] = running(stack, model, precision, probe)
        times = latency.interleave(runs, seed=bench.settings.seed, min_seconds=options.seconds, progress=progress)
    found = []
    for ratio in options.ratios:
        shapes = [shape_of(block) for block in view(models[ratio].module).blocks]
        left = latency.ratio(times[str(ratio)], times["0.0"], bench.settings.seed)
        target = 1 - ratio
        found.append(
            {
                "prune_ratio": ratio,
                "floating_point": precision,
                "target_of_whole": target,
                "predicted_of_whole": sum(map(law, shapes)) / in_blocks,
                "measured_of_whole": left,
                "off_target_ratio": left["median"] / target - 1,
                "latency_ms": latency.summary(times[str(ratio)]),
                "macs_removed_ratio": 1 - total_macs(models[ratio]) / bench.macs,
                "top1_pct": bench.top1_pct(models[ratio]),
            }
        )
    return found


def _timed_models(
    bench: Bench, names: Sequence[str], ratios: Sequence[float], progress: Progress
) -> Iterator[tuple[str, Model]]:
    yield "whole", bench.model
    for name in names:
        for ratio in ratios:
            try:
                yield f"{name} {ratio}", bench.smaller(name, ratio, progress)
            except MartletError as error:
                note(f"{name} at {ratio}: {error}")


def _table(found: dict[str, Any]) -> Any:
    rows = [
        (
            entry["name"],
            f"{entry['prune_ratio']:.0%}",
            entry.get("failed") or f"{entry['macs_removed_ratio']:.1%}",
            f"{entry['top1_pct']:.1f}" if "top1_pct" in entry else "–",
        )
        for entry in sorted(found["entries"], key=lambda e: (e["prune_ratio"], -e.get("top1_pct", -1)))
    ]
    return table(("entry", "asked", "MACs removed", "top-1, %"), rows)


def _options(argv: Sequence[str] | None) -> argparse.Namespace:
    assets = Path(os.environ.get("MARTLET_ASSETS", peers.ROOT.parent / "shared"))
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--models", nargs="+", choices=OTHERS, default=list(OTHERS), metavar="NAME")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=["accuracy"])
    parser.add_argument("--entries", nargs="+", choices=ENTRIES, default=ENTRIES, metavar="NAME")
    parser.add_argument("--timed", nargs="+", choices=OURS, default=TIMED, metavar="NAME", help="of the part latency")
    parser.add_argument("--ratios", nargs="+", type=float, default=RATIOS)
    parser.add_argument("--small", type=Path, default=Path("runs/small"), help="folder that small_models.py wrote")
    parser.add_argument("--assets", type=Path, default=assets, help="folder with data/ and weights/ (MARTLET_ASSETS)")
    parser.add_argument("--out", type=Path, default=peers.ROOT / "results/prune.json", help="results/prune.json")
    parser.add_argument("--work", type=Path, default=Path("runs/prune"), help="where pruned models are kept")
    parser.add_argument("--minutes", type=float, default=10.0, help="of training")
    parser.add_argument("--table", type=Path, default=Path("blocks.json"), help="where to write what blocks take")
    parser.add_argument("--seconds", type=float, default=60.0, help="of timing")
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(main())
