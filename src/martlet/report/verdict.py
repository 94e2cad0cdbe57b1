"""The verdict in one sentence, and the before-and-after table: the same words on the page and in the terminal."""

from __future__ import annotations

from dataclasses import dataclass, replace

from martlet.core.report import Document, Latency, Ratio, Side, Throughput
from martlet.report.units import MISSING, SAME, compared, count, number, pct, percent, points, quantity, size

NO_CLAIM = "no claim"
TITLES = {"openvino": "OpenVINO", "onnxruntime": "ONNX Runtime", "torch": "PyTorch"}


@dataclass(frozen=True, kw_only=True)
class Row:
    """A line of the before-and-after table.

    detail: of baseline and artifact, what belongs beside the value: a spread, a batch size.
    claim: the number speaks of speed or size.
    simulated: the artifact's number is not an engine's own.
    worse: the artifact's number is the worse one.
    """

    name: str
    baseline: str
    artifact: str
    change: str = ""
    detail: tuple[str, str] = ("", "")
    claim: bool = False
    simulated: bool = False
    worse: bool = False


def title(engine: str) -> str:
    """An engine's own spelling of its name."""
    return TITLES.get(engine, engine)


def headline(document: Document) -> str:
    """What to read if only one sentence is read: the numbers, or why the gate failed."""
    if document["gate"]["passed"]:
        return measured(document)
    return f"The gate failed: {'; '.join(document['gate']['reasons']) or 'it gave no reason'}"


def gate(document: Document) -> str:
    """The gate in one line."""
    passed = "Gate passed" if document["gate"]["passed"] else headline(document)
    return f"{passed} (speed was not judged: it is simulated)" if document["simulated"] else passed


def measured(document: Document) -> str:
    """Speed, size and accuracy in one sentence; of a simulated artifact, accuracy alone."""
    parts, disclaimer = [accuracy(document)], ""
    if document["simulated"]:
        engine = title(document["engine"]["name"])
        disclaimer = f"Simulated, so no claim about speed or size: {engine} has no kernels for this arithmetic. "
    else:
        sizes = (document["baseline"]["file_bytes"], document["artifact"]["file_bytes"])
        parts = [faster(document["speedup"]), compared(*sizes, "smaller", "larger", "the same size"), *parts]
    text = f"{', '.join(parts)} {place(document)}"
    return disclaimer + text[0].upper() + text[1:]


def faster(speedup: Ratio | None) -> str:
    """`2.1× faster`, `1.3× slower`, or that the interval holds 1 and nothing can be said; no claim if there is none."""
    if speedup is None:
        return NO_CLAIM
    if speedup["low"] <= 1 <= speedup["high"]:
        return "as fast as before (within the spread)"
    return compared(speedup["median"], 1.0, "faster", "slower", "as fast as before")


def accuracy(document: Document) -> str:
    """Top-1 before and after; without labels, how often the two give the same answer."""
    before, after, fidelity = document["baseline"], document["artifact"], document["fidelity"]
    if before["top1_pct"] is not None and after["top1_pct"] is not None:
        n = after["n_images"]
        return f"top-1 {pct(before['top1_pct'], n)} → {pct(after['top1_pct'], n)} % (n = {n:,})"
    n = fidelity["n_images"]
    if not n:
        return f"accuracy {MISSING}"
    return (
        f"same answer as the original on {percent(fidelity['top1_agreement_pct'], n)} of images (n = {n:,}, no labels)"
    )


def place(document: Document) -> str:
    """`on OpenVINO, 2 threads`."""
    engine = document["engine"]
    threads = engine.get("threads")
    suffix = "" if threads is None else f", {threads} thread{'' if threads == 1 else 's'}"
    return f"on {title(engine['name'])}{suffix}"


def floats(document: Document) -> str:
    """What the artifact's floating-point parts run in, and why, where the recipe would have had it otherwise."""
    ran, engine = document["artifact"]["precision"], title(document["engine"]["name"])
    names = [step["name"] for step in document["recipe"]["steps"] if step["record"].get("precision") == ran]
    missed = [name for name in names if name != ran]
    why = f": {engine} has no fast {' or '.join(missed)} on this machine" if missed else ""
    return f"Floating-point parts run in {ran}{why}"


def plainer(document: Document) -> str:
    """That what quantizes nothing is faster than the artifact on this machine; empty where it isn't."""
    speedup = document["speedup"]
    beaten = [] if speedup is None else [a for a in document["alternatives"] if a["speedup"]["low"] > speedup["high"]]
    if not beaten:
        return ""
    best = max(beaten, key=lambda a: a["speedup"]["median"])
    assert speedup is not None
    return (
        f"Faster on this machine: {best['name']} ({best['speedup']['median']:.2f}x the baseline's speed; the artifact "
        f"has {speedup['median']:.2f}x)"
    )


def rows(document: Document) -> list[Row]:
    """Every field of the two sides, with its unit and what changed; a simulated artifact claims no speed or size."""
    before, after = document["baseline"], document["artifact"]
    n = after["n_images"]
    latency = Row(
        name="Latency, median",
        baseline=quantity(before["latency_ms"]["median"], "ms"),
        artifact=quantity(after["latency_ms"]["median"], "ms"),
        change=faster(document["speedup"]),
        detail=(spread(before["latency_ms"]), spread(after["latency_ms"])),
        claim=True,
        worse=document["speedup"] is not None and document["speedup"]["high"] < 1,
    )
    measures = [
        latency,
        _throughput(before, after),
        _accuracy("Top-1", before["top1_pct"], after["top1_pct"], n),
        _accuracy("Top-5", before["top5_pct"], after["top5_pct"], n),
        _size("File size", before["file_bytes"], after["file_bytes"]),
        _size("Weights", before["weight_bytes"], after["weight_bytes"]),
        _size("Peak resident memory", before["peak_rss_bytes"], after["peak_rss_bytes"]),
    ]
    if document["simulated"]:
        measures = [_disclaimed(row) for row in measures]
    return [
        Row(name="Engine", baseline=title(before["engine"]), artifact=title(after["engine"])),
        Row(name="Float precision", baseline=before["precision"], artifact=after["precision"]),
        *measures,
        Row(name="Images scored", baseline=f"{before['n_images']:,}", artifact=f"{n:,}"),
        Row(name="Logits off PyTorch's", baseline=_off(before), artifact=_off(after)),
        Row(
            name="Parameters",
            baseline=count(before["params"]),
            artifact=count(after["params"]),
            change=compared(before["params"], after["params"], "fewer", "more", "the same"),
        ),
        Row(
            name="Work per image",
            baseline=quantity(before["gmacs"], "GMACs"),
            artifact=quantity(after["gmacs"], "GMACs"),
            change=compared(before["gmacs"], after["gmacs"], "less", "more", "the same"),
        ),
    ]


def spread(latency: Latency) -> str:
    """The 5–95 % interval and the number of calls."""
    return f"{number(latency['p05'])}–{number(latency['p95'])}, n = {latency['n']:,}"


def interval(speedup: Ratio | None) -> str:
    """The speed-up with its 90 % bounds; no claim if there is none."""
    if speedup is None:
        return NO_CLAIM
    return f"{speedup['median']:.2f}× ({speedup['low']:.2f}–{speedup['high']:.2f})"


def _disclaimed(row: Row) -> Row:
    row = replace(row, simulated=row.artifact != MISSING)
    return replace(row, change=NO_CLAIM if row.change else "", worse=False) if row.claim else row


def _accuracy(name: str, before: float | None, after: float | None, n: int) -> Row:
    row = Row(name=name, baseline=percent(before, n), artifact=percent(after, n))
    if before is None or after is None:
        return row
    return replace(row, change=points(before, after, n), worse=after < before)


def _off(side: Side) -> str:
    error = side.get("logit_error")
    return quantity(None if error is None else 100 * error, "%", 2)


def _size(name: str, before: int | None, after: int | None) -> Row:
    row = Row(name=name, baseline=size(before), artifact=size(after), claim=True)
    if before is None or after is None:
        return row
    return replace(
        row, change=compared(before, after, "smaller", "larger", "the same"), worse=after > before * (1 + SAME)
    )


def _throughput(before: Side, after: Side) -> Row:
    def best(side: Side) -> Throughput | None:
        return max(side["throughput"], key=lambda t: t["images_per_s"], default=None)

    a, b = best(before), best(after)
    return Row(
        name="Best throughput",
        baseline=quantity(a["images_per_s"], "images/s") if a else MISSING,
        artifact=quantity(b["images_per_s"], "images/s") if b else MISSING,
        change=compared(a["images_per_s"], b["images_per_s"], "less", "more", "the same") if a and b else "",
        detail=(f"batch {a['batch']}" if a else "", f"batch {b['batch']}" if b else ""),
        claim=True,
        worse=bool(a and b and b["images_per_s"] < a["images_per_s"] * (1 - SAME)),
    )
