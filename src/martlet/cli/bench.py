"""`martlet bench`: latency and throughput of several models, side by side."""

from __future__ import annotations

from typing import Annotated, Any

from typer import Argument

from martlet.cli.eval import Engine
from martlet.cli.options import Json, ModelOptions, Seed, Threads
from martlet.cli.terminal import Cell, emit, show, table, working


def bench(
    models: Annotated[
        list[str],
        Argument(metavar="MODEL…", show_default=False, help="Models or artifacts; the first is compared with."),
    ],
    model_options: ModelOptions,
    engine: Engine = None,
    threads: Threads = None,
    seed: Seed = 0,
    json: Json = False,
) -> None:
    """Time models and artifacts, interleaved in one run, and compare each with the first.

    The options of a model are for all those that are no artifacts.
    """
    with working("load the models") as progress:
        from martlet.core import store
        from martlet.job import bench

        document = bench(
            [store.load(spec) if store.find(spec) else model_options.load(spec, seed) for spec in models],
            engine=engine,
            threads=threads,
            seed=seed,
            trust_code=model_options.trust_code,
            progress=progress,
        )
    if json:
        emit(document)
        return
    entries = document["models"]
    headings = ("Model", "Latency", "5–95 %", "Speed-up", "Images/s")
    show(
        table(headings, [_row(entry, first=entry is entries[0]) for entry in entries], numbers=headings[1:]),
        f"{entries[0]['threads']} threads; latency at batch 1, median of {entries[0]['latency_ms']['n']:,} calls; "
        "speed-up over the first, with its 90 % interval; images/s at the best batch size",
    )


def _row(entry: dict[str, Any], first: bool) -> list[Cell]:
    from martlet.report import units, verdict

    latency, best = entry["latency_ms"], max(entry["throughput"], key=lambda t: t["images_per_s"])
    engine = f"{verdict.title(entry['engine']['name'])} {entry['precision']}{', simulated' * entry['simulated']}"
    return [
        (entry["model"], f"{engine}, {units.size(entry['file_bytes'])}"),
        units.quantity(latency["median"], "ms"),
        f"{units.number(latency['p05'])}–{units.number(latency['p95'])}",
        "–" if first else verdict.interval(entry["speedup"]),
        f"{units.number(best['images_per_s'])} at {best['batch']}",
    ]
