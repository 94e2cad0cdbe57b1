"""The page of a training: curves of the loss, of the learning rate, and of what held-back images say."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from martlet.report import charts, html, units


@dataclass(frozen=True)
class Curve:
    """A line over steps. points: of an SVG polyline, in per cent of its box."""

    name: str
    unit: str
    scale: charts.Axis
    points: str
    last: float


def write(document: Mapping[str, Any], path: Path) -> None:
    """Writes the page beside `path`, then renames.

    Raises:
        ArtifactError: the folder is missing, full or not ours.
    """
    passes = [
        {"name": its["name"], "facts": _facts(its["training"]), "curves": curves(its["training"])}
        for its in document["passes"]
    ]
    page = html.template("training.html.j2").render(
        d=document, passes=passes, css=(html.HERE / "page.css").read_text(encoding="utf-8"), units=units
    )
    html.write_page(page.encode("utf-8", "replace").decode("utf-8"), path)


def curves(training: Mapping[str, Any]) -> list[Curve]:
    """All that changed over the steps, where it was looked at twice or more."""
    curve, held_back, steps = training["curve"], training["held_back"], training["steps"]
    lines = [
        ("loss on what is learned from", "", [(step, loss) for step, loss, _ in curve]),
        ("loss on what is held back", "", [(step, loss) for step, loss, _ in held_back]),
        ("top-1 on what is held back", " %", [(step, top1) for step, _, top1 in held_back if top1 is not None]),
        ("learning rate", "", [(step, rate) for step, _, rate in curve]),
    ]
    return [_curve(name, unit, points, steps) for name, unit, points in lines if len(points) > 1]


def _curve(name: str, unit: str, points: Sequence[tuple[int, float]], steps: int) -> Curve:
    values = [value for _, value in points]
    scale = charts.axis(min(values), max(values))
    places = (f"{round(100 * step / steps, 3)},{round(100 - scale.at(value), 3)}" for step, value in points)
    return Curve(name, unit, scale, " ".join(places), values[-1])


def _facts(training: Mapping[str, Any]) -> list[tuple[str, str]]:
    return html.facts({name: value for name, value in training.items() if name not in ("curve", "held_back")})
