"""`martlet search`: a recipe's settings within a budget."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from typer import Option

from martlet.cli.options import ImageOptions, Json, ModelOptions, Seed, Spec, Threads
from martlet.cli.terminal import emit, facts, show, working


def search(
    model: Spec,
    image_options: ImageOptions,
    out: Annotated[Path, Option(metavar="FILE", help="The recipe to write, .yaml.", show_default=False)],
    model_options: ModelOptions,
    max_drop: Annotated[
        float | None, Option(min=0, metavar="POINTS", help="The fastest that loses no more top-1.", show_default=False)
    ] = None,
    max_ms: Annotated[
        float | None, Option(min=0, metavar="MS", help="What loses least in this time.", show_default=False)
    ] = None,
    recipe: Annotated[
        str, Option(metavar="RECIPE", help="One with int8, or that removes tokens: a shipped one, or a YAML file.")
    ] = "tokens-int8",
    engine: Annotated[str, Option(metavar="ENGINE", help="openvino or onnxruntime.")] = "openvino",
    num_images: Annotated[int, Option(min=1, metavar="N", help="How many of --images.")] = 256,
    num_calib: Annotated[int, Option(min=1, metavar="N", help="How many of those to calibrate on.")] = 64,
    threads: Threads = None,
    seed: Seed = 0,
    overwrite: Annotated[bool, Option("--overwrite", help="Replace what is at --out, and start anew.")] = False,
    json: Json = False,
) -> None:
    """Search what a recipe should do within a budget, by the engine's clock, and write the recipe.

    Where the recipe removes tokens, that is in which blocks how many; else, where it has int8, which layers stay in
    floating point. Give one budget, --max-drop or --max-ms; then `martlet compress … --recipe FILE` on other images. A
    search that was stopped goes on where it was.
    """
    with working("load the model") as progress:
        from martlet.recipe_search import search

        found = search(
            lambda: model_options.load(model, seed),
            images=image_options.open(seed),
            out=out,
            max_drop=max_drop,
            max_ms=max_ms,
            recipe=recipe,
            engine=engine,
            num_images=num_images,
            num_calib=num_calib,
            overwrite=overwrite,
            threads=threads,
            seed=seed,
            progress=progress,
        )
    if json:
        emit(found.document)
        return
    beside = found.references.items()
    ms = "".join(f", {said} {entry['latency_ms']:.2f} ms" for said, entry in beside)
    points = "".join(f", {said} {entry['drop_pct']:.2f} points" for said, entry in beside)
    show(
        facts(
            [
                ("recipe", str(found.recipe)),
                ("latency", f"{found.latency_ms:.2f} ms{ms}"),
                ("expected drop", f"{found.drop_pct:.2f} points{points}"),
            ]
        ),
        f"Recipe  {out}",
        f"Record  {out.with_suffix('.json')}",
    )
