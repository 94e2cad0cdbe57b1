"""`martlet bench`: latency and throughput of several models, side by side."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from typer import Argument

from martlet.cli.eval import Engine
from martlet.cli.options import Json, Loading, Seed, Threads
from martlet.cli.terminal import emit, show, table, working


def bench(
    models: Annotated[
        list[str],
        Argument(metavar="MODEL…", show_default=False, help="Models or artifacts; the first is compared with."),
    ],
    loading: Loading,
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

        opened = [Loading() if (Path(spec) / store.MANIFEST).is_file() else loading for spec in models]
        document = bench(
            [options.open(spec, seed) for options, spec in zip(opened, models, strict=True)],
            engine=engine,
            threads=threads,
            seed=seed,
            progress=progress,
        )
    if json:
        emit(document)
        return
    from martlet.report import units, verdict

    entries = document["models"]
    batches = [t["batch"] for t in entries[0]["throughput"]]
    headings = ["Model", "Engine", "Latency", "5–95 %", "Speed-up", *(f"Images/s at {b}" for b in batches), "File"]
    rows = [
        [
            entry["model"] + (" (simulated)" if entry["simulated"] else ""),
            f"{verdict.title(entry['engine']['name'])} {entry['precision']}",
            units.quantity(entry["latency_ms"]["median"], "ms"),
            f"{units.number(entry['latency_ms']['p05'])}–{units.number(entry['latency_ms']['p95'])}",
            "no claim" if entry["simulated"] else verdict.interval(entry["speedup"]),
            *(units.number(t["images_per_s"]) for t in entry["throughput"]),
            units.size(entry["file_bytes"]),
        ]
        for entry in entries
    ]
    show(
        table(headings, rows, numbers=headings[2:]),
        f"{entries[0]['threads']} threads, batch 1, median of {entries[0]['latency_ms']['n']:,} calls; "
        "speed-up over the first, with its 90 % interval",
    )
