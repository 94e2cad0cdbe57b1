"""The proof: the untouched model and the artifact on the same engine, images, cores and minutes, as one document."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np

from martlet.core import registry, report
from martlet.core.errors import EngineError
from martlet.core.model import Model
from martlet.core.recipe import Recipe
from martlet.core.technique import Progress
from martlet.measure.pictures import class_name, thumbnail

if TYPE_CHECKING:
    import torch
    from torch.fx import GraphModule

    from martlet.core.report import Coverage, Document, Example, Gate, Latency, Side, StepReport, Throughput
    from martlet.data.images import Images
    from martlet.data.preprocess import Preprocess
    from martlet.engine.base import Engine, Session
    from martlet.engine.staged import StagedSession
    from martlet.measure.accuracy import Logits

BATCH = 8
"""Images a call when logits are compared; latency is measured at batch 1."""
TIMED = 32
"""Images that are timed, where it depends on the image what it costs."""
DESCRIBED = 0.05
"""Share of a file by which it may be larger: more operations take more words to describe, and are no weights."""
EQUAL = 0.01
"""Of the largest logit: where nothing is rounded, another order of additions changes far less, and a kernel that
computes something else changes more."""
ROUNDING = 1e-9
"""Points. A drop of 5 in 500 images is 1 point, and a float may say a little more."""


@dataclass
class Clock:
    """Wall time by stage."""

    start: float = field(default_factory=time.perf_counter)
    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def __call__(self, stage: str) -> Iterator[None]:
        begin = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[stage] = round(time.perf_counter() - begin, 3)

    def total(self) -> dict[str, float]:
        return {**self.seconds, "total": round(time.perf_counter() - self.start, 3)}


@dataclass
class Duel:
    """The untouched model and the artifact on the same engine, images, cores and minutes.

    graphs: of both, by side, what `pipeline.traced` gives.
    """

    engine: Engine
    source: Model
    compressed: Model
    graphs: Mapping[str, Model]
    baseline_folder: Path
    artifact_folder: Path
    baseline_files: list[str]
    artifact_files: list[str]
    threads: int | None
    seed: int
    progress: Progress

    def open(self, which: str, batch: int) -> Session:
        folder = self.artifact_folder if which == "artifact" else self.baseline_folder
        precision = {"baseline": self.source.precision, "artifact": self.compressed.precision}.get(which, which)
        # Whoever has the model in hand has trusted its code.
        return self.engine.open(folder, batch=batch, precision=precision, threads=self.threads, trust_code=True)

    def measure(self, test: Images, clock: Clock) -> Document:
        from martlet.graph.bits import bit_map
        from martlet.measure import accuracy, fidelity, latency, layers, stages

        preprocess = {"baseline": self.source.preprocess, "artifact": self.compressed.preprocess}
        sizes = {which: its.size for which, its in preprocess.items()}
        with clock("accuracy"):
            pair = {which: self.open(which, BATCH) for which in self._each("compile")}
            result = accuracy.logits(pair, test, preprocess, self.progress)
            off = {which: self._logit_error(which, test, result) for which in self._each("run in PyTorch")}
        staged = pair["artifact"] if result.exits else None
        with clock("latency"):
            plain = [p for p in self.engine.alternatives() if p != self.source.precision]
            sessions = {which: self.open(which, 1) for which in self._each("compile", "baseline", "artifact", *plain)}
            probes = {
                which: np.random.default_rng(self.seed).standard_normal((1, 3, *size), dtype=np.float32)
                for which, size in sizes.items()
            }
            images = self._images_as_they_leave(test, result, preprocess) if staged else {}
            calls = {which: [image[None] for image in images[which]] if images else [probes[which]] for which in sizes}

            def run(which: str) -> None:
                for call in calls["artifact" if which == "artifact" else "baseline"]:
                    sessions[which](call)

            runs = {which: partial(run, which) for which in sessions}
            times = latency.interleave(runs, seed=self.seed, progress=self.progress)
            times = {which: ms / len(calls["artifact"]) for which, ms in times.items()}  # of an image
        with clock("throughput"):
            throughputs = {
                which: latency.throughput(
                    lambda batch, which=which: self.open(which, batch),
                    sizes[which],
                    self.progress,
                    images=images.get(which),
                )
                for which in ("baseline", "artifact")
            }
        with clock("coverage"):
            covered = {which: self._coverage(sessions[which], probes[which]) for which in self._each("read what ran")}
        with clock("layers"):
            both = self.graphs["baseline"], self.graphs["artifact"]
            errors = layers.layer_errors(*both, self._probe_images(test, preprocess["baseline"]), self.progress)
        with clock("memory"):
            sides = {
                which: self._side(
                    which, result, off[which], latency.summary(times[which]), throughputs[which], covered[which]
                )
                for which in self._each("measure memory")
            }
        simulated = self.engine.simulates(self.compressed)
        document: Document = {
            "martlet_report": report.VERSION,
            "created": datetime.now(UTC).isoformat(timespec="seconds"),
            "command": None,
            "model": _model(self.source),
            "recipe": {},
            "data": {},
            "engine": {
                "name": self.engine.name,
                "version": self.engine.version(),
                "threads": sessions["artifact"].threads,
                "batch": 1,
                "settings": {"baseline": self.source.precision, "artifact": self.compressed.precision},
            },
            "environment": report.environment(),
            "baseline": sides["baseline"],
            "artifact": sides["artifact"],
            "alternatives": [
                {
                    "name": f"{self.engine.name} {precision}, not quantized",
                    "latency_ms": latency.summary(times[precision]),
                    "speedup": latency.ratio(times["baseline"], times[precision], self.seed),
                }
                for precision in plain
            ],
            "speedup": None if simulated else latency.ratio(times["baseline"], times["artifact"], self.seed),
            "fidelity": fidelity.fidelity(result.values["baseline"], result.values["artifact"]),
            "layers": errors,
            "bits": bit_map(cast("GraphModule", self.graphs["artifact"].module), self.compressed.precision),
            "simulated": simulated,
            "examples": _disagreements(result, test, self.source),
            "gate": {"passed": True, "reasons": [], "judged": []},
            "seconds": {},
        }
        if staged is not None:
            session = cast("StagedSession", sessions["artifact"])
            names = self.source.class_names or test.class_names
            ms = stages.times(session, calls["artifact"][0], self.seed, self.progress)
            document["exits"] = stages.left(session, result, "artifact", ms, names, test)
            document["artifact"]["gmacs"] = document["exits"]["mean_gmacs"]
        return document

    def _images_as_they_leave(
        self, test: Images, result: Logits, preprocess: Mapping[str, Preprocess]
    ) -> dict[str, np.ndarray]:
        """Some test images (N, 3, H, W), as each side takes them; at each exit as large a share leaves as of all."""
        from martlet.measure import stages

        chosen = stages.spread(result.exits["artifact"], TIMED)
        picked = {its: stages.pick(test, its, chosen, self.seed) for its in {*preprocess.values()}}  # each decodes anew
        return {which: picked[its] for which, its in preprocess.items()}

    def _each(self, what: str, *names: str) -> Iterator[str]:
        """The names, or both sides, one after the other, saying how far it is."""
        names = names or ("baseline", "artifact")
        for i, name in enumerate(names):
            self.progress(what, i, len(names))
            yield name

    def _coverage(self, session: Session, probe: np.ndarray) -> Coverage:
        """What the engine says it ran; if its account doesn't add up, nothing, and why."""
        from martlet.measure import coverage

        try:
            return coverage.coverage(session.profile(probe), self.engine.profile_source)
        except EngineError as error:
            return coverage.coverage([], f"nothing, for {error}")

    def _side(
        self,
        which: str,
        result: Logits,
        logit_error: float,
        times: Latency,
        throughput: list[Throughput],
        coverage: Coverage,
    ) -> Side:
        from martlet.measure import accuracy, macs, memory, size

        artifact = which == "artifact"
        model = self.compressed if artifact else self.source
        folder = self.artifact_folder if artifact else self.baseline_folder
        logits, labels = result.values[which], result.labels
        return {
            "engine": self.engine.name,
            "precision": model.precision,
            "top1_pct": accuracy.topk_pct(logits, labels, 1),
            "top5_pct": accuracy.topk_pct(logits, labels, 5),
            "n_images": len(logits),
            "rounded": model.rounded,
            "logit_error": logit_error,
            "params": size.params(model.module),
            "weight_bytes": size.weight_bytes(model.module),
            "file_bytes": size.file_bytes(folder, self.artifact_files if artifact else self.baseline_files),
            "gmacs": macs.macs(self.graphs[which]) / 1e9,
            "latency_ms": times,
            "throughput": throughput,
            "peak_rss_bytes": memory.peak_rss_bytes(
                self.engine.name, folder, model.precision, self.threads, trust_code=True
            ),
            "coverage": coverage,
        }

    def _logit_error(self, which: str, test: Images, result: Logits) -> float:
        """How far the logits of the first few images are off those of PyTorch."""
        import torch

        from martlet.measure.fidelity import logit_error

        model = self.compressed if which == "artifact" else self.source
        images = self._probe_images(test, model.preprocess)
        with torch.inference_mode():
            logits = model.module(images).numpy()
        return logit_error(logits, result.values[which][: len(images)])

    def _probe_images(self, test: Images, preprocess: Preprocess) -> torch.Tensor:
        """The first few images of a test."""
        import torch

        from martlet.data.batches import batches

        images, _, _ = next(batches(test, preprocess, BATCH))
        return torch.from_numpy(images)


def gate(document: Document, max_drop: float | None = None) -> Gate:
    """Slower or larger than the untouched model, other logits than PyTorch's, or past `max_drop` is a failure, and this
    says why.

    Larger is a file by more than DESCRIBED. A simulated speed isn't judged, nor the size of a model that can stop
    early: exits, or further models of a cascade, are what its speed is bought with. Logits are judged in float32, where
    nothing is rounded.
    """
    baseline, artifact, reasons = document["baseline"], document["artifact"], []
    judged = [] if "exits" in document else ["size"]
    speedup = document["speedup"]
    if speedup is not None:
        judged.insert(0, "speed")
    if speedup is not None and speedup["high"] < 1:
        costly = [op for op in artifact["coverage"]["ops"] if op["precision"] != "i8"][:3]
        named = ", ".join(f"{op['name']} ({op['precision']}, {op['microseconds'] / 1000:.2f} ms)" for op in costly)
        reasons.append(
            f"slower than the untouched model: {speedup['median']:.2f}x its speed "
            f"({speedup['low']:.2f} to {speedup['high']:.2f}); costliest operations in float: {named or 'none'}"
        )
    if "size" in judged and artifact["file_bytes"] > (1 + DESCRIBED) * baseline["file_bytes"]:
        sizes = artifact["file_bytes"] / 1e6, baseline["file_bytes"] / 1e6
        reasons.append(f"larger than the untouched model: {sizes[0]:.2f} MB against {sizes[1]:.2f} MB")
    for side, name in ((baseline, "the untouched model"), (artifact, "the artifact")):
        if "logit_error" not in side or side["precision"] != "f32" or side.get("rounded", True):
            continue
        if "logits" not in judged:
            judged.append("logits")
        if not side["logit_error"] <= EQUAL:
            reasons.append(
                f"{side['engine']} gives other logits for {name} than PyTorch, {side['logit_error']:.1%} of the "
                "largest apart, so nothing measured of it counts"
            )
    if max_drop is not None:
        if baseline["top1_pct"] is not None and artifact["top1_pct"] is not None:
            drop, of = baseline["top1_pct"] - artifact["top1_pct"], "top-1"
        else:
            drop, of = 100 - document["fidelity"]["top1_agreement_pct"], "agreement"
        judged.append(of)
        if drop > max_drop + ROUNDING:
            reasons.append(f"{of} drops by {drop:.2f} points, more than the {max_drop:g} allowed")
    return {"passed": not reasons, "reasons": reasons, "judged": judged}


def describe_images(images: Images, n: int, seed: int | None) -> dict[str, Any]:
    return {
        "source": images.source,
        "n_images": n,
        "labelled": images.labelled,
        "skipped": images.skipped,
        "seed": seed,
    }


def _model(model: Model) -> dict[str, Any]:
    return {
        "name": model.name,
        "num_classes": model.num_classes,
        "image_size": list(model.preprocess.size),
        "weights": model.origin.get("weights"),
        "preprocess": model.preprocess.to_json(),
        "origin": model.origin,
    }


def describe_recipe(model: Model) -> dict[str, Any]:
    recipe = Recipe(tuple(step.technique for step in model.steps))
    steps: list[StepReport] = [
        {
            "name": step.technique.name,
            "family": registry.entries()[step.technique.name].family,
            "summary": step.technique.summary,
            "paper": step.technique.paper,
            "settings": step.technique.settings(),
            "record": {k: v for k, v in step.record.items() if k != "rounding"},
            "seconds": round(step.seconds, 3),
        }
        for step in model.steps
    ]
    return {"text": str(recipe), "yaml": recipe.to_yaml(), "digest": recipe.digest(), "steps": steps}


def _disagreements(result: Logits, test: Images, model: Model, most: int = 8) -> list[Example]:
    """Images on which the two differ in their first choice, the surest first choices of the baseline first."""
    baseline, artifact = (_softmax(result.values[which]) for which in ("baseline", "artifact"))
    first, second = baseline.argmax(1), artifact.argmax(1)
    differ = np.flatnonzero(first != second)
    chosen = set(differ[np.argsort(-baseline[differ, first[differ]])][:most].tolist())
    names = model.class_names or test.class_names
    found: list[Example] = []
    if chosen:
        for i, (record, picture) in enumerate(test.map(thumbnail)):
            if i in chosen:
                found.append(
                    {
                        "image": record.name,
                        "label": None if record.label is None else class_name(names, record.label),
                        "baseline": class_name(names, first[i]),
                        "baseline_pct": round(100 * float(baseline[i, first[i]]), 1),
                        "artifact": class_name(names, second[i]),
                        "artifact_pct": round(100 * float(artifact[i, second[i]]), 1),
                        "jpeg_base64": picture,
                    }
                )
            if len(found) == len(chosen):
                break
    return found


def _softmax(logits: np.ndarray) -> np.ndarray:
    shifted = np.exp(logits.astype(np.float64) - logits.max(1, keepdims=True))
    return shifted / shifted.sum(1, keepdims=True)
