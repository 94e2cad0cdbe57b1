"""search.json: everything that a search found, as one document, from which its page is made."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from martlet.core.recipe import Recipe
from martlet.functional import pareto

if TYPE_CHECKING:
    from martlet.recipe_search.journey import Journey

AXES = {
    "top1_pct": ("top-1", "%", "higher"),
    "agreement_pct": ("agreement with the untouched model", "%", "higher"),
    "drop_pct": ("top-1 lost", "points", "lower"),
    "latency_ms": ("latency at batch 1", "ms", "lower"),
    "file_bytes": ("files", "bytes", "lower"),
    "memory_bytes": ("peak memory", "bytes", "lower"),
}
BEYOND = 1.1
"""Times the worst of what needs no search is where hypervolumes end."""
LEAST_DROP_PCT = 0.1
"""And no less, so that there is a volume where nothing loses anything."""


def document(journey: Journey, job: Mapping[str, Any], created: str, rebuild: str) -> dict[str, Any]:
    """rebuild: the command that makes a point again, but for `--recipe` and `--out`."""
    from martlet import __version__
    from martlet.core import report

    measured, final, screened = journey.measured, journey.final(), journey.screened()
    said = {recipe.digest(): name for name, recipe in journey.references.items()}
    chosen = Recipe.from_yaml(journey.chosen()["recipe"]).digest() if journey.candidates_measured() else None
    points = []
    for digest in [*said, *(d for d in screened if d not in said)]:
        entry = measured.get(digest) or screened[digest]
        stage = "final" if digest in final else "measured" if digest in measured else "screened"
        points.append(
            {
                "id": len(points),
                "kind": "reference" if digest in said else "candidate",
                "label": said.get(digest) or label(Recipe.from_yaml(entry["recipe"])),
                "recipe": entry["recipe"],
                "stage": stage,
                "simulated": stage == "screened",
                "winner": digest == chosen,
                "seconds": entry.get("seconds", 0.0),
                "_values": final.get(digest, entry),
            }
        )
    for name in journey.peers:
        if name in final:
            points.append(
                {
                    "id": len(points), "kind": "peer", "label": name, "recipe": None, "stage": "final",
                    "simulated": False, "winner": False, "seconds": 0.0, "_values": final[name],
                }
            )  # fmt: skip
    latest = "final" if final else "measured" if measured else "screened"
    for point, member in zip(
        points, on_front([p["_values"] if p["stage"] == latest else None for p in points]), strict=True
    ):
        values = point.pop("_values")
        point |= {
            "command": f"{rebuild} --recipe {journey.folder.path}/recipes/{point['id']}.yaml --out {point['id']}"
            if point["recipe"]
            else "",
            "n_images": values["n_images"],
            "values": axis_values(values),
            "on_front": member,
            "keeps_budget": journey.limits.keeps(values),
        }
    used = {axis for point in points for axis in point["values"]}
    return {
        "martlet": __version__,
        "created": created,
        "environment": report.environment(),
        "job": {
            "model": job["model"],
            "engine": job["engine"],
            "images": job["images"],
            "budget": {
                "max_drop_pct": journey.limits.max_drop,
                "latency_ms": journey.limits.latency_ms,
                "size_mb": journey.limits.size_mb,
                "minutes": journey.minutes,
            },
            "seed": job["seed"],
            "command": journey.command,
        },
        "axes": {
            axis: {"label": text, "unit": unit, "better": better}
            for axis, (text, unit, better) in AXES.items()
            if axis in used
        },
        "points": points,
        "lost": journey.lost(),
        "peers_left_out": journey.left_out,
        "hypervolume": volumes(points, journey.limits.max_drop),
        "seconds": round(journey.seconds, 1),
    }


def axis_values(values: Mapping[str, Any]) -> dict[str, dict[str, float | None]]:
    """Of each axis that was measured, the value and the ends of its 90 % interval."""
    found = {}
    for axis in AXES:
        if values.get(axis) is not None and not (axis == "agreement_pct" and "top1_pct" in values):
            name, _, unit = axis.rpartition("_")
            found[axis] = {
                "value": values[axis],
                "low": values.get(f"{name}_low_{unit}"),
                "high": values.get(f"{name}_high_{unit}"),
            }
    return found


def on_front(values: Sequence[Mapping[str, Any] | None]) -> list[bool]:
    """Of each, whether no other is as good in drop and latency and better in one; None is of no front."""
    rows = [[math.nan] * 2 if v is None else [v["drop_pct"], v["latency_ms"]] for v in values]
    return pareto.front(np.array(rows)).tolist()


def volumes(points: Iterable[Mapping[str, Any]], max_drop_pct: float | None) -> dict[str, Any] | None:
    """How much of drop by latency, in points times milliseconds, sets of points dominate, by held-out images.

    Up to a reference point, a tenth beyond the worst drop and time of what needs no search, and beyond the drop that is
    allowed. `found` is what the search's own points dominate, `others` what references and peers do, and `together` all
    of them: where that is `found`, every other point is dominated. None until something is measured on held-out images.
    """
    rows: dict[bool, list[tuple[float, float]]] = {True: [], False: []}
    for p in points:
        if p["stage"] == "final":
            pair = p["values"]["drop_pct"]["value"], p["values"]["latency_ms"]["value"]
            rows[p["kind"] == "candidate"].append(pair)
    found, others = rows[True], rows[False]
    if not others:
        return None
    drop_pct = BEYOND * max(max_drop_pct or 0.0, *(drop for drop, _ in others), LEAST_DROP_PCT)
    latency_ms = BEYOND * max(ms for _, ms in others)

    def volume(rows: Sequence[tuple[float, float]]) -> float:
        return pareto.hypervolume(np.array(rows), (drop_pct, latency_ms))

    return {
        "reference": {"drop_pct": drop_pct, "latency_ms": latency_ms},
        "found": volume(found),
        "others": volume(others),
        "together": volume(found + others),
    }


def label(recipe: Recipe) -> str:
    """One short line: techniques with what was drawn for them, long lists as their number."""

    def text(value: Any) -> str:
        if isinstance(value, list | tuple) and len(value) > 2:
            return f"{len(value)} layers"
        if isinstance(value, dict):
            return ", ".join(f"{k}: {v}" for k, v in value.items())
        return str(value)

    parts = []
    for technique in recipe.passes:
        settings = ", ".join(f"{k} {text(v)}" for k, v in technique.settings().items() if k != "required")
        parts.append(technique.name + (f" ({settings})" if settings else ""))
    return " | ".join(parts) or "none"
