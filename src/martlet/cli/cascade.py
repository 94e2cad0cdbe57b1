"""`martlet cascade`: several models as one, the cheapest first."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from typer import Argument, Context, Option

from martlet.cli.budget import BudgetOptions
from martlet.cli.compress import run
from martlet.cli.options import EngineName, ImageOptions, Json, ModelOptions, Overwrite, Seed, Threads
from martlet.core.errors import UsageError

if TYPE_CHECKING:
    from martlet.core.store import Artifact
    from martlet.core.technique import Progress


def cascade(
    ctx: Context,
    models: Annotated[
        list[str],
        Argument(
            metavar="MODEL…",
            show_default=False,
            help="Models or artifacts, the cheapest first: MODEL[=FILE]. The options of a model are for the last.",
        ),
    ],
    image_options: ImageOptions,
    out: Annotated[Path, Option(metavar="DIR", help="The artifact folder to write.", show_default=False)],
    model_options: ModelOptions,
    budget: BudgetOptions,
    coverage: Annotated[
        float | None,
        Option(
            min=0,
            max=1,
            metavar="SHARE",
            show_default=False,
            help="Answer only so many images: those near the border between answering and refusing go on.",
        ),
    ] = None,
    width: Annotated[
        float, Option(min=0, max=1, metavar="SHARE", help="With --coverage, how many images go on to the next model.")
    ] = 0.2,
    average: Annotated[
        bool,
        Option(
            help="Images leave with the mean of the probabilities of the models that they came through, or with the "
            "last model's answer alone."
        ),
    ] = True,
    engine: EngineName = "openvino",
    calib: Annotated[
        str | None,
        Option(
            metavar="PATH", help="Images to solve thresholds on; part of --images, if not given.", show_default=False
        ),
    ] = None,
    num_calib: Annotated[int, Option(min=1, metavar="N", help="How many of them.")] = 128,
    max_drop: Annotated[
        float | None,
        Option(min=0, metavar="POINTS", help="Of top-1, or of agreement without labels, that may be lost."),
    ] = None,
    threads: Threads = None,
    seed: Seed = 0,
    overwrite: Overwrite = False,
    json: Json = False,
) -> int:
    """Ask cheap models first and the last one only when they are unsure; measured against the last one alone.

    Exit status 3 if the gate failed, as in compress.
    """
    from martlet.source import with_weights

    if len(models) < 2:
        raise UsageError("a cascade needs two models or more, the cheapest first; for one, see compress --recipe")
    spec, file = with_weights(models[-1])
    if file and model_options.weights:
        raise UsageError(f"{spec} has weights twice: {file} and --weights {model_options.weights}; leave one out")
    last = replace(model_options, weights=file or model_options.weights)

    def job(progress: Progress) -> Artifact:
        from martlet.core.recipe import Recipe
        from martlet.job import compress
        from martlet.techniques.exits.cascade import Cascade
        from martlet.techniques.exits.deer import DeeR
        from martlet.techniques.exits.window import Window

        joined = Cascade(first=tuple(models[:-1]), average=average)
        if coverage is None:
            recipe = budget.apply(Recipe((joined, DeeR())), max_drop)
        else:
            recipe = budget.apply(Recipe((joined, Window(coverage=coverage, width=width))), None)
        return compress(
            lambda: last.load(spec, seed),
            images=image_options.open(seed),
            recipe=recipe,
            engine=engine,
            out=out,
            calib=calib,
            num_calib=num_calib,
            max_drop=max_drop,
            overwrite=overwrite,
            threads=threads,
            seed=seed,
            progress=progress,
            command=ctx.obj,
        )

    return run(job, json)
