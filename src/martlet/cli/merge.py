"""`martlet merge`: several fine-tunes of a model in, one model out."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from typer import Argument, Context, Option

from martlet.cli.options import Json, ModelOptions, Overwrite, Seed, Spec
from martlet.cli.terminal import emit, facts, show, working


def merge(
    ctx: Context,
    model: Spec,
    finetunes: Annotated[
        list[str],
        Argument(
            metavar="FINETUNE…",
            show_default=False,
            help="Files of weights, or artifacts, of what was tuned from MODEL.",
        ),
    ],
    out: Annotated[Path, Option(metavar="DIR", help="The artifact folder to write.", show_default=False)],
    model_options: ModelOptions,
    method: Annotated[
        str,
        Option(
            metavar="METHOD", help="soup, task_arithmetic, ties, dare, fisher or opcm; or a recipe with one of them."
        ),
    ] = "soup",
    images: Annotated[
        list[str] | None,
        Option(
            metavar="PATH",
            help="For fisher: images of each fine-tune's task, in order; or one folder for all.",
            show_default=False,
        ),
    ] = None,
    num_images: Annotated[int, Option(min=1, metavar="N", help="Of each, how many are looked at.")] = 64,
    seed: Seed = 0,
    overwrite: Overwrite = False,
    json: Json = False,
) -> int:
    """Merge fine-tunes of a model into one of the same size, and write an artifact: to compress, to run, to train on.

    MODEL is what all were tuned from, with its weights (`--weights`); soup and fisher take only its architecture.
    """
    from martlet.merging.job import merge

    with working("load the model") as progress:
        artifact = merge(
            lambda: model_options.load(model, seed),
            finetunes,
            method=method,
            out=out,
            images=images or (),
            num_images=num_images,
            overwrite=overwrite,
            seed=seed,
            progress=progress,
        )
    document = {"artifact": str(artifact.path), "recipe": str(artifact.recipe), "finetunes": finetunes}
    if json:
        emit(document)
    else:
        show(facts([("merged", f"{len(finetunes)} fine-tunes by {artifact.recipe}")]), "", f"Artifact  {artifact.path}")
    return 0
