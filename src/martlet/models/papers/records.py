"""What was counted and measured of each model, on one machine: results that come with the package.

`zoo.json` is written by `make docs` from the newest results of `benchmarks/zoo.py`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from types import MappingProxyType
from typing import Any

FILE = Path(__file__).with_name("zoo.json")


@dataclass(frozen=True, kw_only=True)
class Record:
    """One model.

    params, macs: in the form that its paper counts, MACs per image of `image_size` (H, W), attention included.
    latency_ms: the median of a call in float32, by engine and by batch size; empty if it wasn't timed.
    date: of the times, as YYYY-MM-DD.
    """

    image_size: tuple[int, int]
    params: int
    macs: int
    latency_ms: Mapping[str, Mapping[int, float]] = field(default_factory=dict)
    date: str | None = None


@cache
def records() -> Mapping[str, Record]:
    """By timm's name of the model; those without results are left out."""
    return MappingProxyType(
        {
            name: Record(
                image_size=tuple(entry["image_size"]),
                params=entry["params"],
                macs=entry["macs"],
                latency_ms={
                    engine: {int(batch): ms for batch, ms in times.items()}
                    for engine, times in entry["latency_ms"].items()
                },
                date=entry["date"],
            )
            for name, entry in _shipped()["models"].items()
        }
    )


def engines() -> tuple[str, ...]:
    """Those of which there are times."""
    return tuple(dict.fromkeys(engine for record in records().values() for engine in record.latency_ms))


def machine() -> str | None:
    """What was measured on: processor, cores and the engines' versions. None if there are no results."""
    return _shipped()["machine"]


def shipped(document: Mapping[str, Any]) -> str:
    """What `zoo.json` has to hold for the results of `benchmarks/zoo.py`: a line for each model that was counted."""
    machine = None
    if environment := document.get("environment"):
        versions = ", ".join(
            f"{package} {environment['versions'][package]}"
            for package in ("openvino", "onnxruntime", "torch")
            if package in environment["versions"]
        )
        machine = f"{environment['cpu']}, {environment['cores']} cores; {versions}"
    lines = []
    for record in sorted(document["models"], key=lambda record: record["name"]):
        counts, timed = record.get("counts", {}), record.get("latency", {})
        if "params" not in counts:
            continue
        entry = {key: counts[key] for key in ("image_size", "params", "macs")} | {
            "date": timed.get("date"),
            "latency_ms": {
                engine: {batch: round(ms["median"], 3) for batch, ms in times.items()}
                for engine, times in timed.get("ms", {}).items()
            },
        }
        lines.append(f"{json.dumps(record['name'])}: {json.dumps(entry)}")
    return f'{{"machine": {json.dumps(machine)},\n"models": {{\n' + ",\n".join(lines) + "\n}}\n"


@cache
def _shipped() -> dict[str, Any]:
    if not FILE.is_file():
        return {"machine": None, "models": {}}
    return json.loads(FILE.read_text(encoding="utf-8"))
