"""`martlet search`: from a budget to an artifact."""

from __future__ import annotations

import shlex
from dataclasses import fields
from pathlib import Path
from typing import Annotated

from typer import Context, Option

from martlet.cli.compress import GATE_FAILED
from martlet.cli.options import ImageOptions, Json, ModelOptions, Seed, Spec, Threads
from martlet.cli.stop import Stopped
from martlet.cli.terminal import emit, note, show, working
from martlet.core.errors import UsageError


def search(
    ctx: Context,
    model: Spec,
    image_options: ImageOptions,
    out: Annotated[Path, Option(metavar="DIR", help="The search's folder: winner, page, record.", show_default=False)],
    model_options: ModelOptions,
    max_drop: Annotated[
        float | None, Option(metavar="POINTS", help="Of top-1, that may be lost.", show_default=False)
    ] = None,
    latency_ms: Annotated[
        float | None, Option(metavar="MS", help="That a call at batch 1 may take.", show_default=False)
    ] = None,
    size_mb: Annotated[float | None, Option(metavar="MB", help="That the files may weigh.", show_default=False)] = None,
    minutes: Annotated[float, Option(metavar="MIN", help="How long to search.")] = 30.0,
    candidates: Annotated[
        int | None, Option(min=1, metavar="N", help="How many recipes to draw, if fewer.", show_default=False)
    ] = None,
    recipe: Annotated[
        str | None, Option(metavar="RECIPE", help="Search its settings alone, not all techniques.", show_default=False)
    ] = None,
    engine: Annotated[str, Option(metavar="ENGINE", help="openvino or onnxruntime.")] = "openvino",
    strategy: Annotated[str, Option(metavar="NAME", help="tpe, nsga2, linas, greedy, constrained or random.")] = "tpe",
    num_images: Annotated[int, Option(min=1, metavar="N", help="How many of --images to search on.")] = 256,
    num_calib: Annotated[int, Option(min=1, metavar="N", help="How many of those to calibrate on.")] = 32,
    train: Annotated[
        str | None, Option(metavar="PATH", help="Other images, to train exits on.", show_default=False)
    ] = None,
    peer: Annotated[
        list[str] | None,
        Option(metavar="NAME=DIR", help="An artifact to measure beside the finalists.", show_default=False),
    ] = None,
    workers: Annotated[
        int, Option(min=0, metavar="N", help="Processes that screen recipes, by Ray; 0 is this one.")
    ] = 0,
    ray_address: Annotated[
        str | None, Option(metavar="HOST:PORT", help="A cluster that is running.", show_default=False)
    ] = None,
    threads: Threads = None,
    seed: Seed = 0,
    overwrite: Annotated[bool, Option("--overwrite", help="Begin anew, where there is a search at --out.")] = False,
    json: Json = False,
) -> int:
    """Find the best recipe within a budget, and leave the winner as an artifact.

    Give one limit or several: --max-drop, --latency-ms, --size-mb. A part of --images is searched on, and the numbers
    told are of the others. Stopped at any moment, the best so far is in --out, and the same command goes on from there.
    `martlet eval DIR` runs the winner. Exit status 3 if nothing keeps the budget; the nearest is there.
    """
    peers = dict(map(_peer, peer or []))
    try:
        with working("load the model") as progress:
            from martlet.recipe_search import search as find

            found = find(
                lambda: model_options.load(model, seed),
                images=image_options.open(seed),
                out=out,
                max_drop=max_drop,
                latency_ms=latency_ms,
                size_mb=size_mb,
                minutes=minutes,
                candidates=candidates,
                recipe=recipe,
                engine=engine,
                strategy=strategy,
                num_images=num_images,
                num_calib=num_calib,
                train=train,
                peers=peers,
                workers=workers,
                ray_address=ray_address,
                overwrite=overwrite,
                threads=threads,
                seed=seed,
                progress=progress,
                command=ctx.obj,
                rebuild=_rebuild(model, model_options, image_options, train, engine, num_calib, threads, seed),
            )
    except Stopped:
        from martlet.core import store

        if store.find(out):
            note(f"the best so far is in {out}; the same command goes on from there")
        raise
    if json:
        emit(found.document)
    else:
        from martlet.recipe_search.folder import DOCUMENT, PAGE
        from martlet.report.terminal_front import Front

        show(
            Front(found.document),
            found.why,
            "",
            f"Artifact  {found.winner.path}",
            f"Page      {out / PAGE}",
            f"Record    {out / DOCUMENT}",
        )
    return 0 if found.kept else GATE_FAILED


def _peer(text: str) -> tuple[str, str]:
    name, equals, path = text.partition("=")
    if not (name and equals and path):
        raise UsageError(f"--peer takes NAME=DIR, not {text!r}")
    return name, path


def _rebuild(
    model: str,
    model_options: ModelOptions,
    image_options: ImageOptions,
    train: str | None,
    engine: str,
    num_calib: int,
    threads: int | None,
    seed: int,
) -> str:
    """The command that makes a point again, but for its recipe and its place."""
    words = ["martlet", "compress", model]
    for options in (model_options, image_options):
        for field in fields(options):
            value, option = getattr(options, field.name), f"--{field.name.replace('_', '-')}"
            if value is True:
                words.append(option)
            elif value not in (None, False):
                words += [option, str(value)]
    words += ["--train", train] if train else []
    words += ["--engine", engine, "--num-calib", str(num_calib), "--seed", str(seed)]
    return shlex.join(words + (["--threads", str(threads)] if threads else []))
