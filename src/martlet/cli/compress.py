"""`martlet compress`: the main job."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from typer import Context, Option

from martlet.cli.budget import BudgetOptions
from martlet.cli.options import (
    EngineName,
    Epochs,
    ImageOptions,
    Json,
    Minutes,
    ModelOptions,
    Overwrite,
    Seed,
    Spec,
    Teacher,
    Threads,
)
from martlet.cli.stop import Stopped
from martlet.cli.terminal import emit, note, note_skipped, show, working
from martlet.cli.train import limited
from martlet.core.kept import Kept

if TYPE_CHECKING:
    from martlet.core.report import Document
    from martlet.core.store import Artifact
    from martlet.core.technique import Progress

GATE_FAILED = 3


def compress(
    ctx: Context,
    model: Spec,
    image_options: ImageOptions,
    out: Annotated[Path, Option(metavar="DIR", help="The artifact folder to write.", show_default=False)],
    model_options: ModelOptions,
    budget: BudgetOptions,
    recipe: Annotated[
        str, Option(metavar="RECIPE", help="A shipped recipe, techniques joined by `|`, or a YAML file.")
    ] = "int8",
    engine: EngineName = "openvino",
    calib: Annotated[
        str | None,
        Option(
            metavar="PATH",
            help="Images to learn from, without labels; part of --train or --images, if not given.",
            show_default=False,
        ),
    ] = None,
    num_calib: Annotated[int, Option(min=1, metavar="N", help="How many of them.")] = 64,
    train: Annotated[
        str | None,
        Option(metavar="PATH", help="Images that passes which train the model train it on.", show_default=False),
    ] = None,
    teacher: Teacher = None,
    epochs: Epochs = None,
    minutes: Minutes = None,
    max_drop: Annotated[
        float | None,
        Option(min=0, metavar="POINTS", help="Of top-1, or of agreement without labels, that the gate lets go."),
    ] = None,
    threads: Threads = None,
    seed: Seed = 0,
    overwrite: Overwrite = False,
    json: Json = False,
) -> int:
    """Compress a model, measure it against the untouched one on the engine, and write an artifact with its report.

    Exit status 3 if the gate failed: slower or larger than before, or past --max-drop. The artifact is kept.
    """

    def job(progress: Progress) -> Artifact:
        from martlet.job import compress

        return compress(
            lambda: model_options.load(model, seed),
            images=image_options.open(seed),
            recipe=budget.apply(limited(recipe, epochs, minutes), max_drop),
            engine=engine,
            out=out,
            calib=calib,
            num_calib=num_calib,
            train=train,
            teacher=teacher,
            max_drop=max_drop,
            overwrite=overwrite,
            threads=threads,
            seed=seed,
            progress=progress,
            command=ctx.obj,
        )

    try:
        return run(job, json)
    except Stopped:
        if (kept := Kept.beside(out)).folder.exists():
            note(f"what was learned is kept in {kept.folder}; the same command goes on from there")
        raise


def run(job: Callable[[Progress], Artifact], json: bool) -> int:
    """Does the job and shows what came out. Returns the exit status that follows from the gate."""
    with working("load the model") as progress:
        artifact = job(progress)
    document = artifact.report
    for images in filter(None, document["data"].values()):
        note_skipped(images["skipped"])
    for step in document["recipe"]["steps"]:
        for left_out in step["record"].get("left_out", ()):
            note(f"{step['name']}: {left_out}")
    if json:
        emit(document)
    else:
        from martlet.report.terminal import summary

        show(summary(document), "", f"Artifact  {artifact.path}", f"Page      {artifact.path / 'report.html'}")
    return gate_status(document)


def gate_status(document: Document) -> int:
    """The exit status that follows from a report's gate."""
    return 0 if document["gate"]["passed"] else GATE_FAILED
