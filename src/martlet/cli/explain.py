"""`martlet explain`: what each technique of a search's winner bought and cost."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

from typer import Argument, Option

from martlet.cli.options import Json
from martlet.cli.terminal import emit, show, table, working


def explain(
    run: Annotated[Path, Argument(metavar="RUN", show_default=False, help="The folder of a search.")],
    trust_code: Annotated[bool, Option("--trust-code", help="Run the Python file that the model comes from.")] = False,
    json: Json = False,
) -> None:
    """Say why a search chose its recipe: what each technique bought and cost, by leaving it out.

    Measured on the engine, in turns with the winner, on images that nothing was searched on. Ranges hold 90 %.
    """
    with working("open the search") as progress:
        from martlet.recipe_search.explain import explain as find

        found = find(run, trust_code=trust_code, progress=progress)
    if json:
        emit(found.to_json())
        return
    headings = ("without", "time", "points gained", "MB more", "")
    rows = [
        (w.technique, *(_cells(w.values, found.winner) if w.values else ("", "", "")), w.why) for w in found.without
    ]
    winner = found.winner
    show(
        f"Winner  {found.recipe}",
        f"        {winner['latency_ms']:.2f} ms, {winner['file_bytes'] / 1e6:.2f} MB, n = {winner['n_images']}",
        table(headings, rows, headings[1:4]),
    )


def _cells(values: dict[str, Any], winner: dict[str, Any]) -> tuple[str, str, str]:
    """Of the recipe without a technique: how many times the winner's time, and the differences."""
    times = [values[key] / winner["latency_ms"] for key in ("latency_ms", "latency_low_ms", "latency_high_ms")]
    gained = [-values[key] for key in ("drop_pct", "drop_high_pct", "drop_low_pct")]
    more = (values["file_bytes"] - winner["file_bytes"]) / 1e6
    return (
        f"{times[0]:.2f}x ({times[1]:.2f} to {times[2]:.2f})",
        f"{gained[0]:+.2f} ({gained[1]:+.2f} to {gained[2]:+.2f})",
        f"{more:+.2f}",
    )
