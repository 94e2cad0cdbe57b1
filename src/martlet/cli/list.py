"""`martlet list`: what there is to choose from."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any

from typer import Argument

from martlet.cli.options import Json
from martlet.cli.terminal import emit, show, table, working
from martlet.core.errors import EngineError, UsageError, nearest


def list_(
    what: Annotated[str, Argument(metavar="WHAT", show_default=False, help="techniques, recipes, engines or models.")],
    json: Json = False,
) -> None:
    """List techniques, recipes, engines, or the models that come with Martlet."""
    listings: dict[str, Callable[[], list[dict[str, Any]]]] = {
        "techniques": techniques,
        "recipes": recipes,
        "engines": engines,
        "models": models,
    }
    if what not in listings:
        raise UsageError(f"there is no list of {what!r}{nearest(what, listings)} (known: {', '.join(listings)})")
    with working(f"list {what}"):
        entries = listings[what]()
    if json:
        emit(entries)
        return
    headings = list(entries[0])
    rows = [[_cell(entry[heading]) for heading in headings] for entry in entries]
    show(table([heading.replace("_", " ").capitalize() for heading in headings], rows))
    if what == "models":
        from martlet.source import FORMS

        show(f"And any image classifier of other libraries: {FORMS}.")


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


def models() -> list[dict[str, Any]]:
    """Name and image size of each model of the zoo, and whether its weights come with Martlet."""
    from martlet import models

    return [
        {
            "name": f"martlet:{name}",
            "image_size": list(models.preprocess(name).size),
            "weights": "trained" if models.weights(name) else "random",
        }
        for name in models.names()
    ]


def _cell(value: Any) -> str:
    return ", ".join(map(str, value)) if isinstance(value, list) else "–" if value is None else str(value)
