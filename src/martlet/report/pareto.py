"""The page of a search: an explorer of what was tried, in one HTML file that asks for nothing outside itself."""

from __future__ import annotations

import base64
import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from martlet.functional import pareto
from martlet.report import html, units

Document = Mapping[str, Any]
"""`search.json`."""
Point = Mapping[str, Any]

ACCURACY = ("drop_pct", "top1_pct", "agreement_pct")
"""Axes of accuracy, the one to look at first in front."""
COST = ("latency_ms", "file_bytes", "memory_bytes")
SAME = 1e-9
"""Of a volume, what rounding may add."""


@dataclass(frozen=True)
class Axis:
    """A quantity as it is shown: bytes in MB. better: `lower` or `higher`."""

    key: str
    label: str
    unit: str
    better: str
    per_unit: float

    def value(self, point: Point, bound: str = "value") -> float | None:
        """In the shown unit; None where it isn't known. bound: `value`, `low` or `high`."""
        number = point["values"].get(self.key, {}).get(bound)
        return None if number is None or not math.isfinite(number) else number / self.per_unit

    def text(self, point: Point) -> str:
        """`8.21 ms (8.00–8.50)`."""
        value, low, high = (self.value(point, bound) for bound in ("value", "low", "high"))
        shown = self.number(value, point) + ("" if value is None else f" {self.unit}")
        if low is None or high is None:
            return shown
        return f"{shown} ({self.number(low, point)}–{self.number(high, point)})"

    def number(self, value: float | None, point: Point) -> str:
        if self.unit == "%" or self.key.endswith("_pct"):
            return units.pct(value, point["n_images"]).replace("-", "−")
        return units.number(value)


def axes(document: Document) -> list[Axis]:
    """What can be drawn, in the document's order."""
    found = []
    for key, axis in document["axes"].items():
        is_bytes = key.endswith("_bytes")
        unit, per_unit = ("MB", 1e6) if is_bytes else (axis["unit"], 1.0)
        found.append(Axis(key, axis["label"], unit, axis["better"], per_unit))
    return found


def chosen(found: Sequence[Axis]) -> tuple[Axis, Axis]:
    """The two to look at first: what it costs, across, and what it loses, upwards.

    Raises:
        ValueError: there are not two axes.
    """
    if len(found) < 2:
        raise ValueError("a front needs two axes")
    by_key = {axis.key: axis for axis in found}
    x = next((by_key[key] for key in COST if key in by_key), found[0])
    y = next((by_key[key] for key in ACCURACY if key in by_key and by_key[key] is not x), None)
    return x, y or next(axis for axis in found if axis is not x)


def judged(document: Document) -> list[Point]:
    """The candidates that a front is drawn through: measured, or screened where none was; never a simulated one."""
    real = [p for p in document["points"] if p["kind"] == "candidate" and not p["simulated"]]
    return [p for p in real if p["stage"] != "screened"] or real


def front(document: Document, x: Axis, y: Axis) -> list[Point]:
    """The candidates that no other beats on these two axes, by what is across."""
    points = [p for p in judged(document) if x.value(p) is not None and y.value(p) is not None]
    if not points:
        return []
    signs = [-1 if axis.better == "higher" else 1 for axis in (x, y)]
    values = np.array([[s * (axis.value(p) or 0.0) for s, axis in zip(signs, (x, y), strict=True)] for p in points])
    kept = [p for p, on in zip(points, pareto.front(values), strict=True) if on]
    return sorted(kept, key=lambda p: (x.value(p) or 0.0, y.value(p) or 0.0))


def limits(document: Document) -> dict[str, float]:
    """Where the budget lies on each axis that it bounds, in the shown unit."""
    budget = document["job"]["budget"]
    found: dict[str, float] = {}
    if (latency_ms := budget.get("latency_ms")) is not None:
        found["latency_ms"] = latency_ms
    if (size_mb := budget.get("size_mb")) is not None:
        found["file_bytes"] = size_mb
    if (max_drop_pct := budget.get("max_drop_pct")) is not None:
        found["drop_pct"] = max_drop_pct
        for axis in axes(document):
            known = [
                axis.value(p) - (max_drop_pct - p["values"]["drop_pct"]["value"])  # type: ignore[operator]
                for p in document["points"]
                if p["kind"] == "reference" and axis.value(p) is not None and "drop_pct" in p["values"]
            ]
            if axis.key in ("top1_pct", "agreement_pct") and known:
                found[axis.key] = known[0]
    return {axis.key: found[axis.key] for axis in axes(document) if axis.key in found}


def winner(document: Document) -> Point | None:
    return next((p for p in document["points"] if p["winner"]), None)


def headline(document: Document) -> str:
    """What was found, in one line."""
    best = winner(document)
    if best is None:
        return "Nothing was found yet."
    numbers = ", ".join(f"{axis.label} {axis.text(best)}" for axis in axes(document) if axis.value(best) is not None)
    verdict = "keeps the budget" if best["keeps_budget"] else "is the nearest; no point keeps the budget"
    return f"{best['label']} {verdict}: {numbers}."


def volume(document: Document) -> str:
    """How much of drop by time was won over what needs no search, in one line; empty until it is measured."""
    found = document.get("hypervolume")
    if found is None:
        return ""
    at, added = found["reference"], found["together"] - found["found"]
    rest = (
        "every reference and peer is dominated"
        if added <= SAME * found["together"]
        else f"{units.number(found['together'])} with both, so not all of those are dominated"
    )
    return (
        f"Hypervolume of drop by latency, up to {at['drop_pct']:.2f} points and {at['latency_ms']:.2f} ms: found "
        f"{units.number(found['found'])} points·ms, references and peers {units.number(found['others'])}; {rest}."
    )


def left_out(document: Document) -> list[str]:
    """Which peers there is no point of, and why, a line each."""
    return [f"No point of {name}: {why}." for name, why in document.get("peers_left_out", {}).items()]


def drawn(document: Document) -> dict[str, Any]:
    """What the script draws: axes, limits, and of each point its texts and numbers in the shown units."""
    found = axes(document)
    x, y = chosen(found)
    in_front = {id(p) for p in judged(document)}
    return {
        "axes": [{"key": a.key, "label": a.label, "unit": a.unit, "better": a.better} for a in found],
        "x": x.key,
        "y": y.key,
        "limits": limits(document),
        "points": [
            {
                **{key: p[key] for key in ("id", "kind", "label", "recipe", "command", "stage", "simulated", "winner")},
                "about": about(p),
                "judged": id(p) in in_front,
                "values": {
                    a.key: {"at": a.value(p), "low": a.value(p, "low"), "high": a.value(p, "high"), "text": a.text(p)}
                    for a in found
                    if a.value(p) is not None
                },
            }
            for p in document["points"]
        ],
    }


def about(point: Point) -> str:
    """How far a point came: `candidate, measured on 500 images, on the front`."""
    how = "screened" if point["stage"] == "screened" else "measured"
    images = f"{point['n_images']:,} image{'' if point['n_images'] == 1 else 's'}"
    words = [point["kind"], f"{how} on {images}"]
    words += ["the winner"] if point["winner"] else ["on the front"] if point["on_front"] else []
    words += [] if point["keeps_budget"] else ["outside the budget"]
    return ", ".join(words)


def render(document: Document) -> str:
    """The explorer as one HTML page.

    Every string of the document is escaped, and a content security policy keeps the browser from loading or running
    anything that did not come with the page. Without JavaScript there is the table.
    """
    scripts = [(html.HERE / name).read_text(encoding="utf-8") for name in ("sort.js", "pareto.js")]
    digests = [base64.b64encode(hashlib.sha256(script.encode()).digest()).decode() for script in scripts]
    page = html.template("pareto.html.j2").render(
        d=document,
        css="".join((html.HERE / name).read_text(encoding="utf-8") for name in ("page.css", "pareto.css")),
        scripts=scripts,
        digests=digests,
        axes=axes(document),
        about=about,
        drawn=drawn(document),
        headline=headline(document),
        volume=volume(document),
        left_out=left_out(document),
        units=units,
    )
    return page.encode("utf-8", "replace").decode("utf-8")


def write_page(document: Document, path: Path) -> None:
    """Writes the page beside `path`, then renames.

    Raises:
        ArtifactError: the folder is missing, full or not ours.
    """
    html.write_page(render(document), path)
