"""Number formats, compared: accuracy, size and latency of each on every engine, over pretrained backbones.

    python benchmarks/formats.py                              # all of it
    python benchmarks/formats.py --parts latency --again      # the times anew, on a quiet machine

Writes one JSON file, entry after entry; started again, it goes on where it stopped. Accuracy is that of the engine's
file; where only weights are rounded, which engines read alike, it is measured on the first engine alone. Times are of
one interleaved run for each model; what an engine only simulates isn't timed. What fails is an entry that says why.
Files that engines run are kept in --work, to be timed later: clear it when Martlet has changed.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

import peers
import small_models
from martlet import engine as engines
from martlet.cli.terminal import note, working
from martlet.core import pipeline
from martlet.core.errors import MartletError
from martlet.core.recipe import Recipe
from martlet.core.technique import Context, Progress
from martlet.data import open_images
from martlet.data.calibration import Calibration
from martlet.engine.base import Op, cores
from setups import cifar

if TYPE_CHECKING:
    from martlet.core.model import Model
    from martlet.data.images import Images

MODELS = ("vit_tiny_patch16_224", "efficientnet_lite0", "swin", "hybrid")
"""Whose weights are at hand."""
ENGINES = ("openvino", "onnxruntime")
PARTS = ("accuracy", "latency")
FLOATING = "bf16: {required: false}"
FORMATS = {
    "FP32": "[fuse]",
    "BF16": "[fuse, bf16]",
    "FP8 (W8A8)": f"[fuse, fp8, {FLOATING}]",
    "INT8 (W8A8)": f"[fuse, int8, {FLOATING}]",
    "W4A8": f"[fuse, qserve: {{weight_bits: 4}}, {FLOATING}]",
    "INT8 weights": f"[fuse, weight_only: {{format: int8}}, {FLOATING}]",
    "FP8 weights": f"[fuse, weight_only: {{format: fp8_e4m3}}, {FLOATING}]",
    "INT4 weights (W4A16)": f"[fuse, weight_only: {{format: int4}}, {FLOATING}]",
    "INT4 weights of Linears (GPTQ)": f"[fuse, gptq, {FLOATING}]",
    "NF4 weights": f"[fuse, weight_only: {{format: nf4}}, {FLOATING}]",
    "power-of-two weights": f"[fuse, weight_only: {{format: power_of_two}}, {FLOATING}]",
}
"""Each with the passes of its recipe."""
FEW = ("i8", "u8", "i4", "u4", "nf4")
"""Types of weights that OpenVINO's kernels unpack as they multiply."""


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What must be equal for two entries to stand in one file."""

    calibration_images: int = 64
    test_images: int = 1000
    batch: int = 10
    seed: int = 0


@dataclass(frozen=True, kw_only=True)
class Subject:
    """A model with real weights, its calibration images, and others to test on."""

    load: Callable[[argparse.Namespace], Model]
    images: Callable[[Path, int], tuple[Images, list[Images]]]
    data: str


def _imagenet(data: Path, seed: int) -> tuple[Images, list[Images]]:
    sample, validation = (open_images(data / name / "test.parquet") for name in (peers.SAMPLE, peers.VALIDATION))
    calibration, rest = validation.split(peers.HELD_OUT, seed)
    return calibration, [sample, rest]


def _timm(name: str) -> Callable[[argparse.Namespace], Model]:
    def load(options: argparse.Namespace) -> Model:
        from martlet.source import load_model

        [subject] = [subject for subject in peers.SUBJECTS if subject.name == name]
        assert subject.weights
        weights = options.assets / "weights" / subject.weights
        return load_model(f"timm:{name}", weights=weights, preprocess=subject.preprocess)

    return load


def _small(name: str) -> Subject:
    folder = small_models.SMALL[name].data

    def images(data: Path, seed: int) -> tuple[Images, list[Images]]:
        train, test = (open_images(data / folder / f"{part}.parquet") for part in ("train", "test"))
        return train, [test]

    title = small_models.TITLES[folder]
    return Subject(load=lambda options: small_models.load(name, options.small), images=images, data=title)


SUBJECTS = {
    **{
        name: Subject(load=_timm(name), images=_imagenet, data="ImageNet-1k")
        for name in ("vit_tiny_patch16_224", "efficientnet_lite0")
    },
    **{name: _small(name) for name in small_models.SMALL},
}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs what the command line asks for. Returns the exit status."""
    options = _options(argv)
    settings = Settings()
    try:
        document = peers.open_document(options.out, settings, "formats", "entries")
        for name in options.models:
            with working(name) as progress:
                bench = Bench(name, options, settings, progress)
                for part in options.parts:
                    measure = bench.accuracies if part == "accuracy" else bench.latencies
                    known = {(e["format"], e["engine"]): e for e in document["entries"] if e["model"] == name}
                    for entry in measure({} if options.again else known, known):
                        keep(document["entries"], entry)
                        peers.write(options.out, document)
                        note(line(entry))
    except MartletError as error:
        note(str(error))
        return error.exit_status
    return 0


Key = tuple[str, str]
"""(format, engine)."""
Entries = Mapping[Key, Mapping[str, Any]]


def keep(entries: list[dict[str, Any]], entry: dict[str, Any]) -> None:
    """Adds an entry, or puts it in the place of the one with its model, format and engine."""
    names = ("model", "format", "engine")
    for i, other in enumerate(entries):
        if all(other[name] == entry[name] for name in names):
            entries[i] = entry
            return
    entries.append(entry)


def line(entry: Mapping[str, Any]) -> str:
    """What an entry found, in one line."""
    where = f"{entry['model']}, {entry['format']} on {entry['engine']}"
    if "error" in entry:
        return f"{where} failed: {entry['error']}"
    top1 = f"{entry['top1_pct']:.1f} %" if "top1_pct" in entry else f"as on {entry['accuracy_of']}"
    timed = f", {entry['latency_ms']['median']:.2f} ms" if "latency_ms" in entry else ""
    return f"{where}: {top1}, {entry['file_bytes'] / 1e6:.1f} MB{timed}"


def timed(entry: Mapping[str, Any]) -> bool:
    """Whether a time says something: the file is there, and its engine has kernels for it."""
    return "error" not in entry and "file_bytes" in entry and not entry["simulated"]


def compressed_pct(ops: Sequence[Op]) -> float:
    """Per cent of the MACs with a weight that a kernel read in 8 bits or fewer, by the engine's own account."""
    weighted = [op for op in ops if op.macs and not op.attention]
    few = [op for op in weighted if op.precision == "i8" or op.weights in FEW or op.kind == "MatMulNBits"]
    return 100 * sum(op.macs for op in few) / sum(op.macs for op in weighted)


class Bench:
    """One model: it is compressed, lowered and measured, each only where it wasn't before."""

    def __init__(self, name: str, options: argparse.Namespace, settings: Settings, progress: Progress) -> None:
        self.name, self.options, self.settings, self.progress = name, options, settings, progress
        self.subject = SUBJECTS[name]
        self.model = self.subject.load(options)
        pool, self.tests = self.subject.images(options.assets / "data", settings.seed)
        self.calibration = Calibration(
            pool, self.model.preprocess, n=settings.calibration_images, batch_size=16, seed=settings.seed
        )
        self.keys = [(form, engine) for form in options.formats for engine in options.engines]

    def accuracies(self, done: Entries, known: Entries) -> Iterator[dict[str, Any]]:
        """Entries with top-1 and agreement with FP32 that aren't done, each as known before but for these."""
        todo = [key for key in self.keys if not {"top1_pct", "accuracy_of", "error"} & set(done.get(key, {}))]
        if not todo:
            return
        samples = self._samples()
        labels = [label for _, label in samples]
        reference = self._reference(samples)
        found = {key: dict(entry) for key, entry in known.items()}
        for key in todo:
            form, engine = key
            try:
                entry = self._prepare(form, engine)
                others = [
                    other for f, other in found if f == form and "top1_pct" in found[f, other] and other != engine
                ]
                if others and not entry["activations_rounded"]:
                    entry["accuracy_of"] = others[0]
                else:
                    logits = self._run(self._open(form, engine, entry, self.settings.batch), samples, f"test {form}")
                    entry |= {
                        "n": len(labels),
                        "top1_pct": 100 * float((logits.argmax(1) == np.array(labels)).mean()),
                        "agreement_pct": 100 * float((logits.argmax(1) == reference.argmax(1)).mean()),
                    }
            except MartletError as error:
                entry = self._entry(form, engine) | {"error": str(error)}
            found[key] = found.get(key, {}) | entry
            yield found[key]

    def latencies(self, done: Entries, known: Entries) -> Iterator[dict[str, Any]]:
        """Entries with the time of each format that its engine has kernels for, all timed side by side."""
        from martlet.measure import latency

        keys = [key for key in self.keys if timed(known.get(key, {}))]
        if all("latency_ms" in done.get(key, {}) for key in keys):
            return
        image = next(iter(self.calibration))[:1].numpy()
        runs: dict[str, Callable[[], object]] = {}
        shares: dict[str, float | None] = {}
        for key in keys:
            name = " on ".join(key)
            self.progress(f"open {name}", 0, 0)
            session = self._open(*key, known[key], 1)
            shares[name] = compressed_pct(session.profile(image, repeats=1))
            runs[name] = lambda session=session: session(image)
        times = latency.interleave(
            runs,
            seed=self.settings.seed,
            min_seconds=60 * self.options.minutes,
            max_seconds=120 * self.options.minutes,
            progress=self.progress,
        )
        for key in keys:
            name, baseline = " on ".join(key), times.get(f"FP32 on {key[1]}")
            yield {
                **known[key],
                "threads": self.options.threads,
                "latency_ms": latency.summary(times[name]),
                "speedup_over_fp32": None if baseline is None else latency.ratio(baseline, times[name]),
                "compressed_macs_pct": shares[name],
            }

    def _samples(self) -> list[tuple[Any, int | None]]:
        """(crop, label) of as many test images as are wanted, of each set in proportion to what it has."""
        wanted, left = self.settings.test_images, sum(len(images) for images in self.tests)
        chosen: list[tuple[Any, int | None]] = []
        for images in self.tests:
            self.progress("read images", len(chosen), wanted)
            part = images.sample(round((wanted - len(chosen)) * len(images) / left), self.settings.seed)
            left -= len(images)
            chosen += [(crop, record.label) for record, crop in part.map(self.model.preprocess.crop)]
        return chosen

    def _reference(self, samples: list[tuple[Any, int | None]]) -> np.ndarray:
        """Logits of the untouched model in float32: OpenVINO's, which are torch's."""
        key = ("FP32", "openvino")
        return self._run(self._open(*key, self._prepare(*key), self.settings.batch), samples, "test FP32")

    def _run(self, session: Any, samples: list[tuple[Any, int | None]], what: str) -> np.ndarray:
        from martlet.measure import accuracy

        def progress(what: str, done: int, total: int, test: str = what) -> None:
            self.progress(test, done, total)

        preprocess = self.model.preprocess.override({"resize": None})
        return accuracy.logits({"logits": session}, open_images(samples), preprocess, progress).values["logits"]

    def _prepare(self, form: str, engine_name: str) -> dict[str, Any]:
        """Compresses and lowers, unless that was done. Returns the entry as far as it is known then.

        Raises:
            MartletError: the engine can't take the format.
        """
        from torch.fx import GraphModule

        from martlet.graph.bits import bit_map

        folder, engine = self._folder(form, engine_name), engines.get(engine_name)
        if (folder / "entry.json").is_file():
            return json.loads((folder / "entry.json").read_text(encoding="utf-8"))
        self.progress(f"prepare {form} for {engine_name}", 0, 0)
        folder.mkdir(parents=True, exist_ok=True)
        start = time.perf_counter()
        recipe = Recipe.from_yaml(f"martlet: 1\npasses: {FORMATS[form]}")
        context = Context(
            images=self.calibration,
            seed=self.settings.seed,
            int8=engine.int8,
            precisions=engine.alternatives(),
            progress=self.progress,
        )
        for technique in recipe.passes:
            technique.check_engine(context)
        done = pipeline.run(self.model.copy(), recipe, context)
        files = engine.lower(done, folder)
        graph = done.module if isinstance(done.module, GraphModule) else None
        entry = self._entry(form, engine_name) | {
            "recipe": FORMATS[form],
            "floating_point": done.precision,
            "simulated": engine.simulates(done),
            "activations_rounded": "float_activations" not in done.facts,
            "file_bytes": sum((folder / file).stat().st_size for file in files),
            "bits": bit_map(graph, done.precision) if graph else {"everything": done.precision},
            "seconds": round(time.perf_counter() - start, 1),
        }
        peers.write(folder / "entry.json", entry)
        return entry

    def _entry(self, form: str, engine: str) -> dict[str, Any]:
        return {
            "model": self.name,
            "weights": self.model.origin["weights"],
            "data": self.subject.data,
            "format": form,
            "engine": engine,
        }

    def _open(self, form: str, engine: str, entry: Mapping[str, Any], batch: int) -> Any:
        if not (self._folder(form, engine) / "entry.json").is_file():
            self._prepare(form, engine)
        return engines.get(engine).open(
            self._folder(form, engine), batch=batch, precision=entry["floating_point"], threads=self.options.threads
        )

    def _folder(self, form: str, engine: str) -> Path:
        words = "".join(c if c.isalnum() else "-" for c in form).strip("-").lower()
        return self.options.work / self.name / f"{words}-{engine}"


def _options(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=SUBJECTS, default=list(MODELS), metavar="NAME")
    parser.add_argument("--formats", nargs="+", choices=FORMATS, default=list(FORMATS), metavar="FORMAT")
    parser.add_argument("--engines", nargs="+", choices=ENGINES, default=list(ENGINES))
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS), help="of what is measured")
    parser.add_argument("--again", action="store_true", help="measure these parts anew where they are in --out already")
    parser.add_argument("--minutes", type=float, default=1.0, help="of timing, for each model (default: 1)")
    parser.add_argument("--threads", type=int, default=cores(), help="of the engines (default: every core)")
    parser.add_argument("--small", type=Path, default=Path("runs/small"), help="folder that small_models.py wrote")
    parser.add_argument("--assets", type=Path, default=cifar.ASSETS, help="folder with data/ and weights/")
    parser.add_argument("--work", type=Path, default=Path("runs/formats"), help="folder for what engines run")
    parser.add_argument("--out", type=Path, default=peers.ROOT / "results/formats.json", help="results/formats.json")
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(main())
