"""`martlet list`: what there is to choose from."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any

from typer import Argument, Option

from martlet.cli.options import ENGINE_NAMES, Json
from martlet.cli.terminal import emit, show, table, working
from martlet.core.errors import EngineError, UsageError, nearest

SORTS = {"name": "name", "params": "params", "macs": "macs", "latency": "latency_ms", "top1": "top1_pct"}
"""What `--sort` takes, and by which key of an entry it sorts."""


def _option(metavar: str, text: str, **more: Any) -> Any:
    return Option(metavar=metavar, help=text, rich_help_panel="Models", show_default=False, **more)


@dataclass(frozen=True, kw_only=True)
class Choice:
    """Which models, in which order."""

    engine: Annotated[str | None, _option("NAME", f"Whose recorded times to show: {ENGINE_NAMES}.")] = None
    max_latency_ms: Annotated[float | None, _option("MS", "Of one image, as recorded.", min=0)] = None
    max_params_m: Annotated[float | None, _option("N", "Millions of parameters.", min=0)] = None
    sort: Annotated[str | None, _option("BY", f"{', '.join(SORTS)}; the best top-1 comes first.")] = None


def list_(
    what: Annotated[str, Argument(metavar="WHAT", show_default=False, help="techniques, recipes, engines or models.")],
    choice: Choice,
    json: Json = False,
) -> None:
    """List techniques, recipes, engines, or models to choose from, with what was measured of them."""
    listings: dict[str, Callable[[], list[dict[str, Any]]]] = {
        "techniques": techniques,
        "recipes": recipes,
        "engines": engines,
        "models": lambda: models(choice),
    }
    if what not in listings:
        raise UsageError(f"there is no list of {what!r}{nearest(what, listings)} (known: {', '.join(listings)})")
    if what != "models" and choice != Choice():
        raise UsageError(f"only models can be chosen and sorted, not {what}; type: martlet list models")
    with working(f"list {what}"):
        entries = listings[what]()
    if json:
        emit(entries)
        return
    if what == "models":
        _show_models(entries, choice)
        return
    headings = list(entries[0])
    rows = [[_cell(entry[heading]) for heading in headings] for entry in entries]
    show(table([heading.replace("_", " ").capitalize() for heading in headings], rows))


def techniques() -> list[dict[str, Any]]:
    """Name, family, summary and paper of each."""
    from martlet.core import registry

    return [
        {"name": entry.name, "family": entry.family, "summary": entry.summary, "paper": entry.paper}
        for entry in registry.entries().values()
    ]


def recipes() -> list[dict[str, Any]]:
    """Name, passes and summary of each shipped recipe; the summary is the first line of its file."""
    import yaml

    from martlet.core import recipe

    found = []
    for name in recipe.shipped():
        text = (recipe.SHIPPED / f"{name}.yaml").read_text(encoding="utf-8")
        passes = [entry if isinstance(entry, str) else next(iter(entry)) for entry in yaml.safe_load(text)["passes"]]
        summary = text.splitlines()[0].removeprefix(f"# {name}: ")
        found.append({"name": name, "passes": passes, "summary": summary})
    return found


def engines() -> list[dict[str, Any]]:
    """Name, version (None if not installed), the precisions of this machine, and what is missing, of each."""
    from martlet import engine

    found = []
    for name in engine.ENGINES:
        try:
            target = engine.get(name)
            found.append(
                {
                    "name": name,
                    "version": target.version(),
                    "float_precisions": list(target.alternatives()),
                    "missing": "",
                }
            )
        except EngineError as error:
            found.append({"name": name, "version": None, "float_precisions": [], "missing": str(error)})
    return found


def models(choice: Choice | None = None) -> list[dict[str, Any]]:
    """Every model of the zoo, and of timm's where the paper's figures are kept: what it is, counts, and takes.

    latency_ms: of one image, latency_ms_16: of sixteen, in float32 as recorded on the chosen engine, else on OpenVINO.
    What isn't recorded is None, and stands last in every order; a limit leaves it out.

    Raises:
        UsageError: an engine of which nothing is recorded, or an order that there isn't.
    """
    from martlet import models
    from martlet.models.papers.records import engines, records

    choice = choice or Choice()
    if choice.sort not in (None, *SORTS):
        raise UsageError(f"models can't be sorted by {choice.sort!r}{nearest(choice.sort, SORTS)} ({', '.join(SORTS)})")
    timed = choice.engine is not None or choice.max_latency_ms is not None or choice.sort == "latency"
    engine = choice.engine or "openvino"
    if timed and engine not in engines():
        known = ", ".join(engines()) or "none"
        raise UsageError(f"no times of models are recorded on {engine!r}{nearest(engine, engines())} (known: {known})")
    found = []
    for name in (*models.names(), *models.timm_names()):
        record, row = records().get(name), models.stated(name)
        latency = record.latency_ms.get(engine, {}) if record else {}
        found.append(
            {
                "name": models.spec(name),
                "image_size": list(models.image_size(name)),
                "weights": models.origin_of_weights(name),
                "params": record.params if record else None,
                "macs": record.macs if record else None,
                "top1_pct": row.top1_pct if row else None,
                "engine": engine if latency else None,
                "latency_ms": latency.get(1),
                "latency_ms_16": latency.get(16),
                "date": record.date if record and latency else None,
            }
        )
    limits = (("latency_ms", choice.max_latency_ms, 1.0), ("params", choice.max_params_m, 1e6))
    for key, most, unit in limits:
        if most is not None:
            found = [entry for entry in found if entry[key] is not None and entry[key] <= unit * most]
    if choice.sort in (None, "name"):
        return found
    key, sign = SORTS[choice.sort], -1 if choice.sort == "top1" else 1
    return sorted(found, key=lambda entry: (entry[key] is None, sign * (entry[key] or 0)))


def _show_models(entries: list[dict[str, Any]], choice: Choice) -> None:
    from martlet.models.papers.records import machine
    from martlet.report import units
    from martlet.source import FORMS

    def cell(value: float | None, text: Callable[[float], str]) -> str:
        return "–" if value is None else text(value)

    headings = ["Name", "Image", "Params", "MACs", "Top-1"]  # short: names are long
    timed = [entry for entry in entries if entry["latency_ms"] is not None]
    times = ["ms", "ms/16"] if timed else []
    rows = [
        [
            entry["name"],
            str(max(entry["image_size"])),
            cell(entry["params"], units.count),
            cell(entry["macs"], units.count),
            cell(entry["top1_pct"], units.pct),
            *(cell(entry[key], units.number) for key in ("latency_ms", "latency_ms_16")[: len(times)]),
        ]
        for entry in entries
    ]
    show(table([*headings, *times], rows, numbers=[*headings[1:], *times]))
    if timed:
        dates = sorted({entry["date"] for entry in timed})
        days = dates[0] if len(dates) == 1 else f"{dates[0]} to {dates[-1]}"
        engine = timed[0]["engine"]
        show(f"Milliseconds of 1 and of 16 images: {engine}, float32, on {machine()}; {days}.")
    show("Top-1 is the papers', on ImageNet-1K.")
    show(f"And any image classifier of other libraries: {FORMS}.")


def _cell(value: Any) -> str:
    return ", ".join(map(str, value)) if isinstance(value, list) else "–" if value is None else str(value)
