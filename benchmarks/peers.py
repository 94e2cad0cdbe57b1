"""The same model, images and cores through PyTorch, OpenVINO, NNCF, ONNX Runtime and Martlet, interleaved.

    python benchmarks/peers.py                          # the whole grid: about an hour on two cores
    python benchmarks/peers.py --models efficientvit_m5 --minutes 2
    python benchmarks/peers.py --quick                  # one small round, to see that everything runs
    python benchmarks/peers.py --resources              # what one compression takes, in a process of its own

Writes one JSON file, model after model; started again with the same settings, it goes on where it stopped. A contender
that fails is an entry that says why. Accuracy is that of real weights on the real images of --assets, less those that
calibrate; models with random weights are timed only.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from martlet.cli.terminal import facts, note, one_line, show, table, working
from martlet.core import report
from martlet.core.errors import ArtifactError, EngineError, MartletError, NumericsError, UsageError, nearest
from martlet.core.technique import Progress
from martlet.engine.base import Session, cores, first_line
from setups.contenders import BATCH, CONTENDERS, NNCF, OPENVINO_FP32, OTHER_NNCF, Case, Contender, Peer, Ready, eager

if TYPE_CHECKING:
    from _typeshed import DataclassInstance
    from rich.table import Table

    from martlet.data.images import Images
    from martlet.data.preprocess import Preprocess
    from martlet.measure.accuracy import Logits

VERSION = 1
ROOT = Path(__file__).resolve().parents[1]
SAMPLE, VALIDATION = "imagenet1k-sample", "imagenet1k-val-227px"
HELD_OUT = 64
"""Images of VALIDATION that are for calibration, and never tested on."""
PACKAGES = ("torch", "timm", "onnx", "openvino", "nncf", "onnxruntime", "numpy")
ENGINES = tuple(dict.fromkeys(contender.engine for contender in CONTENDERS))
SPIN = "GOMP_SPINCOUNT"
"""PyTorch's threads spin between its operations, but with few turns not on into the next contender's time."""

RESOURCES_MODEL = "timm:deit_small_patch16_224"
MAX_SECONDS, MAX_RSS_BYTES = 180, 4_000_000_000
GATE_FAILED = 3


@dataclass(frozen=True, kw_only=True)
class Subject:
    """A timm model.

    weights: a file of the assets; None is seeded random weights, for latency alone.
    preprocess: what those weights want otherwise than timm's configuration says.
    """

    name: str
    weights: str | None = None
    num_classes: int | None = None
    preprocess: Mapping[str, Any] = field(default_factory=dict)


SUBJECTS = (
    Subject(name="vit_tiny_patch16_224", weights="vit_tiny_patch16_224.in1k.safetensors"),
    Subject(
        name="efficientnet_lite0",
        weights="efficientnet_lite0.in1k.safetensors",
        preprocess={"mean": (127 / 255,) * 3, "std": (128 / 255,) * 3},
    ),
    Subject(name="deit_small_patch16_224"),
    Subject(name="swin_tiny_patch4_window7_224"),
    Subject(name="tiny_vit_5m_224", num_classes=1000),
    Subject(name="efficientvit_m5"),
    Subject(name="efficientvit_b1"),
    Subject(name="mobilevitv2_100"),
    Subject(name="efficientformer_l1"),
    Subject(name="fastvit_t8"),
    Subject(name="repvit_m1"),
    Subject(name="shvit_s4"),
)


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What must be equal for two models to stand in one file.

    minutes: timing of one model, all contenders together. calibration_images_random: of models with random weights.
    test_images: at most, of each set; None is all. gomp_spincount: see SPIN.
    """

    threads: int
    minutes: float
    calibration_images: int = HELD_OUT
    calibration_images_random: int = 16
    test_images: int | None = None
    seed: int = 0
    batch: int = BATCH
    gomp_spincount: str = "10000"
    openvino_performance_hint: str = "LATENCY"


def main(argv: Sequence[str] | None = None) -> int:
    """Runs what the command line asks for. Returns the exit status."""
    options = _options(argv)
    settings = Settings(threads=cores(), minutes=options.minutes)
    if options.quick:
        settings = replace(settings, calibration_images=8, calibration_images_random=8, test_images=16)
    os.environ[SPIN] = settings.gomp_spincount  # read when torch is loaded
    try:
        subjects = [_subject(name) for name in options.models]
        document = open_document(options.out, settings)
        if options.resources:
            if options.again or "resources" not in document:
                document["resources"] = resources(options.assets, settings)
                write(options.out, document)
            show(facts(_resource_rows(document["resources"])))
            return 0
        for subject in subjects:
            if not options.again and subject.name in finished(document):
                note(f"{subject.name} is in {options.out} already; --again measures it anew")
                continue
            with working(subject.name) as progress:
                record = run(subject, options.assets, options.engines, settings, progress)
            document["models"] = [m for m in document["models"] if m["name"] != subject.name] + [record]
            write(options.out, document)
            note("; ".join([f"{subject.name} took {record['seconds']:.0f} s", *_failures(record)]))
            gc.collect()
    except MartletError as error:
        note(str(error))
        return error.exit_status
    for model in document["models"]:
        show(_headline(model, document["settings"]), *_tables(model), *_failures(model))
    return 0


def run(
    subject: Subject, assets: Path, engines: Sequence[str], settings: Settings, progress: Progress
) -> dict[str, Any]:
    """Loads one model and the images, and measures the contenders of these engines on it. Returns its record.

    Raises:
        MartletError: the model or the images can't be loaded.
    """
    import torch

    from martlet.data import open_images
    from martlet.data.calibration import Calibration
    from martlet.source import load_model

    start = time.perf_counter()
    torch.set_num_threads(settings.threads)
    model = load_model(
        f"timm:{subject.name}",
        weights=assets / "weights" / subject.weights if subject.weights else None,
        num_classes=subject.num_classes,
        preprocess=subject.preprocess,
        seed=settings.seed,
    )
    n = settings.calibration_images if subject.weights else settings.calibration_images_random
    pool, rest = open_images(_images(assets, VALIDATION)).split(HELD_OUT, settings.seed)
    calibration = Calibration(pool, model.preprocess, n=n, seed=settings.seed)
    tests = {}
    if subject.weights:
        for name, images in ((SAMPLE, open_images(_images(assets, SAMPLE))), (VALIDATION, rest)):
            part = images if settings.test_images is None else images.sample(settings.test_images, settings.seed)
            tests[name] = cropped(part, model.preprocess)
    case = Case(
        model=model,
        calibration=calibration,
        probe=next(iter(calibration))[:1].numpy(),
        threads=settings.threads,
        seed=settings.seed,
        progress=progress,
    )
    contenders = [contender for contender in CONTENDERS if contender.engine in engines]
    measured = measure(case, tests, contenders, settings.minutes)
    return {
        "name": subject.name,
        "weights": subject.weights or model.origin["weights"],
        "image_size": list(model.preprocess.size),
        **({"preprocess": dict(subject.preprocess)} if subject.preprocess else {}),
        "calibration": {"images": VALIDATION, "n": calibration.num_images, "seed": settings.seed},
        "seconds": round(time.perf_counter() - start, 1),
        **measured,
    }


def measure(case: Case, tests: Mapping[str, Images], contenders: Iterable[Contender], minutes: float) -> dict[str, Any]:
    """Prepares, times and tests contenders on one model. Returns `nncf`, the entry that is NNCF's, and `entries`.

    tests: labeled images by the name of their set, as `cropped` gives them. minutes: of timing, all together.
    """
    from martlet.measure import latency

    entries: dict[str, dict[str, Any]] = {}
    opened: dict[str, tuple[Ready, Session]] = {}
    with ExitStack() as stack:
        for contender in contenders:
            case.progress(f"prepare {contender.name}", 0, 0)
            entry: dict[str, Any] = {
                "name": contender.name,
                "engine": contender.engine,
                "precision": contender.precision,
            }
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
            start = time.perf_counter()
            try:
                ready = contender.prepare(case, folder)
                if ready is None:
                    continue
                session = ready.open(ready.precision)
                entry |= _describe(ready, session, case.probe)
                entry["prepare_seconds"] = round(time.perf_counter() - start, 1)
                opened[contender.name] = ready, session
            except Exception as error:  # noqa: BLE001 - whatever a contender raises is its result
                entry["error"] = _told(error)
            entries[contender.name] = entry
        runs = {name: (lambda session=session: session(case.probe)) for name, (_, session) in opened.items()}
        times = latency.interleave(
            runs, seed=case.seed, min_seconds=60 * minutes, max_seconds=120 * minutes, progress=case.progress
        )
        nncf = faster_nncf(times)
        for name, ms in times.items():
            entries[name]["latency_ms"] = latency.summary(ms)
            for key, baseline in (("speedup_over_nncf", nncf), ("speedup_over_fp32", OPENVINO_FP32)):
                entries[name][key] = latency.ratio(times[baseline], ms, case.seed) if baseline in times else None
        for set_name, images in tests.items():
            reference = _logits(eager(case).open("f32"), images, case).values["logits"]
            for name, (ready, session) in opened.items():
                for precision in (ready.precision, *ready.also):
                    case.progress(f"test {name}", 0, 0)
                    found: dict[str, Any] = {"images": set_name, "floating_point": precision}
                    try:
                        chosen = session if precision == ready.precision else ready.open(precision)
                        found |= _accuracy(chosen, images, case, reference)
                    except Exception as error:  # noqa: BLE001 - as above
                        found["error"] = _told(error)
                    entries[name].setdefault("accuracy", []).append(found)
    return {"nncf": nncf, "entries": list(entries.values())}


def faster_nncf(times: Mapping[str, np.ndarray]) -> str | None:
    """Which of NNCF's two presets is the one to beat: that with the smaller median; None if neither runs."""
    return min((name for name in (NNCF, OTHER_NNCF) if name in times), key=lambda n: np.median(times[n]), default=None)


def cropped(images: Images, preprocess: Preprocess) -> Images:
    """The same images, resized and cropped once for all contenders, and held in memory as uint8."""
    from martlet.data import open_images

    return open_images([(crop, record.label) for record, crop in images.map(preprocess.crop)])


def resources(assets: Path, settings: Settings) -> dict[str, Any]:
    """The whole command `martlet compress`, measuring included, on a DeiT-S with random weights.

    Returns `command`, `wall_seconds`, `stage_seconds` as the report has them, `peak_rss_bytes`, and the limits. Call it
    in a process that is still small: a child's peak is at least the memory of the parent that started it.

    Raises:
        EngineError: the command failed; says its last line.
    """
    import resource

    images = ["--images", SAMPLE, "--calib", VALIDATION, "--num-calib", str(settings.calibration_images)]
    if settings.test_images is not None:
        images += ["--limit", str(settings.test_images)]
    arguments = ["compress", RESOURCES_MODEL, "--recipe", "int8", "--engine", "openvino", *images]
    paths = {name: str(_images(assets, name)) for name in (SAMPLE, VALIDATION)}
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "artifact"
        program = [sys.executable, "-c", "import sys; from martlet.cli import main; sys.exit(main())"]
        start = time.perf_counter()
        process = subprocess.run(
            [*program, *(paths.get(a, a) for a in arguments), "--out", str(out)],
            capture_output=True,
            text=True,
            check=False,
        )
        seconds = time.perf_counter() - start
        if process.returncode not in (0, GATE_FAILED):
            last = next(iter(reversed(process.stderr.strip().splitlines())), f"exit status {process.returncode}")
            raise EngineError(f"the compression failed while its memory was measured: {one_line(last)}")
        stages = report.read(out / "report.json")["seconds"]
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
    return {
        "command": " ".join(["martlet", *arguments]),
        "wall_seconds": round(seconds, 1),
        "max_seconds": MAX_SECONDS,
        "stage_seconds": stages,
        "peak_rss_bytes": peak if sys.platform == "darwin" else peak * 1024,  # Linux counts in KiB
        "max_rss_bytes": MAX_RSS_BYTES,
    }


def open_document(
    path: Path, settings: DataclassInstance, benchmark: str = "peers", results: str = "models", *, timed: bool = True
) -> dict[str, Any]:
    """The results so far, or a document whose list of `results` is empty.

    timed: the results are times, which can't be compared across machines, so one environment is the document's. Others
    may come from several: each has its own `environment`.

    Raises:
        ArtifactError: the file holds something else.
        UsageError: it was measured with other settings or, if timed, on another machine or with other versions.
    """
    fresh = {
        "martlet_results": VERSION,
        "benchmark": benchmark,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        **({"environment": report.environment(PACKAGES)} if timed else {}),
        "settings": asdict(settings),
        results: [],
    }
    if not path.exists():
        return fresh
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ArtifactError(f"{path} can't be read: {first_line(error)}") from None
    if not isinstance(document, dict) or any(document.get(k) != fresh[k] for k in ("martlet_results", "benchmark")):
        raise ArtifactError(f"{path} holds no results of this benchmark; give another --out")
    for part in ("settings", "environment"):
        if part in fresh and (differs := difference(document.get(part, {}), fresh[part])):
            raise UsageError(f"{path} was measured with {differs}; give another --out")
    if timed:
        document["environment"]["versions"] = fresh["environment"]["versions"] | document["environment"]["versions"]
    return document


def difference(before: Mapping[str, Any], now: Mapping[str, Any]) -> str | None:
    """The first entry in which settings or environments differ, in words; None if none does.

    Packages whose version only one of them tells don't count: what is installed there alone took no part.
    """
    for key, value in now.items():
        was = before.get(key)
        if key == "versions" and was is not None:
            other = [name for name in value if name in was and was[name] != value[name]]
            was, value = ({name: its[name] for name in other} for its in (was, value))
        if was != value:
            return f"{key} {was}, and this is {value}"
    return None


def commit() -> str | None:
    """The code that is measured: its commit, with `-dirty` where files differ from it; None outside a checkout."""
    described = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--exclude=*"]
    try:
        return subprocess.run(described, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def finished(document: Mapping[str, Any]) -> set[str]:
    """Models that need no second run."""
    return {model["name"] for model in document["models"]}


def write(path: Path, document: Mapping[str, Any]) -> None:
    """Writes beside, then renames: a killed run leaves the results before it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(json.dumps(document, indent=1, ensure_ascii=False, allow_nan=False) + "\n", encoding="utf-8")
    partial.replace(path)


def keep(path: Path, document: dict[str, Any], packages: Sequence[str]) -> None:
    """Writes a document with when that was and on what."""
    document["created"] = datetime.now(UTC).isoformat(timespec="seconds")
    document["environment"] = report.environment(packages)
    write(path, document)


def _describe(ready: Ready, session: Session, probe: np.ndarray) -> dict[str, Any]:
    """What an entry says before it is timed.

    Raises:
        NumericsError: the session gives NaN or infinity.
    """
    if not np.isfinite(session(probe)).all():
        raise NumericsError("gives NaN or infinity")
    return {
        "floating_point": ready.precision,
        "threads": session.threads,
        "settings": ready.settings,
        "bits": ready.bits,
        "coverage": _coverage(session, probe),
        "file_bytes": sum(file.stat().st_size for file in ready.files) or None,
    }


def _coverage(session: Session, probe: np.ndarray) -> dict[str, Any] | None:
    """Per cent of the MACs that the engine ran in each precision; None of a peer that can't be asked."""
    from martlet.measure.coverage import coverage

    if isinstance(session, Peer):
        return None
    try:
        found = coverage(session.profile(probe, repeats=1), "")
    except EngineError as error:
        return {"error": _told(error)}
    return {key: found[key] for key in ("macs_pct", "attention_macs_pct")}


def _logits(session: Session, images: Images, case: Case) -> Logits:
    from martlet.measure import accuracy

    return accuracy.logits({"logits": session}, images, case.model.preprocess.override({"resize": None}), case.progress)


def _accuracy(session: Session, images: Images, case: Case, reference: np.ndarray) -> dict[str, Any]:
    """reference: logits (images, K) of the untouched model in PyTorch, which agreement and SQNR are of."""
    from martlet.measure.accuracy import topk_pct
    from martlet.measure.fidelity import fidelity

    found = _logits(session, images, case)
    close = fidelity(reference, found.values["logits"])
    return {
        "n": close["n_images"],
        "top1_pct": topk_pct(found.values["logits"], found.labels, 1),
        "agreement_pct": close["top1_agreement_pct"],
        "logit_sqnr_db": close["logit_sqnr_db"],
    }


def _told(error: Exception) -> str:
    return one_line(f"{type(error).__name__}: {first_line(error)}")


def _images(assets: Path, name: str, part: str = "test") -> Path:
    return assets / "data" / name / f"{part}.parquet"


def _headline(model: Mapping[str, Any], settings: Mapping[str, Any]) -> str:
    n = next((e["latency_ms"]["n"] for e in model["entries"] if "latency_ms" in e), 0)
    return (
        f"{model['name']}, {model['weights']}: {settings['threads']} threads, batch {settings['batch']}, median of "
        f"{n} interleaved calls; the NNCF to beat: {model['nncf'] or 'none ran'}"
    )


def _tables(model: Mapping[str, Any]) -> list[Table]:
    """Speed; and accuracy, if the weights are real."""
    from martlet.report import units, verdict

    def faster(entry: Mapping[str, Any], key: str) -> str:
        return verdict.interval(entry[key]) if entry[key] else ""

    speed = [
        [
            entry["name"],
            units.number(entry["latency_ms"]["median"]),
            f"{units.number(entry['latency_ms']['p05'])}–{units.number(entry['latency_ms']['p95'])}",
            faster(entry, "speedup_over_nncf"),
            units.times(entry["speedup_over_fp32"]["median"]) if entry["speedup_over_fp32"] else "",
        ]
        for entry in model["entries"]
        if "latency_ms" in entry
    ]
    accuracy = [
        [
            f"{entry['name']}, {found['floating_point']}",
            found["images"],
            *(
                [found["error"]]
                if "error" in found
                else [
                    str(found["n"]),
                    units.pct(found["top1_pct"], found["n"]),
                    units.pct(found["agreement_pct"], found["n"]),
                    units.number(found["logit_sqnr_db"]),
                ]
            ),
        ]
        for entry in model["entries"]
        for found in entry.get("accuracy", [])
    ]
    headings = ["Contender", "ms", "5–95 %", "Over NNCF", "Over fp32"]
    tables = [table(headings, speed, numbers=headings[1:])]
    if accuracy:
        headings = ["Contender", "Images", "n", "Top-1 %", "Agree %", "dB"]
        tables.append(table(headings, accuracy, numbers=headings[2:]))
    return tables


def _failures(model: Mapping[str, Any]) -> list[str]:
    return [f"{entry['name']} failed: {entry['error']}" for entry in model["entries"] if "error" in entry]


def _resource_rows(found: Mapping[str, Any]) -> list[tuple[str, str]]:
    from martlet.report import units

    return [
        ("command", found["command"]),
        ("wall time", f"{units.duration(found['wall_seconds'])} of {units.duration(found['max_seconds'])}"),
        ("peak resident", f"{units.size(found['peak_rss_bytes'])} of {units.size(found['max_rss_bytes'])}"),
    ]


def _subject(name: str) -> Subject:
    found = {subject.name: subject for subject in SUBJECTS}
    if name not in found:
        raise UsageError(f"the benchmark has no model {name!r}{nearest(name, found)} (known: {', '.join(found)})")
    return found[name]


def _options(argv: Sequence[str] | None) -> argparse.Namespace:
    names = [subject.name for subject in SUBJECTS]
    assets = Path(os.environ.get("MARTLET_ASSETS", ROOT.parent / "shared"))
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--models", nargs="+", metavar="NAME", help=f"some of: {', '.join(names)}")
    parser.add_argument("--engines", nargs="+", choices=ENGINES, default=list(ENGINES), help="whose contenders to run")
    parser.add_argument("--assets", type=Path, default=assets, help="folder with data/ and weights/ (MARTLET_ASSETS)")
    parser.add_argument("--out", type=Path, help="results/peers.json, or with --quick runs/peers-quick.json")
    parser.add_argument("--minutes", type=float, help="of timing, for each model (default: 1, with --quick 0.1)")
    parser.add_argument("--again", action="store_true", help="measure anew what is in --out already")
    parser.add_argument("--quick", action="store_true", help="the first model, few images, little timing")
    parser.add_argument("--resources", action="store_true", help="only the time and memory of one compression")
    options = parser.parse_args(argv)
    options.models = options.models or (names[:1] if options.quick else names)
    options.minutes = options.minutes or (0.1 if options.quick else 1.0)
    options.out = options.out or ROOT / ("runs/peers-quick.json" if options.quick else "results/peers.json")
    return options


if __name__ == "__main__":
    sys.exit(main())
